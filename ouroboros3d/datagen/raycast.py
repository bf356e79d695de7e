"""Ray-cast pictures of surfaces on the CPU, by Embree.

World frame: right-handed, z up, the object centred in a sphere of radius 0.5 (or as asked for). Cameras are
Blender/OpenGL camera-to-world matrices (x right, y up, looking along -z), the convention of the training files.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ouroboros3d.camera_defaults import DISTANCE, FOV

from .surface import Surface, unit

# A surface at least this opaque counts for depth maps and stops a ray.
_OPAQUE, _SOLID = 0.5, 0.996
_MAX_LAYERS = 16  # of what is seen through (leaf textures, panes)
# The sky light comes from everywhere, most from this direction of the world, and never quite fades.
SKY_DIRECTION = np.array([0.4, -0.45, 0.8], np.float32) / np.linalg.norm([0.4, -0.45, 0.8])
_AMBIENT = 0.45
# Nothing is quite black: without some sheen a black object would be a shapeless hole.
_SHEEN = 0.04


def orbit_pose(azimuth: float, elevation: float, distance: float = DISTANCE) -> np.ndarray:
    """Camera-to-world [4, 4] (OpenGL axes) on a sphere around the origin, looking at it, z up.

    Degrees; azimuth counts from +x towards +y, elevation from the horizon upwards.
    """
    a, e = np.radians(azimuth), np.radians(elevation)
    back = np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2] = right, np.cross(back, right), back
    pose[:3, 3] = distance * back
    return pose


class Raycaster:
    """Renders one surface from any number of cameras."""

    def __init__(self, surface: Surface):
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self.surface = surface
        self._scene = EmbreeScene()
        triangles = surface.vertices[surface.faces].astype(np.float32)
        self._mesh = TriangleMesh(self._scene, triangles)  # Embree keeps a pointer only

    def render(self, c2w: np.ndarray, size: int, samples: int = 3, fov: float = FOV) -> np.ndarray:
        """One picture, [size, size, 4] uint8 RGBA (colour not multiplied by alpha, empty = 0).

        c2w: [4, 4] OpenGL camera-to-world; samples: rays per pixel and axis; fov: horizontal, degrees.
        """
        fine = size * samples
        directions = pixel_directions(c2w, fine, fov)
        out, through = np.zeros((fine * fine, 4), np.float32), np.ones(fine * fine, np.float32)
        for rays, face, bary, _, rgba in self._layers(c2w[:3, 3], directions, _SOLID):
            weight = through[rays] * rgba[:, 3]
            seen = weight > 0
            rays, weight = rays[seen], weight[seen]
            shaded = self._shade(face[seen], bary[seen], directions[rays], rgba[seen, :3])
            out[rays, :3] += weight[:, None] * shaded
            out[rays, 3] += weight
            through[rays] -= weight
        out = out.reshape(size, samples, size, samples, 4).sum((1, 3))
        out[..., :3] /= np.maximum(out[..., 3:], 1e-6)
        out[..., 3] /= samples * samples
        out[out[..., 3] < 0.5 / 255] = 0
        return (out * 255 + 0.5).clip(0, 255).astype(np.uint8)

    def depth(self, c2w: np.ndarray, size: int, fov: float = FOV) -> np.ndarray:
        """Distance along the camera's axis through every pixel centre, [size, size] float32, 0 = empty."""
        directions = pixel_directions(c2w, size, fov)
        out = np.zeros(size * size, np.float32)
        for rays, _, _, distance, rgba in self._layers(c2w[:3, 3], directions, _OPAQUE):
            hit = rgba[:, 3] >= _OPAQUE
            out[rays[hit]] = distance[hit] * (directions[rays[hit]] @ -c2w[:3, 2])
        return out.reshape(size, size)

    def blocked(self, points: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Whether the object is hit by rays from points [n, 3] along unit directions [n, 3]: [n] bool."""
        hit = self._scene.run(points.astype(np.float32), directions.astype(np.float32), output=1)
        return hit["primID"] >= 0

    def _layers(self, origin: np.ndarray, directions: np.ndarray, solid: float) -> Iterator[tuple[np.ndarray, ...]]:
        """Hits one behind the other, until alpha reaches `solid`: indices of the rays that hit [n], face [n],
        barycentric [n, 3], distance [n], RGBA [n, 4]."""
        # Only rays into the object's sphere can hit; that is about half of them.
        closest = origin - (directions @ origin)[:, None] * directions
        rays = np.flatnonzero((closest**2).sum(1) <= (self.surface.radius * 1.001) ** 2)
        travelled = np.zeros(len(rays), np.float32)
        for _ in range(_MAX_LAYERS):
            if not len(rays):
                break
            start = origin + directions[rays] * travelled[:, None]
            hit = self._scene.run(start.astype(np.float32), directions[rays].astype(np.float32), output=1)
            keep = hit["primID"] >= 0
            rays, face = rays[keep], hit["primID"][keep]
            u, v = hit["u"][keep], hit["v"][keep]
            travelled = travelled[keep] + hit["tfar"][keep]
            bary = np.stack([1 - u - v, u, v], -1)
            rgba = self.surface.rgba(face, bary)
            yield rays, face, bary, travelled, rgba
            on = rgba[:, 3] < solid
            rays, travelled = rays[on], travelled[on] + 1e-4

    def _shade(self, face: np.ndarray, bary: np.ndarray, directions: np.ndarray, rgb: np.ndarray) -> np.ndarray:
        normal = unit((self.surface.corner_normals[face] * bary[..., None]).sum(1))
        # Two-sided: light the side that is seen.
        normal = np.where((normal * directions).sum(1, keepdims=True) > 0, -normal, normal)
        light = _AMBIENT + (1 - _AMBIENT) * (0.5 + 0.5 * normal @ SKY_DIRECTION)
        return self.surface.lit(face, bary, rgb, (_SHEEN + (1 - _SHEEN) * rgb) * light[:, None])


def pixel_directions(c2w: np.ndarray, size: int, fov: float) -> np.ndarray:
    """Unit world directions through pixel centres, [size * size, 3], rows from the top."""
    focal = 0.5 * size / np.tan(np.radians(fov / 2))
    t = (np.arange(size) + 0.5 - size / 2) / focal
    x, y = np.meshgrid(t, -t)
    return unit(np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3) @ c2w[:3, :3].T)
