"""Rays, their Plücker coordinates and embedding, and depth to canonical coordinates maps.

The release's two unusual formulas live here by name beside the textbook ones (docs/faithfulness.md, quirks 3 and 7).
Shapes: B batch, V views, H = W = size pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras


def pixel_grid(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel centres of the unit image, (u, v) each [size, size]: u grows along columns, v along rows."""
    centres = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size
    v, u = torch.meshgrid(centres, centres, indexing="ij")
    return u, v


def camera_points(cameras: Cameras, u: Tensor, v: Tensor) -> Tensor:
    """Points at depth 1 behind image positions (u, v) [H, W] in camera axes, [B, V, H, W, 3]."""
    fx, fy, cx, cy = (cameras.K[..., i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    x, y = (u - cx) / fx, (v - cy) / fy
    return torch.stack([x, y, torch.ones_like(x)], dim=-1)


def _rotate(rotation: Tensor, points: Tensor) -> Tensor:
    """[B, V, 3, 3] applied to [B, V, H, W, 3]; by sums and not a matrix product, which autocast or TF32 would round."""
    return (rotation[:, :, None, None] * points[..., None, :]).sum(-1)


def camera_rays(cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """Origins and unit directions in the world through the pixel centres, each [B, V, size, size, 3]."""
    points = camera_points(cameras, *pixel_grid(size, cameras.K))
    directions = _rotate(cameras.c2w[..., :3, :3].to(points.dtype), points)
    origins = cameras.centers.to(points.dtype)[:, :, None, None].expand_as(directions)
    return origins, torch.nn.functional.normalize(directions, dim=-1)


def release_rays(cameras: Cameras, size: int) -> tuple[Tensor, Tensor]:
    """The rays the release's diffusion model was trained with (quirk 3), shapes as `camera_rays`.

    direction = normalise(R^T p - t): the image's rows are taken for x and its columns for y, the pose is applied
    transposed, its translation is not added, and the camera position is subtracted all the same. Origins are right.
    """
    u, v = pixel_grid(size, cameras.K)
    points = camera_points(cameras, v, u)
    origins = cameras.centers.to(points.dtype)[:, :, None, None].expand_as(points)
    directions = _rotate(cameras.c2w[..., :3, :3].mT.to(points.dtype), points) - origins
    return origins, torch.nn.functional.normalize(directions, dim=-1)


def plucker(origins: Tensor, directions: Tensor) -> Tensor:
    """Plücker coordinates (o x d, d), [..., 6] (Sec. 3.1 of the paper)."""
    return torch.cat([torch.linalg.cross(origins, directions), directions], dim=-1)


def plucker_maps(cameras: Cameras, size: int) -> Tensor:
    """[B, V, 6, size, size] Plücker maps of the true rays, the reconstructor's input (LGM, Sec. 3.2)."""
    return plucker(*camera_rays(cameras, size)).permute(0, 1, 4, 2, 3)


def harmonic_embedding(x: Tensor, octaves: int) -> Tensor:
    """[..., C] -> [..., C * (2 * octaves + 1)]: sines, cosines, then x itself, the frequencies 1, 2, 4, ...
    of one number together (NeRF eq. 4 without pi)."""
    frequencies = 2.0 ** torch.arange(octaves, device=x.device, dtype=x.dtype)
    phases = (x[..., None] * frequencies).flatten(-2)
    return torch.cat([phases.sin(), phases.cos(), x], dim=-1)


RAY_CONVENTIONS = {"release": release_rays, "textbook": camera_rays}


def embedded_rays(cameras: Cameras, size: int, octaves: int, convention: str) -> Tensor:
    """[B, V, size, size, 6 * (2 * octaves + 1)]: what a Plücker MLP of the diffusion model sees at one resolution."""
    return harmonic_embedding(plucker(*RAY_CONVENTIONS[convention](cameras, size)), octaves)


def unproject(depth: Tensor, cameras: Cameras) -> Tensor:
    """World points [B, V, 3, H, W] behind the pixel centres at z-depth [B, V, 1, H, W]."""
    u, v = pixel_grid(depth.shape[-1], cameras.c2w)
    return to_world(camera_points(cameras, u, v), depth, cameras.c2w)


def to_world(points: Tensor, depth: Tensor, c2w: Tensor) -> Tensor:
    """c2w (depth * points): [B, V, H, W, 3], [B, V, 1, H, W] -> [B, V, 3, H, W] in the dtype of the pose."""
    points = points.to(c2w.dtype) * depth[:, :, 0, :, :, None].to(c2w.dtype)
    world = _rotate(c2w[..., :3, :3], points) + c2w[..., None, None, :3, 3]
    return world.permute(0, 1, 4, 2, 3)
