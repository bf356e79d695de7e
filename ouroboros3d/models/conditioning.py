"""What is added to the diffusion U-Net's features: camera rays and feedback maps (Sec. 3.1 and 3.3).

Both are computed outside the U-Net's forward, so that a sampling run encodes camera rays once and
feedback maps once per step, not once per guidance half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.adapter import FullAdapter
from torch import Tensor, nn


@dataclass(frozen=True)
class Residuals:
    """Features to add inside the U-Net, each [B * V, C, h, w]; `None` adds nothing."""

    down: list[Tensor | None]
    mid: Tensor | None
    up: list[Tensor | None]

    def repeat(self, times: int) -> Residuals:
        """The same features for a batch repeated as a whole, as guidance does."""
        if times == 1:
            return self

        def again(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat(times, 1, 1, 1)

        return Residuals([again(x) for x in self.down], again(self.mid), [again(x) for x in self.up])


class RayEncoder(nn.Module):
    """Two-layer MLP from embedded Plücker rays to the width of the feature map it is added to."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(in_channels, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, rays: Tensor) -> Tensor:
        """[B, V, h, w, in_channels] -> [B * V, channels, h, w]."""
        return self.embed(rays).flatten(0, 1).permute(0, 3, 1, 2).contiguous()


def feedback_encoder(channels: list[int], res_blocks: int, downscale: int) -> FullAdapter:
    """T2I-Adapter's full encoder for one kind of map; every residual branch starts at zero.

    [B * V, 3, H, W] in [0, 1] -> one feature per U-Net level, the first at H / downscale.
    """
    adapter = FullAdapter(3, channels, res_blocks, downscale)
    for block in adapter.body:
        for resnet in block.resnets:
            nn.init.zeros_(resnet.block2.weight)
            nn.init.zeros_(resnet.block2.bias)
    return adapter


def silence(adapter: FullAdapter) -> None:
    """Makes the features of a new adapter zero for every map, so that it changes nothing before it is trained."""
    nn.init.zeros_(adapter.conv_in.weight)
    for layer in (adapter.conv_in, *(block.in_conv for block in adapter.body)):
        if layer is not None:  # a block has none where the width stays
            nn.init.zeros_(layer.bias)


def sum_features(features: list[list[Tensor]]) -> list[Tensor]:
    """Adds the levels of several adapters."""
    return [torch.stack(level).sum(0) if len(level) > 1 else level[0] for level in zip(*features, strict=True)]
