"""The mean of several trainings' weights (the command: scripts/average_weights.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ouroboros3d.models.weights import CheckpointError, State, read_state


def read_mean(paths: Sequence[Path]) -> State:
    """Every tensor's mean over the files, taken in float32, in the first file's precision; what holds no floating
    numbers is the first file's. Raises CheckpointError unless all have the same tensors in the same shapes."""
    states = [read_state(path) for path in paths]
    first = states[0]
    for path, state in zip(paths[1:], states[1:], strict=True):
        differing = first.keys() ^ state.keys() or {k for k in first if first[k].shape != state[k].shape}
        if differing:
            raise CheckpointError(
                f"{path}: {len(differing)} tensors differ in name or shape from those of {paths[0]}, e.g. "
                f"{min(differing)}; only weights of one network can be averaged"
            )
    return {
        key: torch.stack([state[key].float() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for key, value in first.items()
    }
