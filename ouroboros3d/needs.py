"""Bytes and arithmetic that networks need, counted on tensors with shapes but no values (FakeTensorMode)."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ouroboros3d.build import Models, build_cameras, build_models
from ouroboros3d.config.loading import as_kwargs
from ouroboros3d.config.schema import Config, PretrainedConfig
from ouroboros3d.devices import DeviceError
from ouroboros3d.files import write_lines
from ouroboros3d.timing import matrix_rate

GIB = 2**30
# What cards hold, in GiB. A tenth stays free: the CUDA context, workspaces and fragmentation are not counted.
CARDS = {
    "8 GB": 8,
    "12 GB": 12,
    "16 GB": 16,
    "24 GB (RTX 3090, 4090)": 24,
    "48 GB (A6000, L40S)": 48,
    "80 GB (A100, H100)": 79,
    "141 GB (H200)": 139,
    "180 GB (B200)": 178,
}
USABLE = 0.9


def smallest_card(count: int) -> str:
    """Of CARDS, for so many bytes."""
    return next((name for name, size in CARDS.items() if count <= USABLE * size * GIB), "none on one card")


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside of it that are alive: `now`, and `peak` for the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):  # what comes from outside, such as weights, whose views are no news
            if isinstance(tensor, Tensor):
                self._known.add(tensor.untyped_storage())
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


def bare_models(config: Config) -> Models:
    """Of the configured dimensions, whatever weights are configured."""
    bare = copy.copy(config.model)
    bare.pretrained = PretrainedConfig()
    return build_models(bare)


def fake_models(config: Config) -> Models:
    """`bare_models` of fake tensors, inside of FakeTensorMode. Made on the meta device, which is quicker: fake tensors
    would follow every random initialisation."""
    with unset_fake_temporarily(), torch.device("meta"):
        models = bare_models(config)
    for network in (models.unet, models.lgm, models.svd):
        cast_fakes(network)
    return models


def cast_fakes(network: nn.Module, dtype: torch.dtype | None = None) -> None:
    """`network.to("cpu", dtype)`, which tensors without values refuse."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=dtype or p.dtype), p.requires_grad)
        module._buffers |= {n: torch.empty(b.shape, dtype=b.dtype) for n, b in module._buffers.items() if b is not None}


@dataclass(frozen=True)
class Stage:
    """What one part of the loop needs while it works."""

    weights: int  # bytes of its network
    working: int  # bytes of everything else, at most
    flop: float


def loop_stages(config: Config, dtype: torch.dtype) -> dict[str, Stage]:
    """The parts of one step of the loop for one picture, and of its start, by name; the renderer is not counted."""
    views, size = config.cameras.num_views, config.model.image_size
    cameras = build_cameras(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        models = fake_models(config)
        for network in (models.unet, models.lgm, models.svd.image_encoder, models.svd.vae.decoder):
            cast_fakes(network, dtype)
        c_noise = torch.zeros(())
        latent = size // models.svd.downscale
        picture, latents = torch.zeros(1, 3, size, size), torch.zeros(1, views, 4, latent, latent)

        def unet() -> Tensor:
            maps = {name: torch.zeros(1, views, 3, size, size) for name in models.unet.config.feedback}
            rays = models.unet.encode_cameras(cameras, latent).repeat(2)
            features = models.unet.encode_feedback(maps).repeat(2)
            sample = torch.cat([latents, latents], dim=2).repeat(2, 1, 1, 1, 1).to(dtype)
            context = torch.zeros(2, 1, config.model.image_encoder.projection_dim, dtype=dtype)
            return models.unet(sample, c_noise, context, torch.zeros(2, 3), rays, features).float()

        parts: dict[str, tuple[nn.Module, Callable[[], object]]] = {
            "embed": (models.svd.image_encoder, lambda: models.svd.embed_image(picture)),
            "encode": (models.svd.vae, lambda: models.svd.encode(picture)),
            "U-Net": (models.unet, unet),
            "decode": (models.svd.vae, lambda: models.svd.decode(latents)),
            "reconstruct": (models.lgm, lambda: models.lgm(torch.zeros(1, views, 3, size, size), cameras, c_noise)),
        }
        return {name: _follow(network, run) for name, (network, run) in parts.items()}


def _follow(network: nn.Module, run: Callable[[], object]) -> Stage:
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    with FlopCounterMode(display=False) as flop, AliveBytes() as alive:
        run()
    return Stage(weights, alive.peak, flop.get_total_flops())


def loop_bytes(stages: dict[str, Stage], offload: bool = False) -> int:
    """At most, on the device: with `offload` only the network that works is there."""
    if offload:
        return max(stage.weights + stage.working for stage in stages.values())
    networks = {name: stage.weights for name, stage in stages.items() if name != "encode"}  # of the VAE, as decode
    return sum(networks.values()) + max(stage.working for stage in stages.values())


def step_flop(stages: dict[str, Stage]) -> float:
    """Floating-point operations of one step with guidance and feedback."""
    return sum(stages[name].flop for name in ("U-Net", "decode", "reconstruct"))


def is_large(config: Config) -> bool:
    """Whether a run is worth announcing: SVD's width, not the small model's."""
    return config.model.multiview.unet.block_out_channels[0] >= 256


def announce(config: Config, device: torch.device, dtype: torch.dtype) -> str:
    """A line on what the loop will need: memory on a GPU, time on a CPU. Raises DeviceError where the card is too
    small, with the options that help."""
    stages = _remembered_stages(config, dtype)
    if device.type != "cuda":
        seconds = step_flop(stages) / 1e12 / matrix_rate(device, dtype)
        steps = config.sampler.taken_steps
        return (
            f"on this CPU a step takes at least {seconds / 60:.1f} minutes, {steps} steps {steps * seconds / 3600:.1f} "
            "hours: fewer steps (--steps) and --dtype bf16, where the processor has it, are faster"
        )
    card = torch.cuda.get_device_properties(device)
    offload = config.sampler.offload
    needed, there = loop_bytes(stages, offload) / USABLE / GIB, card.total_memory / GIB
    if needed <= there:
        return f"needs about {needed:.1f} GiB of the {there:.1f} GiB of {card.name}"
    ways = ["--device cpu"]
    if not offload:
        ways.insert(0, f"sampler.offload=true (then {loop_bytes(stages, True) / USABLE / GIB:.1f} GiB)")
    if dtype == torch.float32:
        ways.insert(0, "--dtype fp16 (half of it)")
    if config.model.conventions.decode_chunk != 2:
        ways.insert(-1, "model.conventions.decode_chunk=2 (fewer frames decoded at once: slightly other pictures)")
    raise DeviceError(f"{card.name} has {there:.1f} GiB and this needs about {needed:.1f}: {'; '.join(ways)}")


def _remembered_stages(config: Config, dtype: torch.dtype) -> dict[str, Stage]:
    """`loop_stages`, which takes some ten seconds, from the user's cache where it has them."""
    model = as_kwargs(config.model)
    del model["pretrained"]
    key = f"{torch.__version__} {dtype} {config.cameras.num_views} {json.dumps(model, sort_keys=True)}"
    path = Path.home() / ".cache" / "ouroboros3d" / f"needs_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {name: Stage(**values) for name, values in json.loads(path.read_text()).items()}
    stages = loop_stages(config, dtype)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, [json.dumps({name: vars(stage) for name, stage in stages.items()})])
    return stages
