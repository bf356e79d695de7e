"""The objective on known draws."""

from __future__ import annotations

import dataclasses

import torch

from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.objective import Draws, Objective

HEADS, TAILS = torch.tensor(0.9), torch.tensor(0.1)  # with feedback, without


def draw(samples=(0,), coin: torch.Tensor = TAILS, **changes) -> Draws:
    draws = Draws.draw(0, 0, list(samples), 8, 32, (4, 8))
    return dataclasses.replace(draws, feedback=coin, dropout=torch.full((len(samples),), 0.9), **changes)


@torch.no_grad()
def evaluate(objective: Objective, batch: OrbitBatch, draws: Draws | None):
    keep: dict[str, torch.Tensor] = {}
    objective.record = keep.__setitem__
    losses = objective(batch, draws)
    return {name: value.item() for name, value in losses.items()}, keep


def reaches(loss: torch.Tensor, module: torch.nn.Module) -> bool:
    """Whether the loss has a gradient that is not zero in any parameter."""
    if not loss.requires_grad:
        return False
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(g is not None and bool(g.any()) for g in gradients)
