"""Muon: the update of each weight matrix is its momentum made orthogonal (Jordan et al., 2024); the rest has AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steepest at 0; singular values end between 0.7 and 1.2, not at 1
ITERATIONS = 5
ADAMW_RMS = 0.2  # what AdamW's updates have; with it one learning rate fits both (Liu et al., 2025)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two dimensions and more, AdamW for biases, norms and single values.

    `torch.optim.Muon` takes matrices alone. Here a convolution's weight (out, in, ...) is the matrix (out, in * ...).
    Updates have the root mean square of AdamW's, so `lr` and `weight_decay` mean what they mean there.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                update = _muon if parameter.ndim > 1 else _adamw
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update(parameter.grad, state, group), alpha=-group["lr"])
        return loss


def orthogonal(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T (rows, columns), nearly: singular values between 0.7 and 1.2, by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x.to(torch.bfloat16 if x.is_cuda else torch.float32)  # enough for it; many CPUs only emulate bf16
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def _muon(gradient: Tensor, state: dict, group: dict) -> Tensor:
    if not state:
        state["momentum"] = torch.zeros_like(gradient)
    momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
    matrix = gradient.lerp(momentum, MOMENTUM).flatten(1)  # Nesterov's
    return orthogonal(matrix).view_as(gradient) * (ADAMW_RMS * math.sqrt(max(matrix.shape)))


def _adamw(gradient: Tensor, state: dict, group: dict) -> Tensor:
    if not state:
        state |= {"step": 0, "mean": torch.zeros_like(gradient), "square": torch.zeros_like(gradient)}
    state["step"] += 1
    first, second = group["betas"]
    mean = state["mean"].lerp_(gradient, 1 - first)
    square = state["square"].lerp_(gradient.square(), 1 - second)
    scale = (square / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
    return mean / (1 - first ** state["step"]) / scale
