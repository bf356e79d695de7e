"""The CPU renderer: projection in torch, blending in numba kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.rendering import _kernels
from ouroboros3d.rendering.dense import project, tile_boxes
from ouroboros3d.rendering.rules import Rules


def rasterize(
    gaussians: Gaussians, cameras: Cameras, size: int, rules: Rules, near: float, far: float
) -> tuple[Tensor, Tensor]:
    """Features [B, V, H, W, 4] (rgb without background, depth) and alpha [B, V, H, W], float32."""
    gaussians, cameras = gaussians.to(torch.float32), cameras.to(torch.float32)
    splats = project(gaussians, cameras, size, rules, near, far)
    xx, xy, yy = splats.covariances.unbind(-1)
    det = xx * yy - xy * xy
    conics = torch.stack([yy / det, -xy / det, xx / det], -1)
    boxes = tile_boxes(splats, gaussians.opacities, size, rules).clamp_max(size)
    with torch.no_grad():  # inside the rule's box, only the pixels a Gaussian can reach with alpha >= min_alpha
        opacities = gaussians.opacities[:, None]
        sigmas = (2 * (opacities / rules.min_alpha).clamp_min(1).log()).sqrt()
        rx, ry = sigmas * xx.sqrt(), sigmas * yy.sqrt()
        mx, my = splats.means.unbind(-1)
        reach = torch.stack([mx - rx - 0.5, mx + rx + 0.5, my - ry - 0.5, my + ry + 0.5], -1)
        reach = reach.nan_to_num().clamp(0, size).ceil().long()
        boxes[..., 0::2] = torch.maximum(boxes[..., 0::2], reach[..., 0::2])
        boxes[..., 1::2] = torch.minimum(boxes[..., 1::2], reach[..., 1::2])
        drawn = splats.visible & (opacities >= rules.min_alpha) & (det > 0)
        boxes = torch.where(drawn[..., None], boxes, torch.zeros_like(boxes))
    batch, views, count = splats.depths.shape
    shape = (batch * views, count)
    features = torch.cat([gaussians.rgb[:, None].expand(-1, views, -1, -1), splats.depths[..., None]], -1)
    out = Blend.apply(
        splats.means.reshape(*shape, 2),
        conics.reshape(*shape, 3),
        features.reshape(*shape, 4),
        gaussians.opacities[:, None].expand(-1, views, -1).reshape(shape),
        boxes.reshape(*shape, 4),
        size,
        rules,
    ).reshape(batch, views, size, size, 5)
    return out[..., :4], out[..., 4]


class Blend(torch.autograd.Function):
    """2D splats [views, N, ...] to images [views, H, W, 5] (rgb, depth, alpha)."""

    @staticmethod
    def forward(ctx, means, conics, features, opacities, boxes, size, rules):
        views, count = opacities.shape
        order = torch.argsort(features[..., 3], dim=1, stable=True).numpy()
        arrays = [x.detach().contiguous().numpy() for x in (means, conics, features, opacities, boxes)]
        box = arrays[4]
        tiles = -(-size // _kernels.TILE)
        counts = np.zeros((views, tiles * tiles), np.int64)
        nothing = np.empty(0, np.int64)
        for v in range(views):
            _kernels.fill_tiles(order[v], box[v], tiles, True, counts[v], nothing, nothing, nothing)
        ends = np.cumsum(counts.ravel())
        flat = np.concatenate([[0], ends])
        starts = np.stack([flat[v * tiles * tiles : (v + 1) * tiles * tiles + 1] for v in range(views)])
        lists = np.empty(int(flat[-1]), np.int64)
        for v in range(views):
            cursor = starts[v, :-1].copy()
            _kernels.fill_tiles(order[v], box[v], tiles, False, counts[v], cursor, lists, nothing)
        limits = tuple(np.float32(x) for x in (rules.max_alpha, rules.min_alpha, rules.min_transmittance))
        out = np.empty((views, size, size, 5), np.float32)
        last = np.empty((views, size, size), np.int64)
        _kernels.blend_forward(*arrays, lists, starts, size, limits, out, last)
        ctx.saved = (*arrays, lists, starts, size, limits, out, last)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx, grad):
        arrays = ctx.saved
        lists, starts = arrays[5], arrays[6]
        pair_grad = np.zeros((len(lists), 10), np.float32)
        _kernels.blend_backward(*arrays, grad.contiguous().numpy(), pair_grad)
        total = np.zeros((*arrays[3].shape, 10), np.float32)
        _kernels.reduce_pairs(pair_grad, lists, starts, total)
        total = torch.from_numpy(total)
        return total[..., :2], total[..., 2:5], total[..., 5:9], total[..., 9], None, None, None
