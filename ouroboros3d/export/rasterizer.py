"""Triangles seen by cameras: which face covers which pixel, on the CPU (numba).

For meshes of some 10^5 faces this takes milliseconds per view, needs no OpenGL and gives what fitting colours needs:
faces and barycentric coordinates instead of colours.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

from ouroboros3d.cameras import Cameras
from ouroboros3d.rendering.cpu import numba_threads

NEAR = 1e-3  # world units; a triangle that reaches behind this plane is not drawn


class Hits(NamedTuple):
    """What every pixel centre of V views sees first, from either side."""

    face: np.ndarray  # [V, S, S] int32, -1 where nothing is
    barycentric: np.ndarray  # [V, S, S, 2] float32, perspective-correct weights of the face's corners 1 and 2

    def corner_weights(self, view: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """[n, 3] weights of the three corners at n hits; they sum to 1."""
        others = self.barycentric[view, row, column].astype(np.float64)
        return np.concatenate([1 - others.sum(axis=1, keepdims=True), others], axis=1)


def rasterize(vertices: np.ndarray, faces: np.ndarray, cameras: Cameras, size: int) -> Hits:
    """vertices [N, 3], faces [F, 3], cameras [1, V] on the CPU: the hits of size x size pixels per view."""
    w2c, K = cameras.w2c[0].double().numpy(), cameras.K[0].double().numpy()
    points = np.einsum("vij,nj->vni", w2c[:, :3, :3], vertices) + w2c[:, None, :3, 3]
    projected = np.einsum("vij,vnj->vni", K, points)
    with np.errstate(divide="ignore", invalid="ignore"):  # of triangles that NEAR leaves out
        pixels = size * projected[..., :2] / points[..., 2:]
    face = np.empty((len(points), size, size), np.int32)
    barycentric = np.empty((len(points), size, size, 2), np.float32)
    with numba_threads():
        _draw(pixels, points[..., 2].copy(), np.ascontiguousarray(faces, dtype=np.int64), face, barycentric)
    return Hits(face, barycentric)


@numba.njit(parallel=True, cache=True, error_model="numpy")
def _draw(pixels, depths, faces, out_face, out_barycentric):
    views, size = out_face.shape[:2]
    for v in numba.prange(views):
        nearest = np.zeros((size, size))  # 1 / z
        out_face[v] = -1
        out_barycentric[v] = 0
        for f in range(len(faces)):
            a, b, c = faces[f]
            if min(depths[v, a], depths[v, b], depths[v, c]) < NEAR:
                continue
            (ax, ay), (bx, by), (cx, cy) = pixels[v, a], pixels[v, b], pixels[v, c]
            area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
            if area == 0:
                continue
            left, right = max(0, np.ceil(min(ax, bx, cx) - 0.5)), min(size - 1, np.floor(max(ax, bx, cx) - 0.5))
            top, bottom = max(0, np.ceil(min(ay, by, cy) - 0.5)), min(size - 1, np.floor(max(ay, by, cy) - 0.5))
            for row in range(int(top), int(bottom) + 1):
                for column in range(int(left), int(right) + 1):
                    x, y = column + 0.5 - ax, row + 0.5 - ay
                    wb = (x * (cy - ay) - (cx - ax) * y) / area
                    wc = ((bx - ax) * y - x * (by - ay)) / area
                    wa = 1 - wb - wc
                    if wa < 0 or wb < 0 or wc < 0:
                        continue
                    ib, ic = wb / depths[v, b], wc / depths[v, c]
                    inverse = wa / depths[v, a] + ib + ic
                    if inverse > nearest[row, column]:
                        nearest[row, column] = inverse
                        out_face[v, row, column] = f
                        out_barycentric[v, row, column, 0] = ib / inverse
                        out_barycentric[v, row, column, 1] = ic / inverse
