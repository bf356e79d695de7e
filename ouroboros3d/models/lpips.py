"""The perceptual distance LPIPS, for the loss and for scores."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ouroboros3d.errors import ConfigError
from ouroboros3d.models.precision import without_autocast

Lpips = Callable[[Tensor, Tensor], Tensor]


def make_lpips(network: str = "alex", reduce: bool = True) -> Lpips:
    """LPIPS of two [N, 3, H, W] in [0, 1], mean over N or with `reduce=False` [N]; frozen, differentiable in the
    first. Always float32, also under autocast: the release keeps it out of half precision.

    network: alex (AlexNet, torchmetrics' default and so the release's) or vgg.
    Raises ConfigError where torchvision or the network's weights are unavailable.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        metric = LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True)
    except Exception as error:  # no torchvision, no download, no cache: each raises its own
        raise ConfigError(
            f"objective.lpips_weight > 0: LPIPS needs torchvision and its weights of '{network}' "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'not available'}); "
            "install them or set objective.lpips_weight=0"
        ) from error
    net = metric.net.requires_grad_(False).eval()

    def lpips(prediction: Tensor, target: Tensor) -> Tensor:
        with without_autocast(prediction.device):
            values = net.to(prediction.device)(prediction.float(), target.float(), normalize=True).flatten()
        return values.mean() if reduce else values

    return lpips
