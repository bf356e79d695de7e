"""Image and shape metrics. Images are [0, 1]; docs/evaluation.md says how the evaluation uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ouroboros3d.models.lpips import Lpips

SOLID = 0.5  # alpha of a silhouette, and opacity of a Gaussian that counts as surface
GREY = 0.05  # largest difference of two channels of a grey pixel
VISIBLE = 0.1  # a picture without alpha shows the object where a channel differs by more from the background


def psnr(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B] decibels over everything but the first axis, at most 100; with `mask` (broadcastable, 0 or 1) over what it
    selects. A mask that selects nothing gives 100."""
    error = (prediction - target) ** 2
    weight = torch.ones_like(error) if mask is None else mask.expand_as(error).to(error.dtype)
    mse = (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp(min=1)
    return -10 * torch.log10(mse.clamp(min=1e-10))


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """[N] structural similarity of [N, 3, H, W] (Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds to import

    values = structural_similarity_index_measure(prediction, target, data_range=1.0, reduction="none")
    return values.reshape(len(prediction))


def gradient_distance(prediction: Tensor, target: Tensor, scales: int = 3) -> Tensor:
    """[N] mean |difference of the images' horizontal and vertical differences| of [N, 3, H, W], averaged over
    `scales` sizes, each half the one before. Sees edges and blur, needs no weights; it is not LPIPS."""
    total = prediction.new_zeros(len(prediction))
    for scale in range(scales):
        if scale:
            prediction, target = F.avg_pool2d(prediction, 2), F.avg_pool2d(target, 2)
        for axis in (-1, -2):
            total = total + (prediction.diff(dim=axis) - target.diff(dim=axis)).abs().flatten(1).mean(1) / 2
    return total / scales


def iou(prediction: Tensor, target: Tensor) -> Tensor:
    """[N] intersection over union of two boolean [N, ...]; 1 where both are empty."""
    both, either = (prediction & target).flatten(1).sum(1), (prediction | target).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(both, dtype=torch.float32))


def grey_casts(made: Tensor, truth: Tensor, alpha: Tensor) -> dict[str, float]:
    """The colour that grey pixels were given: |mean of G - (R + B) / 2| and |mean of R - B|, `made` minus `truth`, over
    the pixels of the object that are grey in `truth`. Pictures [3, H, W] and alpha [1, H, W] in [0, 1]. NaN where fewer
    than 20 pixels are grey."""
    grey = (truth.amax(0) - truth.amin(0) < GREY) & (alpha[0] > SOLID)
    if grey.sum() < 20:
        return {"green": math.nan, "red_blue": math.nan}
    red, green, blue = (made - truth)[:, grey].mean(1).tolist()
    return {"green": abs(green - (red + blue) / 2), "red_blue": abs(red - blue)}


def nearest_distances(points: Tensor, others: Tensor, chunk: int = 2048) -> Tensor:
    """[N] distance of each of `points` [N, 3] to the nearest of `others` [M, 3], M > 0."""
    exact = "donot_use_mm_for_euclid_dist"  # the matrix product rounds small distances away
    return torch.cat([torch.cdist(part, others, compute_mode=exact).min(1).values for part in points.split(chunk)])


def point_scores(points: Tensor, surface: Tensor, thresholds: tuple[float, ...] = (0.02, 0.05)) -> dict[str, float]:
    """How well `points` [N, 3] cover `surface` [M, 3], in its unit of length.

    chamfer: half of (mean distance of the points to the surface + mean distance of the surface to the points).
    fscore_<t>: harmonic mean of the shares of either that lie within t of the other (Knapitsch et al. 2017).
    Without any points the distance is NaN and the F-score 0.
    """
    if len(points) == 0:
        return {"chamfer": float("nan"), **{f"fscore_{t:g}": 0.0 for t in thresholds}}
    there, back = nearest_distances(points, surface), nearest_distances(surface, points)
    scores = {"chamfer": (there.mean() + back.mean()).item() / 2}
    for t in thresholds:
        precision, recall = (there < t).float().mean().item(), (back < t).float().mean().item()
        scores[f"fscore_{t:g}"] = 2 * precision * recall / max(precision + recall, 1e-12)
    return scores


def score_images(
    made: Tensor, truth: Tensor, alpha: Tensor | None = None, shape: Tensor | None = None, lpips: Lpips | None = None
) -> dict[str, Tensor]:
    """Metric -> [B], each the mean over views of its value in each picture.

    made, truth [B, V, 3, H, W] in [0, 1]; alpha [B, V, 1, H, W] the truth's (without it there is no foreground PSNR
    and no IoU); shape [B, V, 1, H, W] boolean, the silhouette of `made`; lpips [N, 3, H, W] twice -> [N].
    A view in which the object cannot be seen has no foreground PSNR.
    """
    views = made.shape[:2]
    made, truth = made.flatten(0, 1), truth.flatten(0, 1)
    values = {"psnr": psnr(made, truth)}
    if alpha is not None:
        solid = alpha.flatten(0, 1) > SOLID
        foreground = psnr(made, truth, solid)
        values["psnr_foreground"] = foreground.masked_fill(~solid.flatten(1).any(1), math.nan)
    values["ssim"] = ssim(made, truth)
    if lpips is not None:
        values["lpips"] = lpips(made, truth)
    values["gradient_distance"] = gradient_distance(made, truth)
    if alpha is not None and shape is not None:
        values["iou"] = iou(shape.flatten(0, 1), solid)
    return {name: value.unflatten(0, views).nanmean(1) for name, value in values.items()}


def picture_silhouette(images: Tensor, background: Sequence[float]) -> Tensor:
    """Where pictures [..., 3, H, W] in [0, 1] show something other than the background: boolean [..., 1, H, W]."""
    colour = images.new_tensor(background)[:, None, None]
    return ((images - colour).abs() > VISIBLE).any(-3, keepdim=True)
