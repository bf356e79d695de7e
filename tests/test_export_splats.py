"""Gaussians in the files of splat viewers, reopened by GaussForge (C++; Niantic's own library for .spz)."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_disk
from plyfile import PlyData

from ouroboros3d.cameras import Cameras, orbit
from ouroboros3d.export import WRITERS, FormatError, check_formats, save
from ouroboros3d.export.frames import ExportError, rotation_to_quaternion, turn_degrees, unit_quaternions
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.export.views import psnr
from ouroboros3d.files import OutputError
from ouroboros3d.gaussians import MAX_GAUSSIANS, Gaussians, PlyError, load_ply, ply_frame, save_ply
from ouroboros3d.rendering import render

BOUNDS = {".ply": 90, ".compressed.ply": 50, ".splat": 50, ".spz": 50}  # dB


@pytest.fixture
def object3d() -> Object3D:
    """300 Gaussians with raw quaternions, as the release makes them, seen from 25 degrees above."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(1, 300, 3, generator=g) * 0.15 + torch.tensor([0.05, 0.1, -0.05])
    quats = torch.randn(1, 300, 4, generator=g) * torch.rand(1, 300, 1, generator=g)
    scales = torch.rand(1, 300, 3, generator=g) * 0.04 + 0.005
    opacities = torch.rand(1, 300, generator=g) * 0.9 + 0.05
    return Object3D(Gaussians(means, quats, scales, opacities, torch.rand(1, 300, 3, generator=g)), elevation=25.0)


@pytest.fixture
def cameras() -> Cameras:
    return orbit([20, 140, 260], elevation=15, relative=False)


def reread(path: Path, ending: str) -> Gaussians:
    """The file as GaussForge reads it, in the frame it was written in."""
    gaussforge = pytest.importorskip("gaussforge")
    result = gaussforge.GaussForge().convert(path.read_bytes(), ending.removeprefix("."), "ply")
    copy = path.with_name("reread.ply")
    copy.write_bytes(bytes(result["data"]))
    return load_ply(copy)


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize(("up", "axis"), [("y", (0, 1, 0)), ("-y", (0, -1, 0)), ("z", (0, 0, 1)), ("-z", (0, 0, -1))])
def test_the_top_of_the_object_is_up_in_the_file(up, axis):
    elevation = 25.0
    lean = math.radians(elevation)
    top = torch.tensor([[[0.0, math.cos(lean), math.sin(lean)]]])  # as the input camera sees it
    one = Gaussians(top, torch.tensor([[[1.0, 0, 0, 0]]]), torch.ones(1, 1, 3), torch.ones(1, 1), torch.ones(1, 1, 3))
    turned = one.turned(turn_degrees(up, elevation))
    torch.testing.assert_close(turned.means[0, 0], torch.tensor(axis, dtype=torch.float32), atol=1e-6, rtol=0)


def test_a_turn_moves_covariances_as_it_moves_points(object3d):
    g = unit_quaternions(object3d.gaussians)
    angle = math.radians(37.0)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    turned = g.turned(37.0)
    torch.testing.assert_close(turned.means, g.means @ turn.T)
    torch.testing.assert_close(turned.covariances(), turn @ g.covariances() @ turn.T, atol=1e-7, rtol=1e-4)


def test_unit_quaternions_have_the_covariances_of_the_raw_ones(object3d):
    raw = object3d.gaussians
    unit = unit_quaternions(raw)
    torch.testing.assert_close(unit.quats.norm(dim=-1), torch.ones(1, 300))
    torch.testing.assert_close(unit.covariances(), raw.covariances(), atol=1e-7, rtol=1e-4)
    again = unit_quaternions(unit)
    torch.testing.assert_close(again.quats, unit.quats, atol=1e-6, rtol=0)
    assert torch.equal(again.scales, unit.scales)


def test_every_rotation_has_its_quaternion():
    """Half turns too, where three of the four rows of the outer product vanish."""
    g = torch.Generator().manual_seed(1)
    rotations = torch.linalg.qr(torch.randn(200, 3, 3, generator=g, dtype=torch.float64)).Q
    rotations *= torch.linalg.det(rotations)[:, None, None]
    half_turns = torch.diag_embed(torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double())
    rotations = torch.cat([rotations, half_turns])
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).expand(1, len(rotations), 3)
    found = Gaussians(scales, rotation_to_quaternion(rotations)[None], scales, scales[..., 0], scales)
    expected = rotations @ torch.diag(scales[0, 0].square()) @ rotations.mT
    torch.testing.assert_close(found.covariances()[0], expected)


def test_an_unknown_up_names_the_known_ones(object3d, tmp_path):
    with pytest.raises(ExportError, match="'x': choose from y, -y, z, -z"):
        save(object3d, tmp_path / "a.splat", up="x")


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("up", [None, "z"])
@pytest.mark.parametrize("ending", BOUNDS)
def test_another_reader_finds_the_same_object(object3d, cameras, tmp_path, ending, up):
    default = "y" if ending == ".spz" else "-y"
    path = save(object3d, tmp_path / f"a{ending}", **({} if up is None else {"up": up}))
    back = reread(path, ending).turned(-turn_degrees(up or default, object3d.elevation))
    pictures = [render(g, cameras, 64).rgb for g in (back, object3d.gaussians)]
    assert psnr(*pictures) > BOUNDS[ending]


def test_viewers_take_y_as_down(object3d, tmp_path):
    """The highest point of the upright object has the lowest y in .ply and .splat, the highest in .spz."""
    g = object3d.gaussians.turned(-object3d.elevation)
    highest = g.means[0, :, 1].max()
    for ending, sign in ((".ply", -1), (".compressed.ply", -1), (".splat", -1), (".spz", 1)):
        y = reread(save(object3d, tmp_path / f"a{ending}"), ending).means[0, :, 1] * sign
        if ending == ".ply":
            y = torch.from_numpy(PlyData.read(str(tmp_path / "a.ply"))["vertex"]["y"].copy()) * sign
        torch.testing.assert_close(y.max(), highest, atol=1e-3, rtol=0)


def test_the_most_visible_splat_comes_first(object3d, tmp_path):
    path = save(object3d, tmp_path / "a.splat")
    rows = [struct.unpack("<6f8B", path.read_bytes()[i : i + 32]) for i in range(0, path.stat().st_size, 32)]
    importance = np.array([row[3] * row[4] * row[5] * row[9] / 255 for row in rows])
    assert len(rows) == 300 and (np.diff(importance) <= 0.1 * importance[:-1]).all()


def test_load_ply_finds_back_to_the_canonical_frame(object3d, cameras, tmp_path):
    path = save(object3d, tmp_path / "a.ply", up="z")
    turn, elevation = ply_frame(path)
    assert (turn, elevation) == (65.0, 25.0)
    loaded = load_ply(path)
    torch.testing.assert_close(loaded.means, object3d.gaussians.means, atol=1e-6, rtol=0)
    assert psnr(render(loaded, cameras, 64).rgb, render(object3d.gaussians, cameras, 64).rgb) > 90


def test_the_raw_file_is_the_releases(object3d, tmp_path):
    save(object3d, tmp_path / "a.ply", raw=True)
    save_ply(tmp_path / "b.ply", object3d.gaussians)
    assert (tmp_path / "a.ply").read_bytes() == (tmp_path / "b.ply").read_bytes()
    assert ply_frame(tmp_path / "a.ply") is None


@pytest.mark.parametrize("ending", BOUNDS)
def test_an_object_that_nobody_sees_is_an_empty_file_or_refused(object3d, tmp_path, ending):
    g = object3d.gaussians
    empty = Object3D(Gaussians(g.means, g.quats, g.scales, g.opacities * 0, g.rgb))
    with pytest.raises(ExportError, match="no visible Gaussians"):
        save(empty, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what goes wrong


def test_an_unknown_suffix_names_the_known_ones(object3d, tmp_path):
    with pytest.raises(FormatError) as caught:
        save(object3d, tmp_path / "a.fbx")
    assert all(ending in str(caught.value) for ending in WRITERS)
    with pytest.raises(FormatError, match=r"fbx: not a known format; choose from .*splat"):
        check_formats(["ply", "fbx"])


@pytest.mark.parametrize("ending", BOUNDS)
def test_gaussians_with_nan_are_refused(object3d, tmp_path, ending):
    object3d.gaussians.scales[0, 7, 1] = math.nan
    with pytest.raises(ExportError, match="NaN"):
        save(object3d, tmp_path / f"a{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", BOUNDS)
def test_a_disk_that_fills_keeps_the_old_file_and_no_half(object3d, tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"old")
    with full_disk(1000), pytest.raises(OutputError, match=f"cannot write {path}"):
        save(object3d, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


MESH = "ply\nformat ascii 1.0\nelement vertex 1\n" + "".join(f"property float {a}\n" for a in "xyz")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: f"{MESH}end_header\n0 0 0\n".encode(), "is not a 3D Gaussian .ply"),
        (lambda data: data[:-30], "is not a 3D Gaussian .ply"),
        (lambda data: b"\xff\x00 nothing of the kind", "is not a 3D Gaussian .ply"),
        (lambda data: b"", "is not a 3D Gaussian .ply"),
        (lambda data: data[:-4] + struct.pack("<f", math.nan), "1 of its 300 Gaussians hold NaN"),
        (
            lambda data: data.replace(b"element vertex 300", b"element vertex 10000000"),
            f"holds 10,000,000 Gaussians; at most {MAX_GAUSSIANS:,}",
        ),
        (None, "No such file"),
    ],
    ids=["mesh", "truncated", "text", "empty", "NaN", "many", "missing"],
)
def test_a_bad_ply_is_named_in_one_line(object3d, tmp_path, change, words):
    path = tmp_path / "bad.ply"
    if change:
        save_ply(path, object3d.gaussians)
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(PlyError) as caught:
        load_ply(path)
    assert str(path) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
