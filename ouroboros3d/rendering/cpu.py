"""The CPU renderer: numba kernels (kernels.py) as one differentiable torch function.

It uses as many threads as torch does (`torch.set_num_threads`, OMP_NUM_THREADS) up to the number of cores, and gives
the same bits every time. Two thread pools share the cores; OMP_WAIT_POLICY=PASSIVE keeps the idle one from spinning.
The kernels compile at the first call (about half a minute) and come from numba's cache after that.
"""

from __future__ import annotations

import os
import threading

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.rendering import kernels
from ouroboros3d.rendering.rules import Rules

_lock = threading.Lock()  # one of numba's threading layers cannot be entered by two threads at once
_owner: int | None = None  # the process in which numba's threads live


class _threads:
    """Holds numba's threads, as many as torch's."""

    def __enter__(self) -> None:
        global _owner
        _lock.acquire()
        if _owner not in (None, os.getpid()):
            _lock.release()
            raise RuntimeError(
                "the CPU renderer was used before this process was forked, and its threads do not survive that; "
                "start workers with the 'spawn' method, or render in the main process"
            )
        _owner = os.getpid()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    def __exit__(self, *exception) -> None:
        _lock.release()


def rasterize(
    gaussians: Gaussians, cameras: Cameras, size: int, rules: Rules, near: float, far: float
) -> tuple[Tensor, Tensor]:
    """Features [B, V, 4, H, W] (rgb without background, depth) and alpha [B, V, 1, H, W], float32."""
    gaussians = gaussians.to(torch.float32)
    images = Rasterize.apply(
        gaussians.means,
        gaussians.covariances(),
        gaussians.opacities,
        gaussians.rgb,
        camera_numbers(cameras, size),
        size,
        rules,
        near,
        far,
    ).unflatten(0, (cameras.batch_size, cameras.num_views))
    return images[:, :, :4], images[:, :, 4:]


def camera_numbers(cameras: Cameras, size: int) -> np.ndarray:
    """[B V, 16] float64, as `kernels.CAMERA_NUMBERS` describes."""
    w2c, K = cameras.w2c.double().flatten(0, 1), size * cameras.K.double().flatten(0, 1)
    numbers = [w2c[:, :3, :3].flatten(1), w2c[:, :3, 3], K[:, [0, 1], [0, 1]], K[:, :2, 2]]
    return torch.cat(numbers, dim=1).numpy()


class Rasterize(torch.autograd.Function):
    """Gaussians to images [B V, 5, H, W] (rgb, depth, alpha)."""

    @staticmethod
    def forward(ctx, means, covariances, opacities, rgb, cameras, size, rules, near, far):
        inputs = [x.detach().contiguous().numpy() for x in (means, covariances, opacities, rgb)]
        batch, count = opacities.shape
        total_views = len(cameras)
        views = total_views // max(batch, 1)
        tiles = -(-size // kernels.TILE)
        with _threads():
            splats = np.empty((total_views, count), kernels.SPLAT)
            kernels.project(*inputs, cameras, views, size, rules, near, far, splats)
            order = np.empty((total_views, count), np.int32)
            drawn = np.empty(total_views, np.int64)
            counts = np.zeros((total_views, tiles * tiles), np.int64)
            kernels.sort_and_count(splats, tiles, order, drawn, counts)
            ends = np.cumsum(counts).reshape(counts.shape)
            starts = ends - counts
            entries = int(counts.sum())
            sorted_splats = np.empty((total_views, count), kernels.SPLAT)
            lists, pair_of = np.empty(entries, np.int32), np.empty(entries, np.int64)
            first_pair = np.empty((total_views, count), np.int64)
            kernels.fill_tiles(splats, tiles, order, drawn, starts, sorted_splats, lists, pair_of, first_pair)
            images = np.empty((total_views, 5, size, size), np.float32)
            transmittance = np.empty((total_views, size, size), np.float32)
            last = np.empty((total_views, size, size), np.int32)
            kernels.blend_forward(sorted_splats, lists, starts, ends, size, rules, images, transmittance, last)
        ctx.save_for_backward(means, covariances, opacities)
        ctx.setup = (cameras, views, size, rules)
        ctx.tiling = (splats, first_pair, sorted_splats, lists, pair_of, starts, ends, transmittance, last)
        return torch.from_numpy(images)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_images):
        means, covariances, opacities = (x.detach().contiguous().numpy() for x in ctx.saved_tensors)
        cameras, views, size, rules = ctx.setup
        splats, first_pair, sorted_splats, lists, pair_of, starts, ends, transmittance, last = ctx.tiling
        pairs = np.empty((len(lists), kernels.PAIR_NUMBERS), np.float32)
        gradients = [np.empty(x.shape, np.float32) for x in (means, covariances, opacities, means)]
        with _threads():
            kernels.blend_backward(
                *(sorted_splats, lists, pair_of, starts, ends, size, rules, transmittance, last),
                *(d_images.contiguous().numpy(), pairs),
            )
            kernels.project_backward(
                *(means, covariances, opacities, cameras, views, size, rules, splats, first_pair, pairs), *gradients
            )
        return (*map(torch.from_numpy, gradients), None, None, None, None, None)
