"""The constants of splatting, and the small differences between the three kernels that matter.

All follow 3D Gaussian Splatting (Kerbl et al. 2023): a blur is added to the diagonal of the projected covariance,
a contribution alpha = min(max_alpha, opacity exp(-d^T conic d / 2)) below 1/255 is skipped, Gaussians are blended
front to back by view depth, and a pixel stops before its transmittance would fall under 1e-4. They differ in

- `exact`:   alpha <= 0.99, no extent: every pixel sees every Gaussian. The image does not depend on a tile size.
- `release`: alpha <= 0.99; a Gaussian touches the 16 x 16 tiles that meet the square of 3 sigma of its *longer* axis
             (diff-gaussian-rasterization, the kernel of the Ouroboros3D release). Cuts tails of up to alpha 0.011.
- `gsplat`:  alpha <= 0.999; the tiles that meet min(3.33, sqrt(2 ln(255 opacity))) sigma of each image axis
             (gsplat 1.5). Cuts tails of up to alpha 0.0039, the 1/255 of the skip, for opacities near 1.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 16  # pixels; both kernels bound Gaussians by whole tiles of this size


@dataclass(frozen=True)
class Rules:
    """What a rasterizer clamps, skips and cuts. The renderers take every number from here."""

    max_alpha: float
    extent: int  # NO_EXTENT, SQUARE_3_SIGMA or AXES_3_33_SIGMA
    min_alpha: float = 1 / 255
    min_transmittance: float = 1e-4
    blur: float = 0.3  # pixels^2
    clamp_margin: float = 0.3  # the Jacobian is evaluated at most 1.3 half-images from the centre


NO_EXTENT, SQUARE_3_SIGMA, AXES_3_33_SIGMA = 0, 1, 2

RULES = {
    "exact": Rules(max_alpha=0.99, extent=NO_EXTENT),
    "release": Rules(max_alpha=0.99, extent=SQUARE_3_SIGMA),
    "gsplat": Rules(max_alpha=0.999, extent=AXES_3_33_SIGMA),
}
