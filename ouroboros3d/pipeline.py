"""One model on one device: condition image in, the steps of the loop out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ouroboros3d.build import build_cameras, build_models, build_sampler, check_renderer
from ouroboros3d.config.schema import Config
from ouroboros3d.errors import ConfigError, UserError
from ouroboros3d.sampler import SamplerStep

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceError(UserError, RuntimeError):
    """The device cannot be used, or not for this."""


class Pipeline:
    """One model on one device: condition image in, the steps of the loop out."""

    def __init__(self, config: Config, device: str | None = None, dtype: str | None = None) -> None:
        """Raises DeviceError, ConfigError, CheckpointError."""
        self.config = config
        self.device = pick_device(device)
        if dtype is None:
            dtype = "bf16" if self.device.type == "cuda" else "float32"
        if config.model.pretrained.checkpoint is None:
            raise ConfigError("model.pretrained.checkpoint is not set: name a checkpoint folder with --ckpt")
        check_renderer(config, self.device)
        with _gpu_memory():
            models = build_models(config.model).to(self.device, DTYPES[dtype])
        self.sampler = build_sampler(models, config)
        self.sampler.clock.synchronize = True  # else a part's seconds on CUDA are those of the part before
        self.cameras = build_cameras(config).to(self.device)

    def __call__(self, image: Tensor, seed: int) -> Iterator[SamplerStep]:
        """image [3, H, W] in [-1, 1] at `model.image_size`. Raises NumericalError, DeviceError."""
        noise = self.sampler.draw_noise([seed], self.cameras.num_views).to(self.device)
        with _gpu_memory():
            yield from self.sampler(image[None].to(self.device), self.cameras, noise)


def pick_device(name: str | None) -> torch.device:
    """The device of this name ("cpu", "cuda", "cuda:1"), or the machine's best. Raises DeviceError."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name}: must be cpu, cuda or cuda:<number>")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"--device {name}: this machine or this build of torch has no CUDA; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def pictures_of(step: SamplerStep) -> dict[str, Tensor]:
    """What a step shows, [V, 3, H, W] in [0, 1]: decoded views, and the maps it hands to the next step."""
    views = (step.views[0] * 0.5 + 0.5).clamp(0, 1)
    return {"views": views, "rgb": step.feedback["rgb"][0], "ccm": step.feedback["ccm"][0]}


@contextmanager
def _gpu_memory() -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            "the GPU's memory is too small, or in use by others; --dtype bf16 needs half of float32's, "
            "--device cpu none"
        ) from error
