"""The numbers of splatting, and the small differences between the three kernels that matter.

All follow 3D Gaussian Splatting (Kerbl et al. 2023): a blur is added to the diagonal of the projected covariance,
a contribution alpha = min(max_alpha, opacity exp(-d^T conic d / 2)) below 1/255 is skipped, Gaussians are blended
front to back by view depth, and a pixel stops before its transmittance would fall under 1e-4. They differ in

- `exact`:   alpha <= 0.99, no extent: every pixel sees every Gaussian. The image does not depend on a tile size.
- `release`: alpha <= 0.99; a Gaussian touches the 16 x 16 tiles that meet the square of 3 sigma of its *longer* axis
             (diff-gaussian-rasterization, the kernel of the Ouroboros3D release). Cuts tails of up to alpha 0.011.
- `gsplat`:  alpha <= 0.999; the tiles that meet min(3.33, sqrt(2 ln(255 opacity))) sigma along each image axis
             (gsplat 1.5). Cuts next to nothing: 3.33 sigma is alpha 1/255 at opacity 1.
"""

from __future__ import annotations

from typing import NamedTuple


class Rules(NamedTuple):  # a NamedTuple because numba's kernels take those
    """What a rasterizer clamps, skips and cuts. The renderers take every such number from here."""

    max_alpha: float
    square_sigmas: float = 0.0  # half the side of the square extent, in sigmas of the longer axis; 0: no such bound
    axis_sigmas: float = 0.0  # the most sigmas of each image axis; 0: no such bound
    min_alpha: float = 1 / 255
    min_transmittance: float = 1e-4
    blur: float = 0.3  # pixels^2
    clamp_margin: float = 0.15  # image widths outside the image beyond which the Jacobian stays that of the border
    tile: int = 16  # pixels; extents are whole tiles


RULES = {
    "exact": Rules(max_alpha=0.99),
    "release": Rules(max_alpha=0.99, square_sigmas=3.0),
    "gsplat": Rules(max_alpha=0.999, axis_sigmas=3.33),
}
