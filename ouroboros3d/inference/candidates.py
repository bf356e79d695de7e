"""Better objects from the same model: several samples of one picture, scored without the truth.

The score is reprojection: how well the 3D, rendered at the input's camera, matches the input picture. The agreement
between renders and generated views (the recursion's own aim, Sec. 3.3) was measured too and did not help to choose:
docs/inference.md has the figures.
Shapes: B candidates, V views; pictures in [-1, 1] or [0, 1] as said.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ouroboros3d.export.object3d import Object3D
from ouroboros3d.sampler import SamplerStep

ELEVATIONS = 4  # of `--elevation auto`, spread evenly over the range the model was trained on
SHARE = 0.8  # of the loop's steps, after which candidates are scored: the last ones add nothing


@dataclass(frozen=True)
class Candidate:
    """What one sample of a picture starts from, and how it scored."""

    seed: int
    elevation: float  # degrees
    score: float = float("nan")  # dB, larger is better
    result: Object3D | None = None  # where the candidates ran the whole loop


def candidates(seed: int, elevations: Sequence[float], count: int) -> list[Candidate]:
    """`count` seeds, from `seed` on, at each elevation. A candidate is the sample that its seed alone would give."""
    return [Candidate(seed + i, float(elevation)) for elevation in elevations for i in range(count)]


def elevation_grid(low: float, high: float, count: int = ELEVATIONS) -> list[float]:
    """`count` elevations in degrees, from `low` to `high`."""
    return torch.linspace(low, high, count).tolist()


def score_parts(step: SamplerStep, images: Tensor) -> dict[str, Tensor]:
    """PSNR [B] in dB of what needs no truth; `images` [B, 3, H, W] in [-1, 1] are the inputs.

    "agreement": the renders against the generated views, at all cameras but the input's. "reprojection": the render
    at the input's camera against the input.
    """
    views, renders = (step.views * 0.5 + 0.5).clamp(0, 1), step.rendering.rgb.clamp(0, 1)
    if views.shape != renders.shape:  # sampler.loop_decoder=half
        views = F.interpolate(views.flatten(0, 1), renders.shape[-2:]).unflatten(0, views.shape[:2])
    return {
        "agreement": _psnr(renders[:, 1:], views[:, 1:]),
        "reprojection": _psnr(renders[:, 0], images.to(renders) * 0.5 + 0.5),
    }


def score(step: SamplerStep, images: Tensor) -> Tensor:
    """[B] dB, larger is better: the part of `score_parts` that was worth something."""
    return score_parts(step, images)["reprojection"]


def step_at(steps: Iterable[SamplerStep], stop: int) -> SamplerStep:
    """Runs `stop` steps of the loop, or all of a shorter one, and returns the last of these."""
    return collections.deque(itertools.islice(steps, stop), maxlen=1).pop()


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    """[B] dB over everything but the first axis, at most 100."""
    return -10 * torch.log10((a - b).float().square().flatten(1).mean(1).clamp(min=1e-10))
