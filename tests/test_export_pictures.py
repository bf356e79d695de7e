"""Videos, pictures with cameras, and convert.py: what is written is what another reader finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import full_disk
from PIL import Image

from ouroboros3d.cameras import orbit
from ouroboros3d.cli import call, convert
from ouroboros3d.export import FORMATS, check, options_of, save
from ouroboros3d.export.check import PROOFS, CheckError
from ouroboros3d.export.frames import ExportError
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.files import OutputError
from ouroboros3d.gaussians import Gaussians, save_ply
from ouroboros3d.rendering import render


@pytest.fixture
def object3d() -> Object3D:
    g = torch.Generator().manual_seed(0)
    means = torch.randn(1, 200, 3, generator=g) * 0.15
    quats = torch.nn.functional.normalize(torch.randn(1, 200, 4, generator=g), dim=-1)
    scales = torch.rand(1, 200, 3, generator=g) * 0.05 + 0.02
    gaussians = Gaussians(means, quats, scales, torch.rand(1, 200, generator=g), torch.rand(1, 200, 3, generator=g))
    return Object3D(gaussians, elevation=20.0)


def test_every_format_has_a_proof():
    assert set(PROOFS) >= set(FORMATS.values()) - {".html"}


@pytest.mark.parametrize("ending", [".mp4", ".webp", ".gif", ".png", "_transforms"])
def test_another_reader_finds_the_same_pictures(object3d, tmp_path, ending):
    options = options_of(ending, {"size": 64, "frames": 6, "fps": 12, "faces": 9, "up": None})
    assert "faces" not in options and "up" not in options
    path = save(object3d, tmp_path / f"a{ending}", **options)
    value = check.check(object3d, path, ending, **options)
    assert value >= PROOFS[ending].bound


@pytest.mark.parametrize("ending", [".webp", ".gif"])
def test_animations_have_the_asked_size_and_length(object3d, tmp_path, ending):
    """49 is odd: only h264 needs even sides; 360 / 7 is no round number of degrees."""
    path = save(object3d, tmp_path / f"a{ending}", size=49, frames=7, fps=10)
    with Image.open(path) as image:
        assert image.size == (49, 49) and image.n_frames == 7 and image.info["loop"] == 0
        image.seek(1)
        image.load()
        assert image.info["duration"] == 100


@pytest.mark.parametrize("options", [{"frames": 0}, {"frames": 10**6}, {"size": 1}, {"size": 10**5}, {"fps": 100}])
def test_videos_out_of_range_are_refused(object3d, tmp_path, options):
    with pytest.raises(ExportError, match="frames lie in 1"):
        save(object3d, tmp_path / "a.mp4", **{"size": 16, "frames": 2} | options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".mp4", ".webp", ".gif", ".png", "_transforms"])
def test_a_disk_that_fills_leaves_nothing(object3d, tmp_path, ending):
    with full_disk(500), pytest.raises(OutputError, match="cannot write"):
        save(object3d, tmp_path / f"a{ending}", size=64)
    assert not list(tmp_path.iterdir())


def test_transforms_stand_upright_with_z_up(object3d, tmp_path):
    """Eight cameras 20 degrees above an upright object, the first in front of it, at -y as in Blender."""
    folder = save(object3d, tmp_path / "a_transforms", size=32)
    document = json.loads((folder / "transforms.json").read_text())
    poses = np.array([frame["transform_matrix"] for frame in document["frames"]])
    distance = 1.7417
    np.testing.assert_allclose(poses[:, 2, 3], distance * np.sin(np.radians(20)), atol=1e-5)
    np.testing.assert_allclose(poses[0, :3, 3], [0, -distance * np.cos(np.radians(20)), poses[0, 2, 3]], atol=1e-5)
    np.testing.assert_allclose(poses[:, :3, 2], poses[:, :3, 3] / distance, atol=1e-5)  # looking along -z at 0
    assert (document["w"], document["h"], document["cx"]) == (32, 32, 16.0)
    assert document["fl_x"] == pytest.approx(16 / np.tan(document["camera_angle_x"] / 2), rel=1e-5)


def test_an_objects_own_views_are_what_is_written(object3d, tmp_path):
    cameras = orbit([0, 90], 20.0)
    views = torch.zeros(2, 3, 8, 8)
    views[1, 0] = 1
    own = Object3D(object3d.gaussians, 20.0, cameras=cameras, views=views)
    folder = save(own, tmp_path / "a_transforms")
    assert Image.open(folder / "images" / "001.png").getpixel((3, 3)) == (255, 0, 0)
    save(own, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (16, 8)


def test_a_file_below_the_bound_is_an_error(object3d, tmp_path):
    path = save(object3d, tmp_path / "a.png", size=32)
    Image.effect_noise((128, 64), 50).convert("RGB").save(path)
    with pytest.raises(CheckError, match=r"a\.png: .* dB from its object, the bound of this format is 100 dB"):
        check.check(object3d, path, ".png", size=32)


# ---------------------------------------------------------------- convert.py


@pytest.fixture
def ply(object3d, tmp_path):
    save_ply(tmp_path / "a.ply", object3d.gaussians)
    return tmp_path / "a.ply"


def test_convert_writes_and_proves(ply, tmp_path, capsys):
    pytest.importorskip("gaussforge")
    arguments = ["--to", "splat", "gif", "transforms", "--size", "48", "--frames", "3", "--elevation", "10", "--check"]
    assert call(convert.main, [str(ply), "--out", str(tmp_path / "out"), *arguments]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.splat", "a.gif", "a_transforms"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("dB by" in line and "CPU s" in line for line in lines)


def test_convert_takes_the_elevation_that_the_ply_names(object3d, tmp_path):
    save(object3d, tmp_path / "a.ply")
    assert call(convert.main, [str(tmp_path / "a.ply"), "--out", str(tmp_path / "out"), "--to", "ply", "spz"]) == 0
    assert (tmp_path / "out" / "a.ply").read_bytes() != b""
    save(object3d, tmp_path / "b.spz")
    assert (tmp_path / "out" / "a.spz").stat().st_size == pytest.approx((tmp_path / "b.spz").stat().st_size, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.ply", "--to", "fbx"], ["fbx: not a known format", "splat"]),
        (["a.ply", "--to", "ply"], ["would overwrite the input", "--out"]),
        (["none.ply", "--to", "splat"], ["none.ply: no such file"]),
        (["a.ply", "--to", "gif", "--frames", "0"], ["frames lie in 1"]),
    ],
)
def test_convert_says_in_one_line_what_is_wrong(ply, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert call(convert.main, arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert all(word in message for word in words)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_the_first_picture_shows_the_front(object3d, tmp_path):
    """The orbit of an object without cameras starts where the input camera stood."""
    front = check.posed_pictures(object3d, 32)[1][0]
    expected = render(object3d.gaussians, orbit([0], 0.0), 32).rgb[0, 0].clamp(0, 1)
    torch.testing.assert_close(front, expected, atol=1e-4, rtol=0)
