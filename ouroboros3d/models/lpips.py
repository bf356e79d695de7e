"""The perceptual distance LPIPS, for the loss and for scores."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ouroboros3d.errors import ConfigError

Lpips = Callable[[Tensor, Tensor], Tensor]


def make_lpips(reduce: bool = True) -> Lpips:
    """LPIPS (VGG) of two [N, 3, H, W] in [0, 1], mean over N or with `reduce=False` [N]; frozen, differentiable in
    the first.

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
        values = network.to(prediction.device)(prediction, target, normalize=True).flatten()
        return values.mean() if reduce else values

    return lpips
