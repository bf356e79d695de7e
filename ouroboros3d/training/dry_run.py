"""The plan of a run, without running it: parameters, memory, samples, data, folder.

The networks have tensors with shapes but no values (FakeTensorMode). One whole joint step of the full-size model is
traced on them in seconds, forward and backward, and the bytes of all live tensors are counted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ouroboros3d.build import find_pretrained
from ouroboros3d.cameras import Cameras, orbit
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.data.splits import build_dataset, check_split
from ouroboros3d.devices import pick_device
from ouroboros3d.errors import UserError
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.models.precision import without_autocast
from ouroboros3d.models.weights import is_hub_id
from ouroboros3d.needs import GIB, USABLE, AliveBytes, bare_models, cast_fakes, fake_models, smallest_card
from ouroboros3d.objective import Draws, Objective
from ouroboros3d.training.checkpoints import compare_runs, newest_first, trainer_state
from ouroboros3d.training.setup import prepare_training

STRATEGIES = ("ddp", "zero2", "fsdp2")
BUCKET = 500_000_000  # elements that DeepSpeed reduces at once, its default
STATES = {  # bytes of a weight's states, where they are not two float32 numbers
    "adamw_8bit": 2 * (1 + 4 / 256),  # bitsandbytes': each number and a float32 scale for 256 of them
    "muon": 4,  # of a matrix; the rest, which has AdamW's, is below 1 %
}


@dataclass(frozen=True)
class Parameters:
    """Numbers in the parts of a model, all of them and those that are trained."""

    all: dict[str, int]
    trained: dict[str, int]

    @property
    def total_trained(self) -> int:
        return sum(self.trained.values())

    @property
    def total_frozen(self) -> int:
        return sum(self.all.values()) - self.total_trained


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs."""

    weights: int
    frozen: int
    gradients: int
    optimizer: int
    ema: int
    activations: int  # and temporaries: the most that is alive at once in a step

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def count_parameters(config: Config) -> Parameters:
    """Without memory and without weights."""
    with torch.device("meta"):
        models = bare_models(config)
    prepare_training(models, config)
    everything = {name: list(part.parameters()) for name, part in models.parts.items()}
    return Parameters(
        {name: sum(p.numel() for p in ps) for name, ps in everything.items()},
        {name: sum(p.numel() for p in ps if p.requires_grad) for name, ps in everything.items()},
    )


def estimate_memory(
    config: Config, parameters: Parameters, activations: int, strategy: str = "ddp", processes: int = 1
) -> Memory:
    """What a process holds under a strategy (docs/training.md says how each is counted).

    ddp: everything in float32 on every process, and buckets as large as the gradients if there are several.
    zero2: weights in the half precision (float32 without one); gradients and optimiser states, with a float32 copy of
    the weights, are shared out; one bucket for reducing. fsdp2: weights, gradients and states shared out in float32.
    The frozen parts and EMA weights are float32 and whole everywhere; fsdp2 has no EMA.
    """
    trained, train = parameters.total_trained, config.train
    half = train.mixed_precision != "fp32"
    states = round(trained * STATES.get(train.optimizer, 8))
    ema = 4 * trained if train.ema_decay and strategy != "fsdp2" else 0
    if strategy == "ddp":
        weights, optimizer, gradients = 4 * trained, states, 4 * trained * (1 if processes == 1 else 2)
    elif strategy == "zero2":
        size = 2 if half else 4
        weights, optimizer = size * trained, (4 * trained + states) // processes
        gradients = size * (trained // processes + min(BUCKET, trained))
    elif strategy == "fsdp2":
        weights, gradients, optimizer = (x // processes for x in (4 * trained, 4 * trained, states))
    else:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    return Memory(weights, 4 * parameters.total_frozen, gradients, optimizer, ema, activations)


def activation_bytes(config: Config, half_weights: bool = False) -> int:
    """The most that one step of the configured objective and batch has alive at once, beside weights and gradients.

    With `mixed_precision`, as CUDA's autocast has it: matrix products in half precision, normalisations in float32.
    `half_weights` instead: networks cast as a whole, as DeepSpeed does. A step with feedback is followed. Stand-ins
    take the places of LPIPS (its network's layers) and of the renderer, whose own needs are not counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        models = fake_models(config)
        prepare_training(models, config)
        half = config.train.mixed_precision != "fp32"
        if half and half_weights:
            cast_fakes(models.unet, torch.bfloat16)
            cast_fakes(models.lgm, torch.bfloat16)
        lpips = _LpipsLayers(config.objective.lpips_network) if config.objective.uses_lpips else None
        with unset_fake_temporarily():  # it reads the sampler's noise levels
            objective = Objective(models.unet, models.svd, models.lgm, _flat_renderer, config, lpips)
        if half and not half_weights:
            for network in (models.unet, models.lgm, models.svd):
                _normalise_in_float32(network)
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        return follow_step(objective, blank_batch(config), half and not half_weights)


def follow_step(objective: Objective, batch: OrbitBatch, autocast: bool = False) -> int:
    """Runs one step; the most bytes its tensors had alive."""
    draws = feedback_draws(objective, batch)
    with AliveBytes() as alive:
        run_step(objective, batch, draws, torch.bfloat16 if autocast else None)
    return alive.peak


def feedback_draws(objective: Objective, batch: OrbitBatch) -> Draws:
    """Of a step with feedback, where there is any."""
    draws = objective.draw(0, 10**9, list(range(len(batch.ids))), batch)
    return replace(draws, feedback=1.0)  # a number: a tensor without values has no truth


def run_step(objective: Objective, batch: OrbitBatch, draws: Draws, half: torch.dtype | None) -> None:
    """Forward, under autocast to `half` if there is one, and backward."""
    with torch.autocast(batch.images.device.type, half, enabled=half is not None):
        total = objective(batch, draws)["total"]
    total.backward()


def blank_batch(config: Config) -> OrbitBatch:
    """A batch of the configured shapes without content."""
    objective, size = config.objective, config.model.image_size

    def views(count: int, extra: OrbitBatch | None) -> OrbitBatch:
        one = orbit([360.0 * i / count for i in range(count)])
        batch = config.train.batch_size
        cameras = Cameras(one.c2w.expand(batch, -1, -1, -1), one.K.expand(batch, -1, -1, -1))
        images = torch.zeros(batch, count, 3, size, size)
        return OrbitBatch(images, cameras, [""] * batch, images[:, :, :1], images[:, :, :1], extra)

    extra = views(objective.extra_views, None) if objective.extra_views else None
    return views(config.cameras.num_views, extra)


def _flat_renderer(gaussians: Gaussians, cameras: Cameras, size: int, background: Tensor | None = None) -> Rendering:
    """Pictures of the right shape that depend on every Gaussian."""
    value = gaussians.to_tensor().mean(dim=(1, 2))
    image = value[:, None, None, None, None] + value.new_zeros(*cameras.c2w.shape[:2], 3, size, size)
    return Rendering(image, image[:, :, :1], image[:, :, 1:2])


# Convolutions (channels out, kernel, stride, padding) of LPIPS's networks by the levels it compares.
LPIPS_LAYERS = {
    "alex": [[(64, 11, 4, 2)], [(192, 5, 1, 2)], [(384, 3, 1, 1)], [(256, 3, 1, 1)], [(256, 3, 1, 1)]],
    "vgg": [[(width, 3, 1, 1)] * count for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))],
}
POOLED = {"alex": (1, 2), "vgg": (1, 2, 3, 4)}  # levels that start with a pooling


class _LpipsLayers(nn.Module):
    """The network's convolutions and a distance after each level: what LPIPS keeps for the gradient."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.pooled, self.levels, width = POOLED[network], nn.ModuleList(), 3
        for layers in LPIPS_LAYERS[network]:
            level = nn.ModuleList()
            for out, kernel, stride, padding in layers:
                level.append(nn.Conv2d(width, out, kernel, stride, padding))
                width = out
            self.levels.append(level)
        self.requires_grad_(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        total = prediction.new_zeros(())
        pictures = [prediction.float(), target.float()]
        with without_autocast(prediction.device):
            for index, level in enumerate(self.levels):
                if index in self.pooled:
                    pictures = [nn.functional.max_pool2d(x, 2) for x in pictures]
                for convolution in level:
                    pictures = [convolution(x).relu() for x in pictures]
                one, other = (nn.functional.normalize(x, dim=1) for x in pictures)
                total = total + ((one - other) ** 2).mean()
        return total


def _normalise_in_float32(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.register_forward_pre_hook(lambda _module, args: (args[0].float(), *args[1:]))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def describe(config: Config, device_name: str | None = None) -> tuple[str, list[str]]:
    """The plan of a run on as many processes as torchrun announces, and what would stop it on this device."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    data, words, problems = _describe_data(config)
    train = config.train
    parameters = count_parameters(config)
    rows = [f"{'':16}{'all':>12}{'trained':>12}   million parameters"]
    for name, count in parameters.all.items():
        rows.append(f"  {name:14}{count / 1e6:12.2f}{parameters.trained[name] / 1e6:12.2f}")
    rows.append(f"  {'sum':14}{sum(parameters.all.values()) / 1e6:12.2f}{parameters.total_trained / 1e6:12.2f}")

    samples = train.batch_size * train.gradient_accumulation * processes
    objects = len(data.get("train", ()))
    epochs = f", {train.steps * samples / objects:.1f} epochs" if objects else ""
    if 0 < objects < samples:
        problems.append(f"{samples} samples per step, and the training set has {objects}")
    output, refused = _describe_output(config, samples)
    problems = list(dict.fromkeys([*problems, *refused]))
    strategy = announced_strategy()
    limit = f", or {train.time_budget} of training" if train.time_budget else ""
    memory = estimate_memory(config, parameters, activation_bytes(config), strategy, processes)
    problems += _device_problems(memory.total, device_name)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in vars(memory).items() if size)
    for key in ("lgm", "vae", "image_encoder", "unet", "checkpoint"):
        path = getattr(find_pretrained(config.model.pretrained), key)
        on_hub = key == "checkpoint" and is_hub_id(path or "")
        if path is not None and not on_hub and not Path(path).exists():
            problems.append(f"model.pretrained.{key} = {path}: is not there")
    lines = [
        "parameters",
        *rows,
        f"batch       {train.batch_size} a process x {train.gradient_accumulation} accumulated x {processes} processes"
        f" = {samples} samples per step",
        f"steps       {train.steps} = {train.steps * samples} samples{epochs}{limit}",
        f"memory      {memory.total / GIB:.2f} GiB a process ({parts}), {train.mixed_precision}, estimated;"
        f" smallest card: {smallest_card(memory.total)}",
        f"data        {words}",
        f"output      {output}",
        *(f"problem     {problem}" for problem in problems),
    ]
    return "\n".join(lines), problems


def announced_strategy() -> str:
    """What `accelerate launch` announces; without it training is DDP."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "zero2"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else "ddp"


def _device_problems(count: int, device_name: str | None = None) -> list[str]:
    """What stops a run of so many bytes a process: no such device, or a GPU too small."""
    try:
        device = pick_device(device_name)
    except UserError as error:
        return [str(error)]
    if device.type != "cuda":
        return []
    card = torch.cuda.get_device_properties(0)
    if count <= USABLE * card.total_memory:
        return []
    return [
        f"{count / GIB:.0f} GiB a process, and {card.name} has {card.total_memory / GIB:.0f}: lower train.batch_size, "
        "set train.gradient_checkpointing=true, or share the states out (configs/accelerate/deepspeed_zero2.yaml)"
    ]


def _describe_data(config: Config) -> tuple[dict[str, OrbitDataset], str, list[str]]:
    """Both sets as far as they are there, a line about them, and problems. An orbit of each is read."""
    uncached = replace(config, data=replace(config.data, cache="none"))
    found, words, problems = {}, [], []
    for split in ("train", "val"):
        name = getattr(config.data, split)
        try:
            found[split] = build_dataset(uncached, split)
            shape = " x ".join(map(str, found[split][0]["images"].shape))
            words.append(f"{len(found[split])} orbits in {name}, {shape} of each")
        except UserError as error:
            problems.append(str(error))
            words.append(f"none in {name}")
    if len(found) == 2:
        try:
            check_split(*found.values(), config)
        except UserError as error:
            problems.append(str(error))
    return found, f"{config.data.root}: {'; '.join(words)}", problems


def _describe_output(config: Config, samples: int) -> tuple[str, list[str]]:
    """Where the run would go on, and why it may not."""
    folder, resume = Path(config.train.output_dir), config.train.resume
    saved = newest_first(folder / "checkpoints")
    if resume == "never" or (resume == "auto" and not saved):
        return f"{folder}: {'is there, starts over' if folder.exists() else 'is new'}", []
    checkpoint, problems = saved[0] if resume == "auto" else Path(resume), []
    try:
        compare_runs(checkpoint, *trainer_state(checkpoint), config, samples, named=resume != "auto")
    except UserError as error:
        problems.append(str(error))
    except Exception:  # a damaged one, in as many ways as there are formats: the run would take the one before it
        pass
    return f"{folder}: resumes from {checkpoint}", problems
