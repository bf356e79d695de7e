"""Cameras around an object, for fitting a mesh to its Gaussians and for checking files."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ouroboros3d.camera_defaults import DISTANCE, FOV
from ouroboros3d.cameras import Cameras, intrinsics_from_fov, orbit_poses
from ouroboros3d.gaussians import Gaussians

RADIUS = 0.6  # of objects up to which DISTANCE shows all; cameras of larger ones stand further away
GOLDEN_ANGLE = 180 * (3 - math.sqrt(5))


def surround(gaussians: Gaussians, count: int, offset: float = 0.0) -> Cameras:
    """[1, count] cameras spread evenly over a sphere around the origin (a Fibonacci spiral), looking at it.

    `offset` degrees turn the spiral about the up axis: sets of different counts and offsets share no camera.
    """
    distance = DISTANCE * max(1.0, reach(gaussians) / RADIUS)
    place = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    elevations = torch.rad2deg(torch.asin(1 - 2 * place)).clamp(-80, 80)
    azimuths = offset + GOLDEN_ANGLE * torch.arange(count, dtype=torch.float64)
    poses = [orbit_poses(a[None], float(e), distance) for a, e in zip(azimuths, elevations, strict=True)]
    return Cameras(torch.cat(poses).float()[None], intrinsics_from_fov(torch.full((count,), FOV))[None])


def reach(gaussians: Gaussians, min_opacity: float = 0.1) -> float:
    """Distance from the origin within which 99.5 % of the clearly visible Gaussians of one scene lie."""
    distances = gaussians.means[0, gaussians.opacities[0] >= min_opacity].norm(dim=-1)
    return float(distances.kthvalue(math.ceil(0.995 * len(distances))).values) if len(distances) else 0.0


def psnr(a: Tensor, b: Tensor) -> float:
    """dB between pictures in [0, 1] of the same shape; infinite if they are equal."""
    error = (a.double() - b.double()).square().mean()
    return float(-10 * error.log10())
