"""Meshes: surfaces of known densities, colours of known pictures, and the .glb reopened by trimesh."""

from __future__ import annotations

import importlib.util
import json
import math
import struct

import numpy as np
import pytest
import torch
from conftest import full_disk

from ouroboros3d.cameras import orbit
from ouroboros3d.export import check, mesh, save
from ouroboros3d.export.colours import (
    Mesh,
    Pictures,
    bilinear,
    fit_texture,
    fit_vertex_colours,
    render_mesh,
    to_linear,
    to_srgb,
)
from ouroboros3d.export.density import Density, density, surface
from ouroboros3d.export.frames import ExportError
from ouroboros3d.export.glb import glb_bytes
from ouroboros3d.export.mesh import build_mesh, decimate
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.export.rasterizer import rasterize
from ouroboros3d.export.views import psnr, surround
from ouroboros3d.files import OutputError
from ouroboros3d.gaussians import Gaussians

pytest.importorskip("skimage")
pytest.importorskip("fast_simplification")
trimesh = pytest.importorskip("trimesh")

SQUARE = np.array([[-0.3, -0.3, 0.0], [0.3, -0.3, 0.0], [0.3, 0.3, 0.0], [-0.3, 0.3, 0.0]])
TWO_FACES = np.array([[0, 1, 2], [0, 2, 3]])
WHITE = torch.ones(1, 3)


def ball(radius: float = 0.3, count: int = 4000) -> Gaussians:
    """Flat Gaussians on a sphere, red above and blue below."""
    i = torch.arange(count) + 0.5
    polar, azimuth = torch.acos(1 - 2 * i / count), math.pi * (1 + 5**0.5) * i
    normal = torch.stack([azimuth.cos() * polar.sin(), polar.cos(), azimuth.sin() * polar.sin()], -1)
    rgb = torch.where(normal[:, 1:2] > 0, torch.tensor([0.8, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.7]))
    quats = torch.tensor([1.0, 0, 0, 0]).expand(count, 4)
    scales = torch.full((count, 3), 0.012)
    return Gaussians(*(x[None] for x in (radius * normal, quats, scales, torch.full((count,), 0.95), rgb)))


@pytest.fixture
def quick(monkeypatch) -> None:
    """A coarse mesh in seconds."""
    numbers = {"RESOLUTION": 40, "SIZE": 64, "FIT_VIEWS": 12, "TRIAL_VIEWS": 4, "CHOICE_VIEWS": 2, "ISOS": (0.2, 0.5)}
    for name, value in numbers.items():
        monkeypatch.setattr(mesh, name, value)


# ---------------------------------------------------------------- geometry


def test_the_density_of_one_gaussian_is_its_widened_bell():
    one = torch.ones(1, 1)
    g = Gaussians(
        torch.zeros(1, 1, 3), torch.tensor([[[1.0, 0, 0, 0]]]), 0.1 * torch.ones(1, 1, 3), 0.8 * one, WHITE[None]
    )
    field = density(g, 40)
    axes = [field.origin[a] + field.step * np.arange(field.values.shape[a]) for a in range(3)]
    square = sum(np.square(x) for x in np.meshgrid(*axes, indexing="ij"))
    expected = 0.8 * np.exp(-0.5 * square / (0.1**2 + (field.step / 2) ** 2))
    np.testing.assert_allclose(field.values, expected, atol=0.01)


def test_two_gaussians_stop_what_either_lets_through():
    g = ball(count=1)
    two = Gaussians.from_tensor(g.to_tensor().repeat(1, 2, 1))
    once, twice = (density(x, 20).values.max() for x in (g, two))
    assert twice == pytest.approx(1 - (1 - once) ** 2, abs=1e-6)


def test_a_surface_is_closed_outward_filled_and_without_specks():
    axis = np.linspace(-0.5, 0.5, 41)
    distance = np.sqrt(sum(np.square(x) for x in np.meshgrid(axis, axis, axis, indexing="ij")))
    values = np.where((distance < 0.35) & (distance > 0.25), 1, 0).astype(np.float32)  # a hollow ball
    values[1, 1, 1] = 1  # a speck
    made = trimesh.Trimesh(*surface(Density(values, np.full(3, -0.5), 0.025), 0.5), process=False)
    assert made.is_watertight and made.body_count == 1
    assert made.volume == pytest.approx(4 / 3 * math.pi * 0.35**3, rel=0.1)
    np.testing.assert_allclose(made.bounds, [[-0.35] * 3, [0.35] * 3], atol=0.03)


def test_decimation_keeps_the_shape_within_the_count():
    vertices, faces = surface(density(ball(), 64), 0.3)
    few = trimesh.Trimesh(*decimate(vertices, faces, 1000), process=False)
    assert len(faces) > 5000 and 900 <= len(few.faces) <= 1000
    assert few.volume == pytest.approx(trimesh.Trimesh(vertices, faces).volume, rel=0.02)


def test_the_rasterizer_finds_the_nearest_face_and_its_point():
    behind = SQUARE * 2 - [0, 0, 0.2]
    vertices, faces = np.concatenate([behind, SQUARE]), np.concatenate([TWO_FACES, TWO_FACES + 4])
    cameras = orbit([0, 180], 0.0, relative=False)
    hits = rasterize(vertices, faces, cameras, 33)
    assert hits.face[0, 16, 16] in (2, 3) and hits.face[1, 16, 16] in (0, 1) and hits.face[0, 0, 0] == -1
    where = np.nonzero(hits.face[:1] >= 2)
    weights = hits.corner_weights(*where)
    points = (vertices[faces[hits.face[where]]] * weights[..., None]).sum(axis=1)
    focal = 0.5 / math.tan(math.radians(39.598) / 2)
    expected = ((where[2] + 0.5) / 33 - 0.5) / focal * 1.7417
    np.testing.assert_allclose(points[:, 0], expected, atol=1e-5)


# ---------------------------------------------------------------- colours


def test_fitted_vertex_colours_are_those_of_the_pictures():
    vertices, faces = surface(density(ball(), 32), 0.3)
    colours = 0.5 + 0.5 * np.sin(5 * vertices + [0, 1, 2])
    cameras = surround(ball(), 12)
    truth = Mesh(vertices, faces, to_srgb(to_linear(colours)))
    pictures = Pictures(cameras, render_mesh(truth, cameras, 64, supersampling=2).float())
    found = Mesh(vertices, faces, fit_vertex_colours(vertices, faces, pictures))
    others = surround(ball(), 4, offset=40.0)
    assert psnr(render_mesh(found, others, 64), render_mesh(truth, others, 64)) > 35


def test_a_texture_is_sharper_than_its_two_faces():
    uv = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    board = np.indices((8, 8)).sum(axis=0) % 2
    texture = np.repeat(np.kron(board, np.ones((4, 4)))[..., None], 3, axis=2)
    truth = Mesh(SQUARE, TWO_FACES, uv=uv, texture=texture)
    cameras = orbit([-20, 0, 20], 10.0, relative=False)
    pictures = Pictures(cameras, render_mesh(truth, cameras, 96, supersampling=2).float())
    found = Mesh(SQUARE, TWO_FACES, uv=uv, texture=fit_texture(SQUARE, TWO_FACES, uv, 32, pictures))
    flat = Mesh(SQUARE, TWO_FACES, fit_vertex_colours(SQUARE, TWO_FACES, pictures))
    other = orbit([10], 0.0, relative=False)
    wanted = render_mesh(truth, other, 96)
    assert psnr(render_mesh(found, other, 96), wanted) > psnr(render_mesh(flat, other, 96), wanted) + 10


def test_bilinear_lookup_is_exact_at_texel_centres():
    index, weights = bilinear(np.array([[0.375, 0.625], [0.0, 0.0]]), 4)
    assert index[0, 0] == 2 * 4 + 1 and weights[0, 0] == 1
    assert (index[1] == 0).all() and weights[1].sum() == 1


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("texture", [0, 128])
def test_a_glb_shows_the_object_to_another_reader(quick, tmp_path, texture):
    if texture:
        pytest.importorskip("xatlas")
    object3d = Object3D(ball(), elevation=15.0)
    path = save(object3d, tmp_path / "a.glb", faces=2000, texture=texture)
    check.check(object3d, path, ".glb")  # raises below the bound
    (loaded,) = trimesh.load(path, process=False).geometry.values()
    assert len(loaded.faces) <= 2000
    red = loaded.vertices[:, 1].max()  # y up, straightened: the red half was on top of the leaning ball
    assert red == pytest.approx(0.3, abs=0.05)


def test_a_glb_is_unlit_with_linear_colours_of_16_bits():
    half = np.full((4, 3), 0.5)
    content = glb_bytes(Mesh(SQUARE, TWO_FACES, half))
    magic, version, length = struct.unpack("<4sII", content[:12])
    assert (magic, version, length) == (b"glTF", 2, len(content))
    size = struct.unpack("<I", content[12:16])[0]
    document = json.loads(content[20 : 20 + size])
    assert document["materials"][0]["extensions"] == {"KHR_materials_unlit": {}}
    accessor = document["accessors"][document["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    view = document["bufferViews"][accessor["bufferView"]]
    start = 20 + size + 8 + view["byteOffset"]
    stored = np.frombuffer(content[start : start + view["byteLength"]], "<u2").reshape(-1, 4)
    assert accessor["normalized"] and (stored[:, 3] == 65535).all()
    np.testing.assert_allclose(stored[:, 0] / 65535, 0.2140, atol=1e-4)  # sRGB 0.5 in linear light


def test_the_iso_is_the_best_of_the_candidates(quick):
    g = ball()
    field = density(g, mesh.RESOLUTION)
    trial, choice = (Pictures.around(g, Object3D(g).renderer, n, 64, o) for n, o in ((4, 20.0), (2, 100.0)))
    chosen = mesh.choose_iso(g, field, 5000)
    assert mesh._score(field, 5000, trial, choice, chosen) >= mesh._score(field, 5000, trial, choice, 0.2)
    assert mesh._score(field, 5000, trial, choice, chosen) >= mesh._score(field, 5000, trial, choice, 0.5)


def test_what_cannot_be_a_mesh_is_refused(quick, tmp_path, monkeypatch):
    g = ball(count=300)
    faint = Gaussians(g.means, g.quats, g.scales, torch.full_like(g.opacities, 0.03), g.rgb)
    with pytest.raises(ExportError, match="too faint for a mesh"):
        build_mesh(faint)
    with pytest.raises(ExportError, match="at least 100"):
        build_mesh(g, faces=3)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(ExportError, match="a mesh needs scikit-image: pip install scikit-image"):
        save(Object3D(g), tmp_path / "a.glb")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_leaves_no_glb(quick, tmp_path):
    with full_disk(500), pytest.raises(OutputError, match="cannot write"):
        save(Object3D(ball()), tmp_path / "a.glb", faces=500)
    assert not list(tmp_path.iterdir())
