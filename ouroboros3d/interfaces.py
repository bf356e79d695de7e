"""The protocols of the two swappable parts, reconstructor and renderer, and the rendering that they exchange.

Shapes: B batch, V views, H = W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.tensors import Tensors


@dataclass(frozen=True)
class Rendering(Tensors):
    """Gaussians seen from every camera."""

    rgb: Tensor  # [B, V, 3, H, W] composited on the background, not clamped
    depth: Tensor  # [B, V, 1, H, W] sum of alpha T z over the Gaussians, not divided by alpha
    alpha: Tensor  # [B, V, 1, H, W] sum of the blending weights, in [0, 1]

    def views(self, index: slice | list[int]) -> Rendering:
        """The chosen views of every scene."""
        return Rendering(self.rgb[:, index], self.depth[:, index], self.alpha[:, index])


class Reconstructor(Protocol):
    """Views to Gaussians: a feed-forward nn.Module that knows how noisy its views are.

    `class Mine(nn.Module, Reconstructor)` needs `forward` alone: what has a body here is right for most
    (docs/extending.md).
    """

    def __call__(self, images: Tensor, cameras: Cameras, c_noise: Tensor, encoded: Any = None) -> Gaussians:
        """images [B, V, 3, H, W] in about [-1, 1], c_noise scalar or [B] (0.25 ln sigma; 0 for clean views), encoded
        of `encode_cameras`, or None to encode them here."""
        ...

    def encode_cameras(self, cameras: Cameras) -> Any:
        """What depends on the cameras alone: the loop asks once per run."""
        return None

    def input_views(self, views: int) -> list[int]:
        """Which of so many views are read; validation scores these and the others apart."""
        return list(range(views))

    @property
    def grid(self) -> int | None:
        """Side of the grid of Gaussians per input view, ordered [views, rows, columns]. None: they form none, and
        `objective.position_weight` cannot be used."""
        return None

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in training, where it can."""

    def to_inference_dtype(self, dtype: torch.dtype) -> Any:
        """Casts the weights."""
        return self.to(dtype)


class Renderer(Protocol):
    """Gaussians and cameras to pictures, differentiable in every Gaussian parameter."""

    def __call__(self, gaussians: Gaussians, cameras: Cameras, size: int, background: Tensor = ...) -> Rendering:
        """background: [B, 3] in [0, 1]; without it the renderer's own, the same for all."""
        ...
