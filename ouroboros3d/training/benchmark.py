"""Seconds, arithmetic and memory of joint training steps (the command: scripts/benchmark_training.py)."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils import release_memory
from torch.utils.data import Dataset

from ouroboros3d.build import build_models
from ouroboros3d.config.loading import as_override, load_config
from ouroboros3d.config.schema import Config, PretrainedConfig
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.errors import UserError
from ouroboros3d.files import write_json
from ouroboros3d.objective import HALF
from ouroboros3d.timing import COMPILED_WARM_UP, Stopwatch, count_tflop, matrix_rate, seconds_of
from ouroboros3d.training.run_log import peak_memory
from ouroboros3d.training.setup import build_objective, compile_networks
from ouroboros3d.training.trainer import Trainer

Timer = Callable[[], float]
ROWS = {  # changes of (objective, train)
    "one pass": ({"feedback_probability": 0.0}, {}),
    "two passes": ({"feedback_probability": 1.0}, {}),
    "two, checkpointing": ({"feedback_probability": 1.0}, {"gradient_checkpointing": True}),
    "two, unread frozen": ({"feedback_probability": 1.0}, {"freeze_unread": True}),
    "two, fused": ({"feedback_probability": 1.0}, {"optimizer": "adamw_fused"}),
    "two, 8 bit": ({"feedback_probability": 1.0}, {"optimizer": "adamw_8bit"}),
    "two, compiled": ({"feedback_probability": 1.0}, {"compile": True}),
}


def make_trainer(config: Config, dataset: Dataset, device: str | None, timer: Timer) -> Trainer:
    """In the memory of the one before, which nobody may hold any more; its schedule and it refer to each other."""
    release_memory()
    torch.manual_seed(config.train.seed)
    models = build_models(config.model)
    objective = build_objective(models, config)
    objective.clock = Stopwatch(timer)
    if config.train.compile:
        compile_networks(objective, config.train.gradient_accumulation)
    trainer = Trainer(objective, dataset, config.train, cpu=device == "cpu", settings=config)
    models.to(trainer.accelerator.device)
    return trainer


def measure(trainer: Trainer, steps: int, timer: Timer) -> tuple[float, dict[str, float], float]:
    """Seconds of a whole step and of its parts, and its TFLOP."""
    batches = iter(trainer.loader())
    tflop = count_tflop(lambda: trainer.train_step(batches))  # also compiles kernels and fills caches
    for _ in range(COMPILED_WARM_UP if trainer.config.compile else 0):
        trainer.train_step(batches)
    device = trainer.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.clock.reset()
    total = sum(seconds_of(lambda: trainer.train_step(batches), device, timer) for _ in range(steps)) / steps
    return total, {name: seconds / steps for name, seconds in trainer.clock.seconds.items()}, tflop


def line(row: dict, first: float) -> str:
    split = ", ".join(f"{part} {s:.2f}" for part, s in sorted(row["parts"].items(), key=lambda item: -item[1]))
    return (
        f"{row['row']:18}: x {row['seconds'] / first:.2f}  {row['seconds']:.2f} s per step, "
        f"{row['samples_per_second']:.2f} samples/s, {row['tflop']:.3f} TFLOP ({100 * row['of_limit']:.0f} % of the "
        f"limit), peak {row['peak_gib']:.2f} GiB; {split}"
    )


def benchmark(options: argparse.Namespace) -> None:
    """The command with the options of ouroboros3d/cli/benchmark_training.py."""
    rows = options.rows or list(ROWS)[:3]
    if unknown := [name for name in rows if name not in ROWS]:
        raise UserError(f"--rows {unknown[0]}: must be of {', '.join(ROWS)}")
    timer = time.process_time if options.cpu_time else time.perf_counter
    run = os.environ.get("TORCHELASTIC_RUN_ID", os.getpid())  # torchrun's: all processes write to one folder
    folder = Path(tempfile.gettempdir()) / f"benchmark_training_{run}"
    try:
        config = load_config(
            options.config, [*options.overrides, as_override("train.output_dir", folder), "train.tracker=none"]
        )
        config.model.pretrained = PretrainedConfig(checkpoint=options.weights)
        table, dataset = [], build_dataset(config, "train")
        for name in rows:
            objective, train = ROWS[name]
            output = str(folder / name.replace(" ", "_"))
            changed = replace(
                config,
                objective=replace(config.objective, **objective),
                train=replace(config.train, **train, output_dir=output),
            )
            trainer = None
            trainer = make_trainer(changed, dataset, options.device, timer)
            seconds, parts, tflop = measure(trainer, options.steps, timer)
            device, dtype = trainer.accelerator.device, HALF.get(changed.train.mixed_precision, torch.float32)
            row = {
                "row": name,
                "seconds": seconds,
                "samples_per_second": trainer.global_batch / seconds,
                "tflop": tflop,
                "of_limit": tflop / seconds / matrix_rate(device, dtype, timer),
                "peak_gib": peak_memory(device),
                "parts": parts,
            }
            table.append(row)
            if trainer.accelerator.is_main_process:
                print(line(row, table[0]["seconds"]), flush=True)
        trainer.step = 1
        saved, trainer = seconds_of(trainer.save, device, timer), None
        trainer = make_trainer(changed, dataset, options.device, timer)  # as a new process's
        resumed = seconds_of(trainer.resume, device, timer)
        if trainer.accelerator.is_main_process:
            size = sum(p.stat().st_size for p in Path(output).rglob("*") if p.is_file()) / 2**20
            if options.json:
                write_json(options.json, table)
            print(f"checkpoint of {size:.0f} MiB: saved in {saved:.2f} s, resumed from in {resumed:.2f} s")
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
