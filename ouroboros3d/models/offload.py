"""Keeps networks in CPU memory and copies each to the GPU while it runs, for the full model on small cards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

Home = list[tuple[Tensor, Tensor]]  # a network's parameters and buffers, each with its values in the CPU's memory


class _OneAtATime(ModelHook):
    """Copies its network to the device before it works, and drops the others' copies: weights do not change here."""

    def __init__(self, device: torch.device, homes: dict[nn.Module, Home]) -> None:
        self.device, self.homes = device, homes

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        for network, home in self.homes.items():
            if network is not module:
                _go_home(home)
        for tensor, values in self.homes[module]:
            if tensor.data_ptr() == values.data_ptr():
                tensor.data = _copy(values, self.device)
        return args, kwargs


def _go_home(home: Home) -> None:
    for tensor, values in home:
        tensor.data = values


def _copy(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, non_blocking=True)


def offload(networks: Sequence[nn.Module], device: torch.device) -> None:
    """From now on at most one of the networks is on the device. Their `forward`, and methods with diffusers'
    `apply_forward_hook`, bring them there. For CUDA they wait in page-locked memory, from which copies are fastest."""
    homes: dict[nn.Module, Home] = {}
    for network in networks:
        tensors = *network.to("cpu").parameters(), *network.buffers()
        homes[network] = [(t, t.data.pin_memory() if device.type == "cuda" else t.data) for t in tensors]
        _go_home(homes[network])
        add_hook_to_module(network, _OneAtATime(device, homes))
