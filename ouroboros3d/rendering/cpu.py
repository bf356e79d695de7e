"""The CPU renderer: numba kernels (kernels.py) as one differentiable torch function.

It uses as many threads as torch does (`torch.set_num_threads`, OMP_NUM_THREADS), up to the number of cores,
and gives the same bits every time, whatever their number. On cores shared with other processes set
OMP_WAIT_POLICY=PASSIVE before Python starts: by default OpenMP's threads, torch's too, spin while they wait.
The kernels compile at the first call (some 15 seconds) and come from numba's cache after that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering import kernels
from ouroboros3d.rendering.rules import Rules

_lock = threading.Lock()  # one of numba's threading layers cannot be entered by two threads at once
_owner: int | None = None  # the process in which numba's threads were started


@contextmanager
def numba_threads() -> Iterator[None]:
    """Holds numba's threads, as many as torch's. RuntimeError in a fork of the process they live in."""
    global _owner
    with _lock:
        if _owner is None:
            threads = torch.get_num_threads()
            numba.set_num_threads(1)  # starts them, and torch's number becomes numba's: both use one OpenMP
            torch.set_num_threads(threads)
            _owner = os.getpid()
        if _owner != os.getpid():
            raise RuntimeError(
                "the CPU renderer was used before this process was forked, and its threads do not survive "
                "that: start workers with the 'spawn' method, or render in the main process"
            )
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        yield


def rasterize(
    gaussians: Gaussians, cameras: Cameras, size: int, background: Tensor, rules: Rules, near: float, far: float
) -> Rendering:
    """See `rendering.render`; float32 whatever the input."""
    gaussians = gaussians.to(torch.float32)
    rgb, depth, alpha = Rasterize.apply(
        *(gaussians.means, gaussians.covariances(), gaussians.opacities, gaussians.rgb),
        *(camera_numbers(cameras, size), size, background.float().numpy(), rules, near, far),
    )
    shape = (cameras.batch_size, cameras.num_views, -1, size, size)
    return Rendering(rgb.view(shape), depth.view(shape), alpha.view(shape))


def camera_numbers(cameras: Cameras, size: int) -> np.ndarray:
    """[B V, 16] float64, as `kernels.CAMERA_NUMBERS` describes."""
    w2c, K = cameras.w2c.double().flatten(0, 1), size * cameras.K.double().flatten(0, 1)
    numbers = [w2c[:, :3, :3].flatten(1), w2c[:, :3, 3], K[:, [0, 1], [0, 1]], K[:, :2, 2]]
    return torch.cat(numbers, dim=1).numpy()


class Rasterize(torch.autograd.Function):
    """Gaussians to rgb [B V, 3, H, W] on the background, depth and alpha [B V, H, W]."""

    @staticmethod
    def forward(ctx, means, covariances, opacities, rgb, cameras, size, background, rules, near, far):
        inputs = [x.detach().contiguous().numpy() for x in (means, covariances, opacities, rgb)]
        batch, count = opacities.shape
        total_views, views = len(cameras), len(cameras) // batch
        tiles = -(-size // kernels.TILE)
        splats = np.empty((total_views, count), kernels.SPLAT)
        order = np.empty((total_views, count), np.int32)
        drawn = np.empty(total_views, np.int64)
        ranges = np.empty((total_views, count, 4), np.int16)
        counts = np.zeros((total_views, tiles * tiles), np.int64)
        image = np.empty((total_views, 3, size, size), np.float32)
        depth, alpha, transmittance = np.empty((3, total_views, size, size), np.float32)
        last = np.empty((total_views, size, size), np.int32)
        with numba_threads():
            kernels.project(*inputs, cameras, views, size, rules, near, far, splats)
            kernels.sort_and_count(splats, tiles, order, drawn, ranges, counts)
            ends = np.cumsum(counts).reshape(counts.shape)
            starts = ends - counts
            lists = np.empty(counts.sum(), np.int32)
            kernels.fill_tiles(splats, tiles, order, drawn, ranges, starts, lists)
            kernels.blend_forward(
                *(splats, lists, starts, ends, size, background, rules),
                *(image, depth, alpha, transmittance, last),
            )
        ctx.save_for_backward(means, covariances, opacities)
        ctx.setup = (cameras, size, background, rules)
        ctx.tiling = (splats, lists, starts, ends, transmittance, last)
        return torch.from_numpy(image), torch.from_numpy(depth), torch.from_numpy(alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_images):
        means, covariances, opacities = (x.detach().contiguous().numpy() for x in ctx.saved_tensors)
        d_rgb, d_depth, d_alpha = (x.contiguous().numpy() for x in d_images)
        cameras, size, background, rules = ctx.setup
        splats, lists, starts, ends, transmittance, last = ctx.tiling
        pairs = np.empty((len(lists), kernels.PAIR_NUMBERS), np.float32)
        gradients = [np.empty(x.shape, np.float32) for x in (means, covariances, opacities, means)]
        with numba_threads():
            kernels.blend_backward(
                *(splats, lists, starts, ends, size, background, rules, transmittance, last),
                *(d_rgb, d_depth, d_alpha, pairs),
            )
            views = len(cameras) // len(means)
            kernels.project_backward(
                *(means, covariances, opacities, cameras, views, size, rules, splats, pairs), *gradients
            )
        return (*map(torch.from_numpy, gradients), *[None] * 6)
