"""LGM's weights with a finer grid of Gaussians (the command: scripts/grow_lgm.py)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ouroboros3d.models.lgm_unet import SKIP_SCALE, ResnetBlock
from ouroboros3d.models.weights import CheckpointError, read_state


def read_grown(path: Path) -> dict[str, Tensor]:
    """`grown` weights of the file `path`. Raises CheckpointError."""
    state = read_state(path)
    if "unet.up_blocks.0.nets.0.conv1.weight" not in state:
        raise CheckpointError(f"{path}: not weights of LGM (no unet.up_blocks)")
    skip = state["unet.conv_in.bias"].numel()
    widths = [b.numel() for k, b in state.items() if re.fullmatch(r"unet\.up_blocks\.\d+\.nets\.0\.conv2\.bias", k)]
    if widths[-1] != skip:
        raise CheckpointError(f"{path}: the last level up has {widths[-1]} channels; growing wants {skip}")
    return grown(state)


def grown(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with one more up block that passes on what it gets: the finest features, each pixel repeated 2 x 2.

    The new block sees the skip connections of the full-size level below it, at first with zero weight. The four
    Gaussians in place of one start with half its size (softplus is about exponential there) and lower opacity.
    """
    last = max(int(match[1]) for key in state if (match := re.match(r"unet\.up_blocks\.(\d+)\.", key)))
    old, new = f"unet.up_blocks.{last}", f"unet.up_blocks.{last + 1}"
    width = state[f"{old}.nets.0.conv2.bias"].numel()
    layers = 1 + max(int(match[1]) for key in state if (match := re.match(rf"{re.escape(old)}\.nets\.(\d+)\.", key)))
    identity = torch.eye(width)
    result = dict(state)
    result[f"{old}.upsample.weight"] = torch.zeros(width, width, 3, 3)
    result[f"{old}.upsample.weight"][:, :, 1, 1] = identity
    result[f"{old}.upsample.bias"] = torch.zeros(width)
    for layer in range(layers):
        result |= {f"{new}.nets.{layer}.{name}": value for name, value in _passing(identity, state).items()}
    result["conv.bias"] = state["conv.bias"].float().clone()
    result["conv.bias"][3:7] -= 1  # opacity and scales
    result["conv.weight"] = state["conv.weight"].clone()
    result["conv.weight"][11:] = 0  # colours: what is added to the pixel
    result["conv.bias"][11:] = 0
    return result


def _passing(identity: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a residual block that returns the first half of its channels; the other half is the skip."""
    width, embedding = len(identity), state["unet.time_embed.2.bias"].numel()
    block = ResnetBlock(2 * width, width, 1, embedding).requires_grad_(False)
    for values in (block.conv1.bias, *block.conv2.parameters(), *block.shortcut.parameters()):
        values.zero_()
    block.shortcut.weight[:, :width, 0, 0] = identity / SKIP_SCALE
    return block.state_dict()
