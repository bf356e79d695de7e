"""Gaussians in 16 bytes each, as web/splats.js draws them.

Four little-endian 32-bit words, lowest bits first:

    position x, y            16 bits each, in the box of the positions
    position z, log scale    16 bits, and 8 bits for each of the first two scales
    log scale, quaternion    8 bits each: the third scale, then x, y, z of a unit quaternion, in [-AXIS, AXIS]
    colour, opacity          8 bits each: red, green, blue, opacity

An ellipsoid does not know the order and signs of its axes, so each has 24 quaternions. The one with the largest w
turns by less than 62.8 degrees: its x, y, z are small, and w, which is not stored, is never near zero.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from ouroboros3d.export.frames import MIN_OPACITY, unit_quaternions, visible
from ouroboros3d.gaussians import Gaussians

AXIS = 0.53  # above sin(62.8 degrees / 2)
LEAST = 1e-6  # scale, and range of a value that is the same everywhere


@dataclass(frozen=True)
class Packed:
    """The words of N Gaussians and the ranges that their numbers are fractions of."""

    words: np.ndarray  # [N, 4] uint32, little-endian
    low: list[float]  # least x, y, z
    extent: list[float]  # size of the box
    scales: list[float]  # least natural logarithm of the scales, range

    def header(self) -> dict[str, list[float]]:
        return {"low": self.low, "extent": self.extent, "scales": self.scales}


def pack(gaussians: Gaussians) -> Packed:
    """The visible Gaussians of one scene (B = 1), which an early step may lack. Raises ExportError for NaN."""
    if not (gaussians.opacities >= MIN_OPACITY).any():
        return Packed(np.zeros((0, 4), "<u4"), [0.0] * 3, [LEAST] * 3, [0.0, LEAST])
    g = unit_quaternions(visible(gaussians)).to(torch.float64)
    means, quats, scales, opacities, rgb = (x[0].numpy() for x in (g.means, g.quats, g.scales, g.opacities, g.rgb))
    quats, scales = least_turn(quats, scales)
    logs = np.log(np.maximum(scales, LEAST))
    low, extent = _range(means)
    least, spread = _range(logs.reshape(-1, 1))
    p = _levels((means - low) / extent, 65535)
    s = _levels((logs - least) / spread, 255)
    q = _levels((quats[:, 1:] / AXIS + 1) / 2, 255)
    c = _levels(np.concatenate([rgb, opacities[:, None]], 1), 255)
    words = [
        p[:, 0] | p[:, 1] << 16,
        p[:, 2] | s[:, 0] << 16 | s[:, 1] << 24,
        s[:, 2] | q[:, 0] << 8 | q[:, 1] << 16 | q[:, 2] << 24,
        c[:, 0] | c[:, 1] << 8 | c[:, 2] << 16 | c[:, 3] << 24,
    ]
    return Packed(np.stack(words, 1).astype("<u4"), low.tolist(), extent.tolist(), [least.item(), spread.item()])


def unpack(packed: Packed) -> Gaussians:
    """What is drawn of packed Gaussians, B = 1, float32."""

    def fields(*places: tuple[int, int], most: int = 255) -> np.ndarray:
        return np.stack([(packed.words[:, word] >> shift) & most for word, shift in places], 1) / most

    means = np.array(packed.low) + np.array(packed.extent) * fields((0, 0), (0, 16), (1, 0), most=65535)
    scales = np.exp(packed.scales[0] + packed.scales[1] * fields((1, 16), (1, 24), (2, 0)))
    axis = AXIS * (2 * fields((2, 8), (2, 16), (2, 24)) - 1)
    w = np.sqrt(1 - (axis**2).sum(1, keepdims=True))
    colour = fields((3, 0), (3, 8), (3, 16), (3, 24))
    columns = np.concatenate([means, colour[:, 3:], scales, w, axis, colour[:, :3]], 1)
    return Gaussians.from_tensor(torch.from_numpy(columns).float()[None])


def least_turn(quats: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same ellipsoids by that of their 24 quaternions [N, 4] which has the largest w, with its scales [N, 3]."""
    turns, axes = cube_rotations()
    w = quats @ (turns * [1, -1, -1, -1]).T  # of the products, [N, 24]
    best = np.abs(w).argmax(1)
    (a, u), (b, v) = ((q[:, :1], q[:, 1:]) for q in (quats, turns[best]))
    products = np.concatenate([a * b - (u * v).sum(1, keepdims=True), a * v + b * u + np.cross(u, v)], 1)
    return products * np.where(products[:, :1] < 0, -1, 1), np.take_along_axis(scales, axes[best], 1)


def cube_rotations() -> tuple[np.ndarray, np.ndarray]:
    """The rotations that exchange the axes: 24 quaternions [24, 4], one of each q, -q, and [24, 3] which axis each of
    the three becomes."""
    grid = [q for q in itertools.product((-1, 0, 1), repeat=4) if np.count_nonzero(q) in (1, 2, 4)]
    quats = np.array([q for q in grid if next(filter(None, q)) > 0], dtype=np.float64)
    quats /= np.linalg.norm(quats, axis=1, keepdims=True)
    w, v = quats[:, :1, None], quats[:, None, 1:]
    turned = np.eye(3) + 2 * w * np.cross(v, np.eye(3)) + 2 * np.cross(v, np.cross(v, np.eye(3)))
    return quats, np.abs(turned).argmax(-1)


def _range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(least, extent) of each column."""
    return values.min(0), np.maximum(np.ptp(values, axis=0), LEAST)


def _levels(fraction: np.ndarray, most: int) -> np.ndarray:
    return np.rint(fraction * most).clip(0, most).astype(np.uint32)
