"""Concave polygons of .obj files, cut into triangles inside their outline.

trimesh fans every polygon out from its first corner, which covers holes and notches with triangles that are not there.
"""

from __future__ import annotations

import numpy as np


def triangulate_concave(obj: bytes) -> bytes:
    """The text of an .obj file with triangles in place of its concave polygons; all else stays as it is.

    Polygons that make no sense (indices out of range, no numbers) stay for the reader to judge.
    """
    lines = obj.split(b"\n")
    vertices: list[list[float]] = []
    polygons: dict[int, list[tuple[int, list[int]]]] = {}  # by number of corners: line and vertex indices
    try:
        for number, line in enumerate(lines):
            if line.startswith(b"v "):
                vertices.append([float(x) for x in line.split()[1:4]])
            elif line.startswith((b"f ", b"f\t")):
                corners = line.split()[1:]
                if len(corners) > 3 and not any(c.startswith(b"#") for c in corners):
                    index = [int(c.split(b"/", 1)[0]) for c in corners]
                    index = [i - 1 if i > 0 else len(vertices) + i for i in index]
                    polygons.setdefault(len(index), []).append((number, index))
        points = np.array(vertices, float).reshape(-1, 3)
        for group in polygons.values():
            outlines = points[np.array([index for _, index in group])]  # [polygons, corners, 3]
            for k in np.flatnonzero(_concave(outlines)):
                number = group[k][0]
                corners = lines[number].split()[1:]
                triangles = clip_ears(outlines[k])
                lines[number] = b"\n".join(b"f " + b" ".join(corners[i] for i in t) for t in triangles)
    except (ValueError, IndexError):
        return obj
    return b"\n".join(lines)


def _normals(outlines: np.ndarray) -> np.ndarray:
    """Newell's normals [n, 3] of polygons [n, corners, 3], as long as twice their area."""
    centred = outlines - outlines[:, :1]
    return np.cross(centred, np.roll(centred, -1, 1)).sum(1)


def _concave(outlines: np.ndarray) -> np.ndarray:
    """Whether polygons [n, corners, 3] have a corner that bends inwards: [n] bool."""
    edges = np.roll(outlines, -1, 1) - outlines
    turns = (np.cross(np.roll(edges, 1, 1), edges) * _normals(outlines)[:, None]).sum(-1)
    return (turns < -1e-6 * np.abs(turns).max(1, keepdims=True)).any(1)


def clip_ears(outline: np.ndarray) -> list[tuple[int, int, int]]:
    """Triangles (corner numbers) of a simple, roughly flat polygon [corners, 3], by ear clipping; its own winding."""
    normal = _normals(outline[None])[0]
    drop = int(np.abs(normal).argmax())
    flat = np.delete(outline - outline.mean(0), drop, 1)
    x, y = flat.T if (normal[drop] > 0) == (drop != 1) else (-flat[:, 0], flat[:, 1])  # counter-clockwise

    def turn(a: int, b: int | np.ndarray, c: int | np.ndarray) -> float | np.ndarray:
        return (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a])

    def is_ear(a: int, b: int, c: int) -> bool:
        others = np.array([i for i in order if i not in (a, b, c)])
        others = others[(flat[others][:, None] != flat[[a, b, c]]).any(-1).all(-1)]  # where an outline touches itself
        inside = (turn(a, b, others) >= 0) & (turn(b, c, others) >= 0) & (turn(c, a, others) >= 0)
        return turn(a, b, c) > 0 and not inside.any()

    order, triangles = list(range(len(outline))), []
    while len(order) > 3:
        corners = [(order[k - 1], order[k], order[(k + 1) % len(order)]) for k in range(len(order))]
        # Without an ear the outline crosses itself or is flat somewhere: there the flattest corner does least harm.
        ear = next((c for c in corners if is_ear(*c)), None) or min(corners, key=lambda c: abs(turn(*c)))
        triangles.append(ear)
        order.remove(ear[1])
    return [*triangles, tuple(order)]
