"""Cameras, orbits and poses, and the conventions of both.

- Camera axes are OpenCV's: x right, y down, z forward. `c2w` maps camera to world coordinates.
- The canonical world is y-up with the object at the origin. The first (input) camera sits at (0, 0, r), has no
  roll, and looks along -z; every other pose is relative to it. An input seen from above therefore tilts the
  orbit in this world, not the first camera.
- Azimuth grows from +z towards +x; elevation is positive above the object; both in degrees.
- `K` is in image widths: pixel centres are ((u + 0.5) / W, (v + 0.5) / H), a centred camera has cx = cy = 0.5.
- Data on disk is Blender/OpenGL: x right, y up, looking along -z.

Shapes: B batch, V views.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ouroboros3d.camera_defaults import DISTANCE, FOV
from ouroboros3d.tensors import Tensors


@dataclass(frozen=True)
class Cameras(Tensors):
    """V pinhole cameras for each of B scenes."""

    c2w: Tensor  # [B, V, 4, 4] OpenCV camera to canonical world
    K: Tensor  # [B, V, 3, 3] intrinsics in image widths

    def __post_init__(self) -> None:
        if self.c2w.ndim != 4 or self.c2w.shape[-2:] != (4, 4) or self.K.shape != (*self.c2w.shape[:2], 3, 3):
            raise ValueError(
                "Cameras want c2w [B, V, 4, 4] and K [B, V, 3, 3], "
                f"got {tuple(self.c2w.shape)} and {tuple(self.K.shape)}"
            )

    @property
    def w2c(self) -> Tensor:
        """[B, V, 4, 4] world to camera: the inverse of a rigid transform, [R^T, -R^T t]."""
        rotation = self.c2w[..., :3, :3].transpose(-1, -2)
        out = self.c2w.clone()
        out[..., :3, :3] = rotation
        out[..., :3, 3] = -(rotation * self.c2w[..., None, :3, 3]).sum(-1)  # no matrix product: TF32 would round it
        return out

    @property
    def centers(self) -> Tensor:
        """[B, V, 3] camera positions."""
        return self.c2w[..., :3, 3]

    @property
    def fov(self) -> Tensor:
        """[B, V] horizontal field of view in degrees."""
        return torch.rad2deg(2 * torch.atan(0.5 / self.K[..., 0, 0]))

    @property
    def batch_size(self) -> int:
        return self.c2w.shape[0]

    @property
    def num_views(self) -> int:
        return self.c2w.shape[1]

    def views(self, index: slice | list[int] | Tensor) -> Cameras:
        """The chosen views of every scene."""
        return Cameras(self.c2w[:, index], self.K[:, index])

    def scenes(self, index: slice | list[int] | Tensor) -> Cameras:
        """The chosen scenes of the batch."""
        return Cameras(self.c2w[index], self.K[index])


def intrinsics_from_fov(fov: float | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., 3, 3] intrinsics in image widths of a centred square camera; `fov` in degrees."""
    fov = torch.as_tensor(fov, dtype=torch.float64)
    K = torch.eye(3, dtype=torch.float64).expand(*fov.shape, 3, 3).clone()
    K[..., 0, 0] = K[..., 1, 1] = 0.5 / torch.tan(torch.deg2rad(fov) / 2)
    K[..., 0, 2] = K[..., 1, 2] = 0.5
    return K.to(dtype)


def opengl_to_opencv(c2w: Tensor) -> Tensor:
    """[..., 4, 4] camera-to-world with OpenGL camera axes (y up, z backward) to OpenCV's: columns 1 and 2 flip."""
    return c2w * c2w.new_tensor([1.0, -1.0, -1.0, 1.0])


def relative_to_first(c2w: Tensor) -> Tensor:
    """Moves V poses [V, 4, 4] so that the first is the canonical input camera at its own distance from the origin.

    Returns [V, 4, 4] in the same dtype; use float64, the release does.
    """
    target = torch.diag(c2w.new_tensor([1.0, -1.0, -1.0, 1.0]))
    target[2, 3] = c2w[0, :3, 3].norm()
    return target @ torch.linalg.inv(c2w[0]) @ c2w


def turn_about_x(degrees: float, like: Tensor) -> Tensor:
    """[4, 4] of a turn of the world about its x axis, y towards z."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return like.new_tensor([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])


def orbit_poses(azimuths: Tensor | list[float], elevation: float, distance: float) -> Tensor:
    """[V, 4, 4] float64 OpenCV poses looking at the origin of a y-up world from `azimuths` (degrees)."""
    azimuth = torch.deg2rad(torch.as_tensor(azimuths, dtype=torch.float64))
    cos_e, sin_e = math.cos(math.radians(elevation)), math.sin(math.radians(elevation))
    if abs(cos_e) < 1e-6:
        raise ValueError(f"elevation must lie strictly between -90 and 90 degrees, got {elevation}")
    sin_a, cos_a, zero = azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)
    outward = torch.stack([sin_a * cos_e, zero + sin_e, cos_a * cos_e], -1)
    right = torch.stack([cos_a, zero, -sin_a], -1)
    forward = -outward
    down = torch.linalg.cross(forward, right)
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(azimuth), 1, 1)
    c2w[:, :3] = torch.stack([right, down, forward, distance * outward], -1)
    return c2w


def orbit(
    azimuths: Tensor | list[float],
    elevation: float = 0.0,
    distance: float = DISTANCE,
    fov: float = FOV,
    relative: bool = True,
) -> Cameras:
    """One orbit around the origin, [1, V, ...] float32. `relative` puts the first camera at the canonical pose
    (tilting the orbit by its elevation); without it the orbit is level in the y-up world."""
    c2w = orbit_poses(azimuths, elevation, distance)
    if relative:
        c2w = relative_to_first(c2w)
    K = intrinsics_from_fov(torch.full((len(c2w),), float(fov)))
    return Cameras(c2w.float()[None], K[None])


def frame_indices(total: int, views: int, rule: str = "release") -> list[int]:
    """Which `views` of an orbit's `total` frames are used, counted from the start frame.

    `release`: integer linspace that includes the last frame (16, 8 -> 0, 2, 4, ..., 12, 15), so the last step is
    longer. `even`: every (total // views)-th frame, the paper's.
    """
    if views > total:
        raise ValueError(f"asked for {views} views of an orbit of {total} frames")
    if rule == "release":
        return torch.linspace(0, total - 1, views, dtype=torch.float64).long().tolist()
    if rule == "even":
        return [i * total // views for i in range(views)]
    raise ValueError(f"view selection must be 'release' or 'even', got {rule!r}")
