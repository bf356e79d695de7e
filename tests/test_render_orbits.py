"""Rendered orbits: pictures agree with their matrices, runs repeat, stop and go on, bad input is reported."""

import csv
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")

from ouroboros3d.data.orbits import OrbitDataset, read_meta, read_rgba  # noqa: E402
from ouroboros3d.data.procedural import random_object  # noqa: E402
from ouroboros3d.data.raycast import Raycaster, load_surface, make_surface, orbit_pose  # noqa: E402

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up
    spec.loader.exec_module(module)
    return module


render_orbits, get_furniture = script("render_orbits"), script("get_furniture")


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["render_orbits", *map(str, arguments)])
    return render_orbits.main()


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    """A folder with one box, 0.4 x 0.6 x 0.8, red above (+y in the file) and blue below."""
    folder = tmp_path_factory.mktemp("assets")
    (folder / "box.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    lines = ["mtllib box.mtl"]
    for half, (name, low, high) in enumerate((("red", 0.0, 0.4), ("blue", -0.4, 0.0))):
        box = trimesh.creation.box(bounds=[[-0.2, low, -0.3], [0.2, high, 0.3]])
        lines += [f"v {x} {y} {z}" for x, y, z in box.vertices] + [f"usemtl {name}"]
        lines += ["f {} {} {}".format(*(face + 1 + 8 * half)) for face in box.faces]
    (folder / "box.obj").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def rendered(assets, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rendered")
    settings = render_orbits.Settings(out, size=48, samples=2, orbits=2, depth=16, seed=3, up="y")
    failure = render_orbits.render_asset(
        render_orbits.Asset("box", "train", assets / "box.obj"), settings, "raycast"
    )[1]
    assert failure is None
    return out


def test_silhouettes_agree_with_the_matrices(rendered):
    corners = np.array([[x, y, z] for x in (-0.2, 0.2) for y in (-0.3, 0.3) for z in (-0.4, 0.4)])
    corners *= 0.5 / np.linalg.norm(corners[0])
    for orbit in ("box_0", "box_1"):
        meta = read_meta(rendered / orbit / "meta.json", 16)
        for name, c2w in zip(meta.names, meta.c2w.numpy(), strict=True):
            rgba = read_rgba(rendered / orbit / name, 48).numpy()
            seen = (corners - c2w[:3, 3]) @ c2w[:3, :3]
            scale = 24 / np.tan(np.radians(meta.fov / 2)) / -seen[:, 2]
            u, v = 24 + seen[:, 0] * scale, 24 - seen[:, 1] * scale
            rows, columns = np.nonzero(rgba[..., 3] > 127)
            assert abs(columns.min() - u.min()) < 1 and abs(columns.max() + 1 - u.max()) < 1
            assert abs(rows.min() - v.min()) < 1 and abs(rows.max() + 1 - v.max()) < 1
            assert rgba[rows.min() + 6, 24, 0] > 80 > rgba[rows.min() + 6, 24, 2]  # red is up
            assert rgba[rows.max() - 6, 24, 2] > 80 > rgba[rows.max() - 6, 24, 0]


def test_orbits_are_what_training_expects(rendered):
    elevations = set()
    for orbit in ("box_0", "box_1"):
        meta = json.loads((rendered / orbit / "meta.json").read_text())
        assert {"elevation", "seed", "source"} <= meta.keys() and -5 <= meta["elevation"] <= 30
        elevations.add(meta["elevation"])
        c2w = read_meta(rendered / orbit / "meta.json", 16).c2w.numpy()
        np.testing.assert_allclose(np.linalg.norm(c2w[:, :3, 3], axis=1), 1.7417)
        azimuth = np.unwrap(np.arctan2(c2w[:, 1, 3], c2w[:, 0, 3]))
        np.testing.assert_allclose(np.degrees(np.diff(azimuth)), 22.5)
        np.testing.assert_allclose(np.degrees(np.arcsin(c2w[:, 2, 3] / 1.7417)), meta["elevation"])
        np.testing.assert_allclose(-c2w[:, :3, 2] * 1.7417, -c2w[:, :3, 3])  # looks at the origin
    assert len(elevations) == 2
    (rendered / "train.txt").write_text("box_0\nbox_1\n")
    item = OrbitDataset(rendered, size=48, load_depth=True, load_alpha=True)[0]
    assert item["depth"].shape == (8, 1, 16, 16)
    assert ((item["depth"] > 0).float().mean() - item["alpha"].mean()).abs() < 0.02


def test_depth_lies_on_the_surface():
    quad = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1.0]])
    surface = make_surface([{"vertices": quad, "faces": [[0, 1, 2], [0, 2, 3]], "colour": [1, 1, 1, 1]}])
    depth = Raycaster(surface).depth(orbit_pose(0, 0), 16)
    np.testing.assert_allclose(depth[depth > 0], 1.7417, atol=1e-5)  # along the axis, not along the ray


def test_textures_stand_upright_and_holes_are_holes():
    quad = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1.0]])
    texture = np.ones((8, 8, 4), np.float32)
    texture[:4, :, 1:3] = 0  # the upper half is red,
    texture[4:, :4, 3] = 0  # a quarter, below and left, is cut out
    part = {"vertices": quad, "faces": [[0, 1, 2], [0, 2, 3]], "colour": [1, 1, 1, 1], "texture": texture}
    part["uv"] = [[0, 0], [1, 0], [1, 1], [0, 1]]
    image = Raycaster(make_surface([part])).render(orbit_pose(0, 0), 32)
    assert image[10, 12, 0] > 100 > image[10, 12, 1] and image[10, 12, 3] == 255
    assert image[22, 22, 1] > 100 and image[22, 12, 3] == 0


def test_runs_repeat_and_skip_what_is_finished(assets, tmp_path, monkeypatch, capsys):
    settings = ("--size", 16, "--orbits", 1, "--samples", 1, "--workers", 1)
    for out in ("a", "b"):
        assert run(monkeypatch, "--assets", assets, "--out", tmp_path / out, *settings) == 0
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 16 + 1 + 3
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    marked, lost = tmp_path / "a/box_0/render_0001.webp", tmp_path / "b/box_0"
    marked.write_bytes(b"mine")
    (lost / "meta.json").unlink()  # was not finished
    (lost / "render_0001.webp").unlink()
    for out in ("a", "b"):
        assert run(monkeypatch, "--assets", assets, "--out", tmp_path / out, *settings) == 0
    assert marked.read_bytes() == b"mine" and (lost / "render_0001.webp").is_file()
    assert not list(tmp_path.rglob("*.part"))


def test_broken_assets_are_reported_and_others_go_on(assets, tmp_path, monkeypatch):
    (tmp_path / "broken.obj").write_text("v 0 0\nf 1 2 nonsense\n")
    (tmp_path / "empty.obj").write_text("v 0 0 0\n")
    with open(tmp_path / "assets.csv", "w", newline="") as file:
        rows = [
            ("broken", "train", "broken.obj"),
            ("empty", "train", "empty.obj"),
            ("gone", "val", "gone.obj"),
        ]
        csv.writer(file).writerows([("id", "split", "path"), *rows, ("box", "test", assets / "box.obj")])
    out = tmp_path / "out"
    arguments = (
        "--assets",
        tmp_path / "assets.csv",
        "--out",
        out,
        "--size",
        16,
        "--orbits",
        1,
        "--workers",
        1,
    )
    assert run(monkeypatch, *arguments) == 0
    assert (out / "test.txt").read_text() == "box_0\n" and (out / "train.txt").read_text() == ""
    failures = (out / "failures.txt").read_text()
    assert all(name in failures for name in ("broken", "empty", "gone")) and "box" not in failures
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["box_0"]


def test_procedural_objects_repeat_and_fit():
    for number in range(12):
        surface = random_object(0, number)
        assert np.linalg.norm(surface.vertices[np.unique(surface.faces)], axis=1).max() <= 0.5 + 1e-9
        np.testing.assert_array_equal(surface.vertices, random_object(0, number).vertices)
    assert len(random_object(0, 1).vertices) != len(random_object(1, 1).vertices)


@pytest.mark.parametrize(
    "arguments", [["--assets", "nowhere.csv"], ["--procedural", "0"], ["--assets", "."], []]
)
def test_bad_input_ends_with_one_line_and_status_2(arguments, tmp_path):
    command = [sys.executable, str(SCRIPTS / "render_orbits.py"), *arguments, "--out", str(tmp_path / "out")]
    environment = {"PYTHONPATH": str(SCRIPTS.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error:" in done.stderr or len(done.stderr.strip().splitlines()) == 1


def test_unzip_stays_in_its_folder(tmp_path):
    for member in ("../outside.txt", "a/../../outside.txt"):
        with zipfile.ZipFile(tmp_path / "bad.sh3f", "w") as file:
            file.writestr("good.txt", "x")
            file.writestr(member, "x")
        with pytest.raises(OSError, match="leads out"):
            get_furniture.safe_unzip(tmp_path / "bad.sh3f", tmp_path / "inner" / "target")
    assert not list(tmp_path.rglob("outside.txt")) and not list(tmp_path.rglob("good.txt"))


def test_committed_split_keeps_variants_together_and_names_licences():
    with open(SCRIPTS / "furniture_split.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 450 and all(row["creator"] and row["licence"] for row in rows)
    splits = {}
    for row in rows:
        entry = get_furniture.Entry(
            row["id"], row["name"], "", row["creator"], row["catalogue"], row["model"], (1, 1, 1), True
        )
        assert splits.setdefault(get_furniture.variant_group(entry), row["split"]) == row["split"]
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")}
    assert counts["test"] == 46 and counts["val"] == 10


def test_meshes_of_other_formats_load(tmp_path):
    trimesh.creation.icosphere(subdivisions=1).export(tmp_path / "ball.ply")
    trimesh.creation.icosphere(subdivisions=1).export(tmp_path / "ball.glb")
    for name in ("ball.ply", "ball.glb"):
        image = Raycaster(load_surface(tmp_path / name)).render(orbit_pose(0, 0), 16, 1)
        assert image[8, 8, 3] == 255 and image[0, 0, 3] == 0
