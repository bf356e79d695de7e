"""Triangulates polygons, concave ones too."""

from __future__ import annotations

import numpy as np


def triangulate(outlines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Polygons [n, k, 3] with k corners each as triangles: the polygon of each [t], and its corners [t, 3] in [0, k).

    Convex ones are fanned out from their first corner, concave ones are cut by mapbox_earcut. The winding is kept.
    """
    count, corners = outlines.shape[:2]
    fan = np.stack([np.zeros(corners - 2, int), *(np.arange(corners - 2) + k for k in (1, 2))], -1)
    bent = np.flatnonzero(_concave(outlines)) if corners > 3 else []
    plain = np.delete(np.arange(count), bent)
    which, cut = [np.repeat(plain, corners - 2)], [np.tile(fan, (len(plain), 1))]
    for number in bent:
        triangles = _cut(outlines[number])
        cut.append(triangles if len(triangles) else fan)
        which.append(np.full(len(cut[-1]), number))
    return np.concatenate(which), np.concatenate(cut)


def strip(indices: np.ndarray) -> np.ndarray:
    """Triangles [t, 3] of a strip of indices [n]; every other one is turned round."""
    k = np.arange(max(0, len(indices) - 2))
    return np.stack([indices[k], indices[k + 1 + k % 2], indices[k + 2 - k % 2]], -1)


def _normals(outlines: np.ndarray) -> np.ndarray:
    """Newell's normals [n, 3] of polygons [n, corners, 3], as long as twice their area."""
    centred = outlines - outlines[:, :1]
    return np.cross(centred, np.roll(centred, -1, 1)).sum(1)


def _concave(outlines: np.ndarray) -> np.ndarray:
    """Whether polygons [n, corners, 3] have a corner that bends inwards: [n] bool."""
    edges = np.roll(outlines, -1, 1) - outlines
    turns = (np.cross(np.roll(edges, 1, 1), edges) * _normals(outlines)[:, None]).sum(-1)
    return (turns < -1e-6 * np.abs(turns).max(1, keepdims=True)).any(1)


def _cut(outline: np.ndarray) -> np.ndarray:
    """Triangles [t, 3] of a simple, roughly flat polygon [corners, 3], in its winding."""
    from mapbox_earcut import triangulate_float64

    normal = _normals(outline[None])[0]
    drop = int(np.abs(normal).argmax())
    flat = np.delete(outline - outline.mean(0), drop, 1)
    triangles = triangulate_float64(np.ascontiguousarray(flat), np.array([len(flat)], np.uint32)).reshape(-1, 3)
    a, b, c = (flat[triangles[:, k]] for k in range(3))
    turn = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    own = (normal[drop] > 0) == (drop != 1)  # counter-clockwise in these two coordinates
    return triangles[:, ::-1] if len(turn) and (turn.sum() > 0) != own else triangles
