"""The oracle: splatting as plain equations in float64 torch, every pixel against every Gaussian.

Slow and memory hungry (N x pixels numbers per view): for tests, not for training. Gradients are autograd's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering.rules import Rules

PIXELS_PER_CHUNK = 1024


@dataclass(frozen=True)
class Splats:
    """Gaussians projected to the image plane, in pixels (pixel centres at integer + 0.5)."""

    means: Tensor  # [B, V, N, 2] (x, y)
    covariances: Tensor  # [B, V, N, 3] (xx, xy, yy), blur included
    depths: Tensor  # [B, V, N] z in the camera
    visible: Tensor  # [B, V, N] bool: between near and far


def project(gaussians: Gaussians, cameras: Cameras, size: int, rules: Rules, near: float, far: float) -> Splats:
    """EWA splatting's affine approximation: Sigma' = J W Sigma W^T J^T (Kerbl et al. 2023, eq. 5)."""
    w2c, K = cameras.w2c, cameras.K
    rotation = w2c[..., None, :3, :3]  # [B, V, 1, 3, 3]
    x, y, z = ((rotation @ gaussians.means[:, None, ..., None])[..., 0] + w2c[..., None, :3, 3]).unbind(-1)
    visible = (z > near) & (z < far)
    z = torch.where(visible, z, torch.ones_like(z))
    fx, fy, cx, cy = (K[..., i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))  # [B, V, 1] widths
    means = size * torch.stack([fx * x / z + cx, fy * y / z + cy], -1)

    margin = rules.clamp_margin
    u = torch.minimum(torch.maximum(x / z, -(cx + margin) / fx), (1 - cx + margin) / fx)
    v = torch.minimum(torch.maximum(y / z, -(cy + margin) / fy), (1 - cy + margin) / fy)
    row_x, row_y, row_z = rotation.unbind(-2)  # [B, V, 1, 3]
    jacobian_w = torch.stack(
        [
            (size * fx / z)[..., None] * (row_x - u[..., None] * row_z),
            (size * fy / z)[..., None] * (row_y - v[..., None] * row_z),
        ],
        -2,
    )  # [B, V, N, 2, 3]
    cov = jacobian_w @ gaussians.covariances()[:, None] @ jacobian_w.transpose(-1, -2)
    covariances = torch.stack([cov[..., 0, 0] + rules.blur, cov[..., 0, 1], cov[..., 1, 1] + rules.blur], -1)
    return Splats(means, covariances, z, visible)


def tile_boxes(splats: Splats, opacities: Tensor, size: int, rules: Rules) -> Tensor:
    """[B, V, N, 4] pixels (x0, x1, y0, y1), x0 <= x < x1, outside which the rule cuts a Gaussian off."""
    mean_x, mean_y = splats.means.detach().unbind(-1)
    xx, xy, yy = splats.covariances.detach().unbind(-1)
    tile, tiles = rules.tile, -(-size // rules.tile)
    if rules.square_sigmas > 0:
        middle = 0.5 * (xx + yy)
        longer = middle + (middle**2 - (xx * yy - xy * xy)).clamp_min(0.1).sqrt()
        radius = (rules.square_sigmas * longer.sqrt()).ceil()
        px, py = mean_x - 0.5, mean_y - 0.5  # that kernel's pixel centres are integers
        x0, x1 = ((px - radius) / tile).floor(), ((px + radius + tile - 1) / tile).floor()
        y0, y1 = ((py - radius) / tile).floor(), ((py + radius + tile - 1) / tile).floor()
    elif rules.axis_sigmas > 0:
        reach = (2 * (opacities.detach()[:, None] / rules.min_alpha).clamp_min(1).log()).sqrt()
        reach = reach.clamp_max(rules.axis_sigmas)
        rx, ry = (reach * xx.sqrt()).ceil(), (reach * yy.sqrt()).ceil()
        x0, x1 = ((mean_x - rx) / tile).floor(), ((mean_x + rx) / tile).ceil()
        y0, y1 = ((mean_y - ry) / tile).floor(), ((mean_y + ry) / tile).ceil()
    else:
        x0 = y0 = torch.zeros_like(mean_x)
        x1 = y1 = x0 + tiles
    return tile * torch.stack([x0, x1, y0, y1], -1).clamp(0, tiles).long()


def blend(pixels: Tensor, mean: Tensor, cov: Tensor, box: Tensor, opacity: Tensor, rules: Rules) -> Tensor:
    """[P, N] weights alpha_i T_i of depth-sorted Gaussians at `pixels` [P, 2] (centres)."""
    xx, xy, yy = cov.unbind(-1)
    det = xx * yy - xy * xy
    dx, dy = (pixels[:, None] - mean).unbind(-1)
    power = -0.5 * (yy * dx * dx - 2 * xy * dx * dy + xx * dy * dy) / det
    alpha = (opacity * power.exp()).clamp_max(rules.max_alpha)
    px, py = pixels[:, 0, None], pixels[:, 1, None]
    inside = (px > box[:, 0]) & (px < box[:, 1]) & (py > box[:, 2]) & (py < box[:, 3])
    alpha = torch.where(inside & (alpha >= rules.min_alpha), alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, dim=1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], dim=1)
    return torch.where(after >= rules.min_transmittance, alpha * before, torch.zeros_like(alpha))


def rasterize(
    gaussians: Gaussians, cameras: Cameras, size: int, background: Tensor, rules: Rules, near: float, far: float
) -> Rendering:
    """See `rendering.render`; float64 whatever the input."""
    gaussians, cameras, background = (x.to(torch.float64) for x in (gaussians, cameras, background))
    splats = project(gaussians, cameras, size, rules, near, far)
    boxes = tile_boxes(splats, gaussians.opacities, size, rules)
    centres = torch.arange(size, dtype=torch.float64, device=gaussians.means.device) + 0.5
    pixels = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).reshape(-1, 2)
    images = []
    for b in range(cameras.batch_size):
        for v in range(cameras.num_views):
            order = torch.argsort(splats.depths[b, v].detach(), stable=True)
            order = order[splats.visible[b, v][order]]
            mean, cov, box = splats.means[b, v, order], splats.covariances[b, v, order], boxes[b, v, order]
            depth = splats.depths[b, v, order, None]
            values = torch.cat([gaussians.rgb[b, order], depth, torch.ones_like(depth)], -1)
            for chunk in pixels.split(PIXELS_PER_CHUNK):
                images.append(blend(chunk, mean, cov, box, gaussians.opacities[b, order], rules) @ values)
    shape = (cameras.batch_size, cameras.num_views, size, size, 5)
    rgb, depth, alpha = torch.cat(images).reshape(shape).movedim(-1, 2).split([3, 1, 1], dim=2)
    return Rendering(rgb + (1 - alpha) * background[:, None, None], depth, alpha)
