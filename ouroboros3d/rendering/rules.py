"""The constants of splatting, and how the kernels differ.

All follow 3D Gaussian Splatting (Kerbl et al. 2023): a blur is added to the diagonal of the projected
covariance Sigma'; a contribution alpha = min(max_alpha, opacity exp(-d^T Sigma'^-1 d / 2)) below 1/255 is
skipped; Gaussians are blended front to back by view depth; a pixel stops before its transmittance would fall
under 1e-4. They differ in

- `exact`:   alpha <= 0.99 and no extent: every pixel sees every Gaussian, the image depends on no tile size.
- `release`: alpha <= 0.99; a Gaussian is seen in the 16 x 16 tiles that meet a square of 3 sigma of its
             *longer* axis (diff-gaussian-rasterization, the release's kernel). Cuts alphas of up to 0.011.
- `gsplat`:  alpha <= 0.999; the tiles that meet min(3.33, sqrt(2 ln(255 opacity))) sigma along each image
             axis (gsplat 1.5). Cuts next to nothing: at opacity 1, 3.33 sigma is where alpha is 1/255.
"""

from __future__ import annotations

from typing import NamedTuple


class Rules(NamedTuple):  # a NamedTuple because numba's kernels take those
    """What a rasterizer clamps, skips and cuts. The renderers take every such number from here."""

    max_alpha: float
    square_sigmas: float = 0.0  # half the side of a square extent, in sigmas of the longer axis; 0: none
    axis_sigmas: float = 0.0  # at most so many sigmas along each image axis; 0: no bound
    min_alpha: float = 1 / 255
    min_transmittance: float = 1e-4
    blur: float = 0.3  # pixels^2
    clamp_margin: float = 0.15  # image widths; further outside the image the Jacobian stays as it is there
    tile: int = 16  # pixels; extents are whole tiles


RULES = {
    "exact": Rules(max_alpha=0.99),
    "release": Rules(max_alpha=0.99, square_sigmas=3.0),
    "gsplat": Rules(max_alpha=0.999, axis_sigmas=3.33),
}
