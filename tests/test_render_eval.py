"""Evaluation sets: the protocol is on disk, the orbit can be read, and the points lie on what is seen of the object."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")

from orbit_folders import orbit_dataset  # noqa: E402

from ouroboros3d.cli import call, render_eval  # noqa: E402
from ouroboros3d.datagen.assets import Asset  # noqa: E402
from ouroboros3d.datagen.meshes import load_surface  # noqa: E402
from ouroboros3d.datagen.surface import Part, make_surface  # noqa: E402
from ouroboros3d.errors import UserError  # noqa: E402

QUICK = ("--size", 32, "--samples", 2, "--workers", 1)


def run(*arguments) -> int:
    return call(render_eval.main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """Two objects of a test split and one for training: tall boxes whose front (+z) sticks out to the right (+x)."""
    folder = tmp_path_factory.mktemp("assets")
    parts = [
        trimesh.creation.box(bounds=[[-1, -2, -1], [1, 2, 1]]),
        trimesh.creation.box(bounds=[[1, 1, 0], [2, 2, 1]]),
    ]
    mesh = trimesh.util.concatenate(parts)
    mesh.visual.vertex_colors = [200, 50, 50, 255]
    mesh.apply_translation([10, 20, 30])
    mesh.export(folder / "mesh.ply")
    rows = "one,test,mesh.ply\nno,train,mesh.ply\ntwo,test,mesh.ply\n"
    (folder / "assets.csv").write_text("id,split,path\n" + rows)
    return folder


@pytest.fixture(scope="module")
def rendered(assets, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rendered")
    assert run("--assets", assets / "assets.csv", "--out", out, *QUICK, "--elevation", 10) == 0
    return out


def test_the_set_is_complete_and_readable(rendered):
    assert (rendered / "test.txt").read_text() == (rendered / "objects.txt").read_text() == "one\ntwo\n"
    assert sorted(p.name for p in rendered.iterdir() if p.is_dir()) == ["one", "two"]
    item = orbit_dataset(rendered, "test.txt", size=32, start_view=0)[1]
    assert item["id"] == "two" and item["images"].shape == (8, 3, 32, 32)
    with (
        Image.open(rendered / "one/condition.png") as condition,
        Image.open(rendered / "one/render_0000.webp") as first,
    ):
        assert condition.mode == "RGBA"
        np.testing.assert_array_equal(np.array(condition), np.array(first))
    protocol = json.loads((rendered / "protocol.json").read_text())
    expected = {"size": 32, "frames": 16, "elevation": 10.0, "azimuth": -90.0, "fov": 39.598, "distance": 1.7417}
    assert expected.items() <= protocol.items() and protocol["objects"] == 2


def test_the_cameras_are_those_of_every_object(rendered):
    cameras = json.loads((rendered / "cameras.json").read_text())
    meta = json.loads((rendered / "two/meta.json").read_text())
    assert cameras["camera_angle_x"] == meta["camera_angle_x"] and meta["elevation"] == 10
    for frame, location in zip(cameras["frames"], meta["locations"], strict=True):
        assert frame["name"] == location["frames"][0]["name"]
        np.testing.assert_array_equal(frame["transform_matrix"], location["transform_matrix"])
    first = np.array(cameras["frames"][0]["transform_matrix"])[:3, 3]
    np.testing.assert_allclose(
        first, 1.7417 * np.array([0, -np.cos(np.radians(10)), np.sin(np.radians(10))]), atol=1e-12
    )
    assert cameras["frames"][4]["azimuth"] == pytest.approx(0)
    assert cameras["intrinsics_in_image_widths"][0][0] == pytest.approx(1.3889, abs=1e-4)


def test_the_input_view_is_the_front(rendered):
    alpha = np.array(Image.open(rendered / "one/condition.png"))[..., 3] > 127
    top, bottom = alpha[: len(alpha) // 2].sum(0), alpha[len(alpha) // 2 :].sum(0)
    assert top[20:].sum() > bottom[20:].sum() + 10  # the piece at the upper right


def test_points_are_the_surface_in_the_frame_of_the_pictures(rendered):
    points = np.load(rendered / "one/points.npz")["points"]
    assert points.shape == (16384, 3) and points.dtype == np.float32
    fit = json.loads((rendered / "one/meta.json").read_text())["normalisation"]
    file = points / fit["scale"] + fit["centre"]  # z up
    file = np.stack([file[:, 0], file[:, 2], -file[:, 1]], 1) - [10, 20, 30]  # y up
    gaps = []
    for low, high in (([-1, -2, -1], [1, 2, 1]), ([1, 1, 0], [2, 2, 1])):
        middle, half = (np.array(low) + high) / 2, (np.array(high) - low) / 2
        gaps.append(np.abs((np.abs(file - middle) - half).max(1)))  # 0 on the faces of a box
    assert np.min(gaps, 0).max() < 1e-4 and (np.array(gaps) < 1e-4).any(1).all()
    assert np.linalg.norm(points, axis=1).max() <= 0.5 + 1e-6
    assert (points[:, 2].min(), points[:, 2].max()) == pytest.approx((-2 * fit["scale"], 2 * fit["scale"]), abs=1e-6)


def test_points_inside_are_left_out():
    outer, inner = trimesh.creation.box((2, 2, 2)), trimesh.creation.icosphere(2, 0.5)
    surface = make_surface([Part(m.vertices, m.faces) for m in (outer, inner)])
    found = render_eval.visible_points(surface, 1000, seed=0)
    points = found / surface.scale
    np.testing.assert_allclose(np.abs(points).max(1), 1, atol=1e-5)
    assert [(np.abs(points[:, k] - s) < 1e-5).mean() for k in range(3) for s in (-1, 1)] == pytest.approx(
        [1 / 6] * 6, abs=0.05
    )
    np.testing.assert_array_equal(render_eval.visible_points(surface, 1000, seed=0), found)


def test_points_of_the_whole_surface_are_even(assets):
    surface = load_surface(assets / "mesh.ply")
    points = surface.sample(20000, np.random.default_rng(0)) / surface.scale
    share = (np.abs(points[:, 2] - 2) < 1e-6).mean()  # the top: 4 + 1 of 40 + 6
    assert share == pytest.approx(5 / 46, abs=0.01)


def test_objects_are_chosen_by_hash_or_by_list(assets, tmp_path, capsys):
    listed = [Asset(i, "test", None) for i in "abcdef"]
    few = render_eval.choose(listed, 3, None)
    assert len(few) == 3 and few == render_eval.choose(listed[::-1], 3, None) and few != listed[:3]
    assert [a.id for a in render_eval.choose(listed, None, ["d", "a", "d"])] == ["d", "a"]
    with pytest.raises(UserError, match="only 6"):
        render_eval.choose(listed, 7, None)
    (tmp_path / "list.txt").write_text("two\nthree\n")
    arguments = ("--assets", assets / "assets.csv", "--out", tmp_path / "out", *QUICK, "--list", tmp_path / "list.txt")
    assert run(*arguments) == 2 and "'three'" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("two\n")
    assert run(*arguments) == 0 and (tmp_path / "out/test.txt").read_text() == "two\n"
    assert run(*arguments, "--elevation", 20) == 2
    assert "elevation was 0.0 and is now 20.0" in capsys.readouterr().err
