"""Tables of the memory that training and the loop need (the command: scripts/memory_table.py).

Nothing is allocated: one joint step of the whole model is traced on tensors without values (dry_run.py, needs.py).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from tqdm import tqdm

from ouroboros3d.build import build_models
from ouroboros3d.config.schema import Config, PretrainedConfig
from ouroboros3d.errors import ConfigError
from ouroboros3d.needs import GIB, loop_bytes, loop_stages, smallest_card
from ouroboros3d.objective import HALF
from ouroboros3d.training.dry_run import (
    STRATEGIES,
    activation_bytes,
    blank_batch,
    count_parameters,
    estimate_memory,
    feedback_draws,
    run_step,
)
from ouroboros3d.training.optimization import make_optimizer
from ouroboros3d.training.setup import build_objective

NAMES = {"ddp": "DDP", "zero2": "ZeRO-2", "fsdp2": "FSDP2"}


def table(config: Config, processes: int) -> str:
    """GiB a process: one row for every strategy, precision and choice of checkpointing."""
    parameters = count_parameters(config)
    columns = ["weights", "frozen", "gradients", "AdamW", "activations", "total", "8-bit AdamW", "EMA"]
    lines = [
        f"GiB on each of {processes} processes, train.batch_size={config.train.batch_size}, "
        f"{parameters.total_trained / 1e6:.0f} M trained and {parameters.total_frozen / 1e6:.0f} M frozen parameters.",
        "",
        "| | precision | checkpointing | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    cases = [(precision, checkpointing) for precision in ("fp32", "bf16") for checkpointing in (False, True)]
    activations = {}
    for strategy, (precision, checkpointing) in tqdm([(s, c) for s in STRATEGIES for c in cases], unit="case"):
        plain = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
        plain |= {"ema_decay": 0.0, "optimizer": "adamw"}
        case = replace(config, train=replace(config.train, **plain))
        extra = replace(case, train=replace(case.train, ema_decay=0.99, optimizer="adamw_8bit"))
        key = precision, checkpointing, strategy == "zero2" and precision != "fp32"
        if key not in activations:
            activations[key] = activation_bytes(case, half_weights=key[2])
        memory, other = (estimate_memory(c, parameters, activations[key], strategy, processes) for c in (case, extra))
        cells = [memory.weights, memory.frozen, memory.gradients, memory.optimizer, memory.activations, memory.total]
        numbers = [f"{x / GIB:.1f}" for x in cells]
        extras = [f"{(other.optimizer - memory.optimizer) / GIB:+.1f}", f"{other.ema / GIB:+.1f}"]
        numbers += ["none", "none"] if strategy == "fsdp2" else extras  # distributed.py refuses both
        where = [NAMES[strategy], precision, "yes" if checkpointing else "no"]
        lines.append(f"| {' | '.join([*where, *numbers])} |")
    return "\n".join(lines)


def inference_table(config: Config) -> str:
    """GiB of the loop on one GPU for one picture: a row per precision and option."""
    lines = ["| precision | option | weights | working | most at once | card |", "|---" * 6 + "|"]
    for name, dtype in (("float32", torch.float32), ("fp16, bf16", torch.float16)):
        for chunk in (config.model.conventions.decode_chunk, 2):
            conventions = replace(config.model.conventions, decode_chunk=chunk)
            stages = loop_stages(replace(config, model=replace(config.model, conventions=conventions)), dtype)
            for offload in (False, True):
                words = [f"`decode_chunk={chunk}`"] * (chunk == 2) + ["`offload`"] * offload
                most = loop_bytes(stages, offload)
                working = max(stage.working for stage in stages.values())
                weights = max(s.weights for s in stages.values()) if offload else most - working
                numbers = " | ".join(f"{x / GIB:.1f}" for x in (weights, working, most))
                lines.append(f"| {name} | {', '.join(words) or 'none'} | {numbers} | {smallest_card(most)} |")
    return "\n".join(lines)


def measure(config: Config) -> None:
    """Two joint steps with random weights on one GPU; prints the peak next to the estimate. Raises ConfigError."""
    if not torch.cuda.is_available():
        raise ConfigError("--measure: needs a CUDA GPU, and this machine has none")
    config.model.pretrained = PretrainedConfig()
    estimate = estimate_memory(config, count_parameters(config), activation_bytes(config))
    models = build_models(config.model).to("cuda")
    objective = build_objective(models, config)
    optimizer = make_optimizer([p for p in objective.parameters() if p.requires_grad], config.train)
    batch = blank_batch(config).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the optimiser's states are there from the second on
        run_step(objective, batch, feedback_draws(objective, batch), HALF.get(config.train.mixed_precision))
        optimizer.step()
        optimizer.zero_grad()
    used, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    print(f"{torch.cuda.get_device_name()}: {used:.2f} GiB at most in tensors, {reserved:.2f} GiB reserved")
    print(f"estimate: {estimate.total / GIB:.2f} GiB, of which activations {estimate.activations / GIB:.2f}")
