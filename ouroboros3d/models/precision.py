"""Keeps some parts in float32 when networks run in half precision."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def cast_weights(module: nn.Module, dtype: torch.dtype, keep: Sequence[nn.Module] = ()) -> None:
    """Casts the parameters inside to `dtype`, but not those of the modules in `keep`; buffers, which hold constants,
    stay as they are."""
    kept = {id(p) for part in keep for p in part.parameters()}
    for parameter in module.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turns autocast off; a device that has none, such as meta, is left alone."""
    has_one = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_one else contextlib.nullcontext()


class Float32Conv2d(nn.Conv2d):
    """Computes in float32, whatever the precision of its weights and of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with without_autocast(x.device):
            return self._conv_forward(x.float(), self.weight.float(), bias)
