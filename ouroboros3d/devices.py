"""Devices and precisions of the networks. Imports torch only when a device is chosen."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ouroboros3d.errors import UserError

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = (
    "the GPU's memory is too small, or in use by others: sampler.offload=true keeps one network at a time there, "
    "model.conventions.decode_chunk=2 decodes fewer frames at once, --dtype fp16 needs half of float32's, --device cpu "
    "none"
)
DTYPE_NAMES = ("float32", "bf16", "fp16")  # as --dtype takes them
SYNONYMS = {"fp32": "float32", "bfloat16": "bf16", "float16": "fp16"}


class DeviceError(UserError, RuntimeError):
    """The device cannot be used, or not for this."""


def check_device_name(name: str) -> str:
    """Refuses a misspelled device. Raises DeviceError."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise DeviceError(f"--device {name}: must be cpu, cuda, cuda:<number> or mps")
    return name


def dtype_name(name: str) -> str:
    """The name in DTYPE_NAMES of a precision, by whatever name it goes elsewhere; others stay as they are."""
    return SYNONYMS.get(name, name)


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; None is CUDA where there is one, else the CPU. From now on float32 is exact there, until
    a training with `train.tf32` starts. Raises DeviceError."""
    if name is not None:
        check_device_name(str(name))
    import torch

    allow_tf32(False)
    if name is None and not torch.cuda.is_available():
        refuse_old_driver()
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"--device {name}: this machine or this build of torch has no MPS; use --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        refuse_old_driver()
        raise DeviceError(f"--device {name}: this machine or this build of torch has no CUDA; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions on CUDA may round to TF32; torch itself lets convolutions."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """The networks' precision for `sampler.dtype` on a device. "auto" is float16 on CUDA, the release's, else float32.
    "half" is float16 on CUDA and bfloat16 on a CPU that multiplies it; on others, which emulate it, float32."""
    import torch

    if name in ("auto", "half"):
        on_cpu = "bf16" if name == "half" and device.type == "cpu" and _multiplies_bf16() else "float32"
        name = "fp16" if device.type == "cuda" else on_cpu
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _multiplies_bf16() -> bool:
    """Whether this CPU has AVX512-BF16 or AMX."""
    import torch

    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def refuse_old_driver() -> None:
    """Where a GPU is there and its driver is too old for this torch, which would go on with the CPU. Raises
    DeviceError."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # torch's own says what is wrong, in several lines
        if "too old" not in str(error):
            return
        reason = str(error).splitlines()[0].split(". ")[0]
        raise DeviceError(
            f"{reason}: torch {torch.__version__} wants CUDA {torch.version.cuda}; update the driver, install a torch "
            "built for an older CUDA (https://pytorch.org/get-started/locally), or use --device cpu"
        ) from error


def check_shared_memory(wanted: int, path: str = "/dev/shm") -> None:
    """Refuses data workers whose batches do not fit into shared memory, where they would die with a bus error.
    Raises DeviceError."""
    if not os.path.isdir(path):
        return
    free = shutil.disk_usage(path).free
    if wanted > free:
        raise DeviceError(
            f"{path} has {free / 2**20:.0f} MiB free and the data workers need {wanted / 2**20:.0f}: start the "
            f"container with --ipc=host or --shm-size={math.ceil(wanted / 2**30) + 1}g, or set data.workers lower or 0"
        )


@contextmanager
def gpu_memory() -> Iterator[None]:
    """Around work on a GPU: running out of its memory raises DeviceError with what helps."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(OUT_OF_MEMORY) from error
