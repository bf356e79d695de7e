"""Image metrics, all on [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ouroboros3d.config import ConfigError


def psnr(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B] decibels over everything but the first axis; with `mask` (broadcastable, 0 or 1) over what it selects."""
    error = (prediction - target) ** 2
    weight = torch.ones_like(error) if mask is None else mask.expand_as(error).to(error.dtype)
    mse = (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def make_lpips() -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (VGG) of two [N, 3, H, W] in [0, 1], mean over N; frozen, differentiable in the first.

    Raises ConfigError where torchvision or its VGG weights cannot be had.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type="vgg", normalize=True)
    except Exception as error:  # no torchvision, no download, no cache: each raises its own
        raise ConfigError(
            "objective.lpips_weight > 0: LPIPS needs torchvision and its VGG weights "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'not available'}); "
            "install them or set objective.lpips_weight=0"
        ) from error
    network = metric.net.requires_grad_(False).eval()

    def lpips(prediction: Tensor, target: Tensor) -> Tensor:
        return network.to(prediction.device)(prediction, target, normalize=True).mean()

    return lpips
