"""What flows between the parts: renderings, feedback, and the two swappable parts' protocols.

Shapes: B batch, V views, H = W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians


@dataclass(frozen=True)
class Rendering:
    """Gaussians seen from every camera."""

    rgb: Tensor  # [B, V, 3, H, W] composited on the background, not clamped
    depth: Tensor  # [B, V, 1, H, W] sum of alpha T z over the Gaussians, not divided by alpha
    alpha: Tensor  # [B, V, 1, H, W] sum of the blending weights, in [0, 1]

    def views(self, index: slice | list[int]) -> Rendering:
        """The chosen views of every scene."""
        return Rendering(self.rgb[:, index], self.depth[:, index], self.alpha[:, index])


class Reconstructor(Protocol):
    """Views to Gaussians: a feed-forward model that knows how noisy its views are."""

    def __call__(self, images: Tensor, cameras: Cameras, c_noise: Tensor) -> Gaussians:
        """images [B, V, 3, H, W] in [-1, 1], c_noise scalar or [B] (0.25 ln sigma)."""
        ...


class Renderer(Protocol):
    """Gaussians and cameras to pictures, differentiable in every Gaussian parameter."""

    def __call__(self, gaussians: Gaussians, cameras: Cameras, size: int, background: Tensor = ...) -> Rendering:
        """background: [B, 3] in [0, 1]; without it the renderer's own, the same for all."""
        ...
