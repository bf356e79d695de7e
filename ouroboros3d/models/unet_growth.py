"""The multi-view U-Net's weights with one more layer per block (the command: scripts/grow_unet.py)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ouroboros3d.models.weights import CheckpointError, State, read_state

_LAYER = re.compile(r"(unet\.(down|up)_blocks\.\d+\.(?:resnets|attentions))\.(\d+)\.(.+)")
_LAST = re.compile(r"(?:_res_block\.conv2|^proj_out)\.(?:weight|bias)$")  # of a residual branch


def read_deepened(path: Path) -> State:
    """`deepened` weights of the file `path`. Raises CheckpointError."""
    state = read_state(path)
    if "unet.down_blocks.0.resnets.0.spatial_res_block.conv1.weight" not in state:
        raise CheckpointError(f"{path}: not weights of the multi-view U-Net (no unet.down_blocks)")
    widths = {v.numel() for k, v in state.items() if re.search(r"_blocks\.\d+\.resnets\..*spatial.*conv1\.bias$", k)}
    if len(widths) > 1:
        raise CheckpointError(f"{path}: blocks have {sorted(widths)} channels; growing wants one width")
    return deepened(state)


def deepened(state: State) -> State:
    """`state` for `layers_per_block` + 1: the same function of the same inputs.

    A block on the way down gets its new layer last. Its output is one more skip connection, and the second layer of the
    block on the way up that reads it is new too. New layers start as copies of their block's first layer whose
    residual branches end in zeros, so they pass on what they get.
    """
    layers = 1 + max(int(match[3]) for key in state if (match := _LAYER.match(key)) and match[2] == "down")
    result: State = {}
    for key, value in state.items():
        match = _LAYER.match(key)
        if match is None:
            result[key] = value
            continue
        block, way, layer, name = match[1], match[2], int(match[3]), match[4]
        result[f"{block}.{layer + (way == 'up' and layer > 0)}.{name}"] = value
        if layer == 0:
            result[f"{block}.{layers if way == 'down' else 1}.{name}"] = _passing(name, value)
    return result


def _passing(name: str, value: Tensor) -> Tensor:
    """The tensor `name` of a layer that returns its input, without the skip connection beside it."""
    if "conv_shortcut" in name:
        shortcut = torch.zeros_like(value)
        if name.endswith("weight"):
            width = len(value)
            shortcut[:, :width, 0, 0] = torch.eye(width)
        return shortcut
    return torch.zeros_like(value) if _LAST.search(name) else value.clone()
