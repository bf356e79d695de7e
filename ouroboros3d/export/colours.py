"""Colours of a mesh, fitted so that its pictures equal given ones: a sparse linear least-squares problem.

A pixel of the mesh's picture is a weighted sum of unknown colours, those of the vertices or texels that its samples
see, and of the white behind. The pictures fix the unknowns that are seen, a small pull towards their neighbours the
others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.export.rasterizer import rasterize
from ouroboros3d.export.views import surround
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Renderer

SUPERSAMPLING = 2  # samples per pixel and axis in a fit
SMOOTHNESS = 0.1  # weight of the difference of two neighbours; that of a fully covered pixel is 1


@dataclass(frozen=True)
class Mesh:
    """Triangles, counter-clockwise from outside, coloured by their vertices or by a texture."""

    vertices: np.ndarray  # [N, 3] world units
    faces: np.ndarray  # [F, 3] int
    colours: np.ndarray | None = None  # [N, 3] sRGB in [0, 1]
    uv: np.ndarray | None = None  # [N, 2] in [0, 1], from the upper left corner of the texture
    texture: np.ndarray | None = None  # [T, T, 3] sRGB in [0, 1]


@dataclass(frozen=True)
class Pictures:
    """The Gaussians as a mesh should show them."""

    cameras: Cameras  # [1, V]
    images: Tensor  # [V, 3, S, S] on white, in [0, 1]

    @classmethod
    def around(cls, gaussians: Gaussians, renderer: Renderer, views: int, size: int, offset: float) -> Pictures:
        cameras = surround(gaussians, views, offset)
        images = [renderer(gaussians, cameras.views([v]), size).rgb[0].clamp(0, 1) for v in range(views)]
        return cls(cameras, torch.cat(images))


def fit_vertex_colours(vertices: np.ndarray, faces: np.ndarray, pictures: Pictures) -> np.ndarray:
    """[N, 3] sRGB in [0, 1]."""
    pixels, face, corners = _samples(vertices, faces, pictures)
    edges = np.unique(np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1), axis=0)
    return _solve(pixels, faces[face], corners, edges, len(vertices), pictures)


def fit_texture(vertices: np.ndarray, faces: np.ndarray, uv: np.ndarray, size: int, pictures: Pictures) -> np.ndarray:
    """[size, size, 3] sRGB in [0, 1], for bilinear lookup."""
    pixels, face, corners = _samples(vertices, faces, pictures)
    texels, weights = bilinear((uv[faces[face]] * corners[..., None]).sum(axis=1), size)
    index = np.arange(size * size).reshape(size, size)
    right = np.stack([index[:, :-1].ravel(), index[:, 1:].ravel()], axis=1)
    down = np.stack([index[:-1].ravel(), index[1:].ravel()], axis=1)
    return _solve(pixels, texels, weights, np.concatenate([right, down]), size * size, pictures).reshape(size, size, 3)


def bilinear(uv: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [n, 4] of the flattened texels around each point of the texture, and their weights."""
    position = uv * size - 0.5
    corner = np.floor(position).astype(np.int64)
    right, down = (position - corner).T
    columns = (corner[:, :1] + [0, 1, 0, 1]).clip(0, size - 1)
    rows = (corner[:, 1:] + [0, 0, 1, 1]).clip(0, size - 1)
    weights = np.stack([(1 - right) * (1 - down), right * (1 - down), (1 - right) * down, right * down], axis=1)
    return rows * size + columns, weights


def _samples(vertices: np.ndarray, faces: np.ndarray, pictures: Pictures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every sample that hits the mesh: its pixel, its face and the weights [n, 3] of the face's corners."""
    size = pictures.images.shape[-1]
    hits = rasterize(vertices, faces, pictures.cameras, size * SUPERSAMPLING)
    view, row, column = np.nonzero(hits.face >= 0)
    pixels = (view * size + row // SUPERSAMPLING) * size + column // SUPERSAMPLING
    return pixels, hits.face[view, row, column], hits.corner_weights(view, row, column)


def _solve(
    pixels: np.ndarray,
    unknowns: np.ndarray,
    weights: np.ndarray,
    neighbours: np.ndarray,
    count: int,
    pictures: Pictures,
) -> np.ndarray:
    """[count, 3]: the colours whose weighted sums, samples of a pixel averaged, come closest to the pictures.

    By conjugate gradients on the normal equations, which are small: every unknown meets some ten others.
    """
    from scipy.sparse import csr_matrix, diags
    from scipy.sparse.linalg import cg

    share = 1 / SUPERSAMPLING**2
    seen, rows = np.unique(pixels, return_inverse=True)
    entries = (share * weights.ravel(), (np.repeat(rows, weights.shape[1]), unknowns.ravel()))
    picture = csr_matrix(entries, (len(seen), count))
    white = 1 - share * np.bincount(rows, minlength=len(seen))
    wanted = pictures.images.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()[seen] - white[:, None]
    pairs = np.repeat(np.arange(len(neighbours)), 2), neighbours.ravel()
    smooth = csr_matrix((np.tile([SMOOTHNESS, -SMOOTHNESS], len(neighbours)), pairs), (len(neighbours), count))
    matrix = (picture.T @ picture + smooth.T @ smooth).tocsr()
    scale = diags(1 / matrix.diagonal().clip(1e-9))
    start = np.full(count, 0.5)
    channels = (picture.T @ wanted).T
    solved = [cg(matrix, b, start, rtol=1e-4, maxiter=200, M=scale)[0] for b in channels]
    return np.stack(solved, axis=1).clip(0, 1)


# ---------------------------------------------------------------- pictures of a mesh


def render_mesh(mesh: Mesh, cameras: Cameras, size: int, supersampling: int = 3) -> Tensor:
    """[V, 3, size, size] unlit on white, as a viewer of glTF draws it: colours are interpolated in linear light."""
    s = supersampling
    hits = rasterize(mesh.vertices, mesh.faces, cameras, size * s)
    where = np.nonzero(hits.face >= 0)
    corners, weights = mesh.faces[hits.face[where]], hits.corner_weights(*where)
    if mesh.texture is None:
        values = to_linear(mesh.colours)[corners]
    else:
        corners, weights = bilinear((mesh.uv[corners] * weights[..., None]).sum(axis=1), mesh.texture.shape[0])
        values = to_linear(mesh.texture.reshape(-1, 3))[corners]
    samples = np.ones((*hits.face.shape, 3), np.float32)
    samples[where] = to_srgb((values * weights[..., None]).sum(axis=1))
    pictures = samples.reshape(-1, size, s, size, s, 3).mean(axis=(2, 4))
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """The inverse of `to_linear`."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clip(0) ** (1 / 2.4) - 0.055)
