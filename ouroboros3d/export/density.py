"""Gaussians to a closed surface: their density on a grid, and marching cubes through it."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from ouroboros3d.gaussians import Gaussians

MIN_OPACITY = 0.02  # fainter Gaussians do not bound the grid, nor count in it
REACH = 3.0  # sigmas a Gaussian is counted to
MIN_PART = 0.01  # of the largest part's volume: smaller parts are dropped


class Density(NamedTuple):
    """1 - prod(1 - alpha): the chance that a ray through a voxel is stopped there."""

    values: np.ndarray  # [X, Y, Z] float32 in [0, 1]
    origin: np.ndarray  # [3] world position of the centre of voxel (0, 0, 0)
    step: float  # world units per voxel


def density(gaussians: Gaussians, resolution: int) -> Density:
    """The density of one scene (B = 1) with `resolution` voxels along its longest side.

    A voxel is not a point: Gaussians are widened by half of one, (step / 2)^2 on the diagonal of the covariance, so
    that thin ones are not missed between voxel centres.
    """
    keep = gaussians.opacities[0] >= MIN_OPACITY
    means = gaussians.means[0, keep].double().numpy()
    covariances = gaussians.covariances()[0, keep].double().numpy()
    opacities = gaussians.opacities[0, keep].double().numpy()
    spread = 2 * np.sqrt(covariances[:, [0, 1, 2], [0, 1, 2]])
    low, high = (means - spread).min(axis=0), (means + spread).max(axis=0)
    step = float((high - low).max() / resolution)
    covariances += np.eye(3) * (step / 2) ** 2
    reach = REACH * np.sqrt(covariances[:, [0, 1, 2], [0, 1, 2]]) / step
    transparent = np.ones(np.ceil((high - low) / step).astype(int) + 1, np.float32)
    _splat((means - low) / step, np.linalg.inv(covariances) * step**2, reach, opacities, transparent)
    return Density(1 - transparent, low, step)


@numba.njit(cache=True, error_model="numpy")
def _splat(means, precisions, reach, opacities, transparent):
    """Multiplies `transparent` by 1 - alpha of every Gaussian; all in voxels."""
    for n in range(len(means)):
        first = np.empty(3, np.int64)
        last = np.empty(3, np.int64)
        for axis in range(3):
            first[axis] = max(0, np.ceil(means[n, axis] - reach[n, axis]))
            last[axis] = min(transparent.shape[axis] - 1, np.floor(means[n, axis] + reach[n, axis]))
        p = precisions[n]
        for i in range(first[0], last[0] + 1):
            x = i - means[n, 0]
            for j in range(first[1], last[1] + 1):
                y = j - means[n, 1]
                for k in range(first[2], last[2] + 1):
                    z = k - means[n, 2]
                    square = p[0, 0] * x * x + p[1, 1] * y * y + p[2, 2] * z * z
                    square += 2 * (p[0, 1] * x * y + p[0, 2] * x * z + p[1, 2] * y * z)
                    if square < REACH * REACH:
                        transparent[i, j, k] *= 1 - opacities[n] * np.exp(-0.5 * square)


def surface(field: Density, iso: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [N, 3] and faces [F, 3], counter-clockwise from outside, where the density is `iso`; both empty if it is
    nowhere.

    Cavities are filled, so that nothing hides inside, and parts under MIN_PART of the largest's volume are dropped.
    The surface is closed: the grid counts as empty beyond its border.
    """
    from scipy.ndimage import binary_fill_holes
    from skimage.measure import label, marching_cubes

    inside = field.values > iso
    if not inside.any():
        return np.empty((0, 3)), np.empty((0, 3), np.int64)
    values = np.where(binary_fill_holes(inside) & ~inside, np.float32(1), field.values)
    parts = label(values > iso)
    volumes = np.bincount(parts.ravel())
    volumes[0] = 0
    small = volumes < MIN_PART * volumes.max()
    small[0] = False
    values = np.pad(np.where(small[parts], np.float32(0), values), 1)
    vertices, faces, _, _ = marching_cubes(values, iso)
    return (vertices - 1) * field.step + field.origin, faces[:, ::-1].astype(np.int64)
