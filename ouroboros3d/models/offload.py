"""Keeps networks in CPU memory and moves each to the GPU while it runs, for the full model on small cards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn


class _OneAtATime(ModelHook):
    """Moves its network to the device before it works, and the others away."""

    def __init__(self, device: torch.device, networks: Sequence[nn.Module]) -> None:
        self.device, self.networks = device, networks

    def pre_forward(self, module: nn.Module, *args, **kwargs):
        for other in self.networks:
            if other is not module:
                other.to("cpu")
        module.to(self.device)
        return args, kwargs


def offload(networks: Sequence[nn.Module], device: torch.device) -> None:
    """From now on at most one of the networks is on the device. Their `forward`, and methods with diffusers'
    `apply_forward_hook`, bring them there."""
    for network in networks:
        network.to("cpu")
        add_hook_to_module(network, _OneAtATime(device, networks))
