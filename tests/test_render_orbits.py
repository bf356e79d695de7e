"""Rendered orbits: pictures agree with their matrices, runs repeat, stop and go on, bad input is reported."""

import csv
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")

from orbit_folders import orbit_dataset  # noqa: E402

from ouroboros3d.cli import call, get_furniture, render_orbits  # noqa: E402
from ouroboros3d.data.orbit_files import read_meta, read_rgba  # noqa: E402
from ouroboros3d.datagen import orbit_renderer as render  # noqa: E402
from ouroboros3d.datagen import workers  # noqa: E402
from ouroboros3d.datagen.assets import Asset, Findings, hold_out, open_assets, safe_unzip  # noqa: E402
from ouroboros3d.datagen.meshes import load_surface  # noqa: E402
from ouroboros3d.datagen.polygons import triangulate  # noqa: E402
from ouroboros3d.datagen.procedural import random_object  # noqa: E402
from ouroboros3d.datagen.raycast import Raycaster, orbit_pose  # noqa: E402
from ouroboros3d.datagen.surface import Material, Part, Texture, make_surface  # noqa: E402
from ouroboros3d.errors import UserError  # noqa: E402

SCRIPTS = Path(__file__).parents[1] / "scripts"


def run(monkeypatch, *arguments) -> int:
    return call(render_orbits.main, [str(a) for a in arguments])


QUICK = ("--size", 16, "--orbits", 1, "--samples", 1, "--workers", 1)
SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"


def warnings_of(path: Path) -> list[str]:
    findings = Findings()
    load_surface(path, findings=findings)
    return list(findings.warnings)


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
    settings = render.Settings(out, size=48, samples=2, depth=16, seed=3)
    outcome = render.render_asset(Asset("box", "train", assets / "box.obj"), settings)
    assert outcome.failure is None and outcome.views == 32 and not outcome.warnings
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
        assert meta["seed"] == 3 and -5 <= meta["elevation"] <= 30
        elevations.add(meta["elevation"])
        c2w = read_meta(rendered / orbit / "meta.json", 16).c2w.numpy()
        np.testing.assert_allclose(np.linalg.norm(c2w[:, :3, 3], axis=1), 1.7417)
        azimuth = np.unwrap(np.arctan2(c2w[:, 1, 3], c2w[:, 0, 3]))
        np.testing.assert_allclose(np.degrees(np.diff(azimuth)), 22.5)
        np.testing.assert_allclose(np.degrees(np.arcsin(c2w[:, 2, 3] / 1.7417)), meta["elevation"])
        np.testing.assert_allclose(-c2w[:, :3, 2] * 1.7417, -c2w[:, :3, 3])  # looks at the origin
    assert len(elevations) == 2
    (rendered / "train.txt").write_text("box_0\nbox_1\n")
    item = orbit_dataset(rendered, size=48, depth=True)[0]
    assert item["depth"].shape == (8, 1, 16, 16)
    assert ((item["depth"] > 0).float().mean() - item["alpha"].mean()).abs() < 0.02


def test_depth_lies_on_the_surface():
    quad = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1.0]])
    surface = make_surface([Part(quad, np.array([[0, 1, 2], [0, 2, 3]]))])
    depth = Raycaster(surface).depth(orbit_pose(0, 0), 16)
    np.testing.assert_allclose(depth[depth > 0], 1.7417, atol=1e-5)  # along the axis, not along the ray


def test_textures_stand_upright_and_holes_are_holes():
    quad = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1.0]])
    texture = np.full((8, 8, 4), 255, np.uint8)
    texture[:4, :, 1:3] = 0  # the upper half is red,
    texture[4:, :4, 3] = 0  # a quarter, below and left, is cut out
    base = Texture(texture, np.array([[0, 0], [1, 0], [1, 1], [0, 1]]))
    part = Part(quad, np.array([[0, 1, 2], [0, 2, 3]]), Material(base=base))
    image = Raycaster(make_surface([part])).render(orbit_pose(0, 0), 32)
    assert image[10, 12, 0] > 100 > image[10, 12, 1] and image[10, 12, 3] == 255
    assert image[22, 22, 1] > 100 and image[22, 12, 3] == 0


def test_meta_says_where_an_orbit_comes_from(rendered, assets):
    meta = json.loads((rendered / "box_0/meta.json").read_text())
    assert meta["renderer"] == "light" and "embreex" in meta["renderer_version"] and meta["samples"] == 2
    assert meta["source"] == "box.obj" and meta["warnings"] == []
    done = subprocess.run(["sha256sum", assets / "box.obj"], capture_output=True, text=True)
    assert meta["source_sha256"] == done.stdout.split()[0]
    assert meta["fill"] == pytest.approx(0.8325, abs=1e-4) and meta["camera_angle_x"] == pytest.approx(
        0.69112, abs=1e-5
    )
    back = read_meta(rendered / "box_0/meta.json", 16).c2w[0, :3, 2].numpy()
    azimuth, elevation = np.radians([meta["azimuth"], meta["elevation"]])
    expected = [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
    np.testing.assert_allclose(back, expected, atol=1e-12)
    surface, fit = load_surface(assets / "box.obj"), meta["normalisation"]
    corner = np.array([0.2, -0.3, 0.4])  # x, y, z of the file are x, z, -y of the world
    world = fit["scale"] * (corner - fit["centre"])
    assert np.linalg.norm(surface.vertices - world, axis=1).min() < 1e-9 and np.linalg.norm(world) == pytest.approx(0.5)


def test_fill_is_the_share_of_the_picture(tmp_path):
    trimesh.creation.icosphere(subdivisions=3).export(tmp_path / "ball.ply")
    asset = Asset("ball", "train", tmp_path / "ball.ply")
    for fill, fov, distance in ((0.5, 39.598, 1.7417), (0.9, 60.0, 3.0)):
        settings = render.Settings(tmp_path, size=64, fill=fill, fov=fov, distance=distance)
        rgba = render.OpenAsset.load(asset, settings).scene.render(orbit_pose(20, 10, distance), 64, 3, fov)
        assert np.ptp(np.nonzero(rgba[..., 3].max(0) > 127)) + 1 == pytest.approx(64 * fill, abs=1.1)


def test_runs_repeat_and_skip_what_is_finished(assets, tmp_path, monkeypatch):
    for out in ("a", "b"):
        assert run(monkeypatch, "--assets", assets, "--out", tmp_path / out, *QUICK) == 0
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 16 + 1 + 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    marked, lost = tmp_path / "a/box_0/render_0001.webp", tmp_path / "b/box_0"
    marked.write_bytes(b"mine")
    (lost / "meta.json").unlink()  # was not finished
    (lost / "render_0001.webp").unlink()
    for out in ("a", "b"):
        assert run(monkeypatch, "--assets", assets, "--out", tmp_path / out, *QUICK) == 0
    assert marked.read_bytes() == b"mine" and (lost / "render_0001.webp").is_file()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_killed_run_leaves_nothing_half_done_and_continues(tmp_path, monkeypatch):
    arguments = ("--procedural", 4, *QUICK)
    assert run(monkeypatch, *arguments, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"

    original = Image.Image.save

    def save(image, path, *args, **kwargs):
        if "procedural_000002" in str(path) and "0007" in str(path):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)  # its worker must not outlive it
        original(image, path, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    process = get_context("fork").Process(target=render_orbits.main, args=([*map(str, arguments), "--out", str(out)],))
    alive, held = os.pipe()
    process.start()
    os.close(held)  # so that the run and its workers alone have it
    process.join()
    ended, _, _ = select.select([alive], [], [], 20)
    os.close(alive)
    monkeypatch.setattr(Image.Image, "save", original)
    assert ended
    assert process.exitcode == -signal.SIGKILL and len(list(out.glob(".tmp-*"))) == 1
    complete = sorted(p for p in out.iterdir() if p.name.startswith("procedural"))
    assert [p.name for p in complete] == ["procedural_000000_0", "procedural_000001_0"]
    assert all(len(list(p.iterdir())) == 17 for p in complete)
    for hidden in out.glob(".tmp-*"):
        os.utime(hidden, (0, 0))  # as if an hour had passed
    stamps = {p: (p / "meta.json").stat().st_mtime_ns for p in complete}
    assert run(monkeypatch, *arguments, "--out", out) == 0
    assert stamps == {p: (p / "meta.json").stat().st_mtime_ns for p in complete}
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    whole = tmp_path / "whole"
    assert files == {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}


def test_other_options_into_the_same_folder_are_refused(assets, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "--assets", assets, "--out", tmp_path, *QUICK) == 0
    assert run(monkeypatch, "--assets", assets, "--out", tmp_path, *QUICK, "--seed", 1) == 2
    assert "error: " in (err := capsys.readouterr().err) and "seed was 0 and is now 1" in err


def test_shards_are_disjoint_and_complete(tmp_path, monkeypatch, capsys):
    arguments = ("--procedural", 5, "--out", tmp_path, *QUICK)
    assert run(monkeypatch, *arguments, "--shard", "0/2") == 0
    first = {p.name for p in tmp_path.glob("procedural*")}
    assert run(monkeypatch, *arguments, "--shard", "1/2") == 0
    both = {p.name for p in tmp_path.glob("procedural*")}
    assert len(first) == 3 and len(both) == 5 and not (tmp_path / "train.txt").exists()
    stamp = (tmp_path / "procedural_000000_0/meta.json").stat().st_mtime_ns
    assert run(monkeypatch, *arguments) == 0
    assert sorted((tmp_path / "train.txt").read_text().split()) == sorted(both)
    assert stamp == (tmp_path / "procedural_000000_0/meta.json").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments, "--shard", "2/2")
    assert "from 0 to n - 1" in capsys.readouterr().err


def test_lists_keep_what_another_run_finished(assets, tmp_path, monkeypatch):
    with open(tmp_path / "assets.csv", "w", newline="") as file:
        rows = [("a", "train", assets / "box.obj"), ("b", "test", assets / "box.obj")]
        csv.writer(file).writerows([("id", "split", "path"), *rows])
    for split in ("train", "test"):
        arguments = ("--assets", tmp_path / "assets.csv", "--out", tmp_path / "out", *QUICK, "--split", split)
        assert run(monkeypatch, *arguments) == 0
    assert [(tmp_path / f"out/{s}.txt").read_text() for s in ("train", "val", "test")] == ["a_0\n", "", "b_0\n"]


def bad_assets(folder: Path) -> dict[str, tuple[str, str]]:
    """File name -> contents and what the failures file must say."""
    triangle = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
    return {
        "broken.obj": ("v 0 0 0\nf 1 2 nonsense\n", "cannot be read"),
        "empty.obj": ("v 0 0 0\n", ""),
        "point.obj": ("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "one point"),
        "line.obj": ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "nothing is to be seen"),
        "nan.obj": (triangle.replace("v 1 0", "v nan 0"), "not a finite number"),
        "text.glb": ("this is no glb", "cannot be read"),
        "range.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "outside the range"),
        "endless.obj": (triangle.replace("v 1 0", "v 1e200 0"), "too large"),
        "many.obj": (triangle + "f 1 2 3\n" * 10, "more than the limit of 8"),
        "model.fbx": ("Kaydara", "--backend blender"),
    }


def test_bad_assets_are_reported_and_others_go_on(assets, tmp_path, monkeypatch):
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "good.obj").write_text((assets / "box.obj").read_text().partition("f ")[0] + "f 1 2 3\n")
    bad = bad_assets(folder)
    for name, (text, _) in bad.items():
        (folder / name).write_text(text)
    out = tmp_path / "out"
    assert run(monkeypatch, "--assets", folder, "--out", out, *QUICK, "--max_faces", 8) == 0
    reasons = dict(line.split("\t", 1) for line in (out / "failures.txt").read_text().splitlines())
    assert reasons.keys() == {Path(name).stem for name in bad}
    for name, (_, reason) in bad.items():
        assert reason in reasons[Path(name).stem] and name in reasons[Path(name).stem]
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["good_0"]
    assert (out / "train.txt").read_text() == "good_0\n"
    (folder / "good.obj").unlink()
    assert run(monkeypatch, "--assets", folder, "--out", tmp_path / "none", *QUICK, "--max-faces", 8) == 2


def test_an_asset_that_is_gone_fails_alone(assets, tmp_path, monkeypatch):
    with open(tmp_path / "assets.csv", "w", newline="") as file:
        rows = [("gone", "val", "gone.obj"), ("box", "test", assets / "box.obj")]
        csv.writer(file).writerows([("id", "split", "path"), *rows])
    out = tmp_path / "out"
    assert run(monkeypatch, "--assets", tmp_path / "assets.csv", "--out", out, *QUICK) == 0
    assert "no such file" in (out / "failures.txt").read_text() and (out / "test.txt").read_text() == "box_0\n"


def test_whatever_a_reader_trips_over_is_one_failure(tmp_path, monkeypatch):
    def trip(*_):
        raise ZeroDivisionError("an odd file")

    monkeypatch.setitem(render.BACKENDS, "light", trip)
    outcome = render.render_asset(Asset("x", "train", tmp_path / "x.obj"), render.Settings(tmp_path))
    assert outcome.failure == f"{tmp_path / 'x.obj'}: ZeroDivisionError: an odd file"


def crash_on_b(asset: Asset) -> render.Outcome:
    if asset.id == "b":
        os._exit(1)
    time.sleep(0.05)
    return render.Outcome(asset, views=1)


def test_a_process_that_dies_is_one_failure():
    outcomes = list(render.run_all(crash_on_b, [Asset(i, "train", None) for i in "abcdef"], workers=2))
    assert sorted(o.asset.id for o in outcomes) == list("abcdef")
    assert {o.asset.id: "process died" in (o.failure or "") for o in outcomes if o.failure} == {"b": True}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_ends_the_run_and_keeps_what_is_whole(code, tmp_path, monkeypatch, capsys):
    original = Image.Image.save

    def save(image, path, *args, **kwargs):
        original(image, path, *args, **kwargs)
        if "procedural_000001" in str(path) and "0005" in str(path):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Image.Image, "save", save)
    assert run(monkeypatch, "--procedural", 4, "--out", tmp_path, *QUICK) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and str(tmp_path) in error[0] and os.strerror(code) in error[0]
    folders = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert folders and all(len(list(p.iterdir())) == 17 for p in folders)
    assert "procedural_000001_0" not in {p.name for p in folders}
    monkeypatch.setattr(Image.Image, "save", original)
    assert run(monkeypatch, "--procedural", 4, "--out", tmp_path, *QUICK) == 0
    assert len((tmp_path / "train.txt").read_text().split()) == 4


def test_huge_and_inside_out_objects_look_like_any_other():
    box = trimesh.creation.box((1, 2, 3))

    def picture(vertices, faces):
        return Raycaster(make_surface([Part(vertices, faces)])).render(orbit_pose(30, 20), 32, 2)

    plain = picture(box.vertices, box.faces)
    np.testing.assert_array_equal(plain, picture(box.vertices, box.faces[:, ::-1]))
    far = picture(box.vertices * 1e9 + [3e9, -1e9, 0], box.faces).astype(int)
    assert (plain[..., 3] > 0).mean() > 0.1 and np.abs(far - plain).max() <= 2
    assert np.abs(picture(box.vertices * 1e-9, box.faces).astype(int) - plain).max() <= 2


def test_polygons_keep_their_notches(tmp_path):
    outline = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (0, 3)]  # an angular C
    for axes in ("x y 0", "0 x y", "y 0 x"):
        rows = ["v " + axes.replace("x", str(x)).replace("y", str(y)) for x, y in outline]
        for order in (range(1, 9), range(8, 0, -1)):
            (tmp_path / "c.obj").write_text("\n".join([*rows, "f " + " ".join(map(str, order))]) + "\n")
            surface = load_surface(tmp_path / "c.obj", up="z")
            assert surface.face_areas().sum() / surface.scale**2 == pytest.approx(7)
    flat = np.array([(x, y, 0.0) for x, y in outline])
    on_an_edge = np.insert(flat, 1, flat[0] * 0.5 + flat[1] * 0.5, 0)
    for outline in (on_an_edge, on_an_edge[::-1]):
        _, cut = triangulate(outline[None])
        a, b, c = (outline[cut[:, k]] for k in range(3))
        turns = np.cross(b - a, c - a)[:, 2]  # the outline's own winding
        assert abs(turns.sum()) == pytest.approx(14) and (turns * np.sign(turns.sum()) >= -1e-9).all()


def test_a_missing_texture_is_a_warning_and_leaves_the_plain_colour(tmp_path, monkeypatch, capsys):
    (tmp_path / "sign.obj").write_text(f"mtllib sign.mtl\n{SQUARE}usemtl paint\nf 1/1 2/2 3/3 4/4\n")
    unused = "newmtl unused\nmap_Kd nobody.png\n"
    (tmp_path / "sign.mtl").write_text(f"{unused}newmtl paint\nKd 0 1 0\nmap_Kd gone.png\n")
    assert run(monkeypatch, "--assets", tmp_path, "--out", tmp_path / "out", *QUICK) == 0
    warning = (tmp_path / "out/warnings.txt").read_text()
    assert warning == "sign\tmaterial 'paint': texture 'gone.png' is missing\n"
    assert "1 have warnings" in capsys.readouterr().out
    rgba = load_surface(tmp_path / "sign.obj").materials[0].colour
    np.testing.assert_allclose(rgba, [0, 1, 0, 1])
    (tmp_path / "gone.png").write_bytes(b"no picture")
    assert run(monkeypatch, "--assets", tmp_path, "--out", tmp_path / "out", *QUICK) == 0  # finished, still said
    assert (tmp_path / "out/warnings.txt").read_text() == warning
    assert warnings_of(tmp_path / "sign.obj") == ["material 'paint': texture 'gone.png' is no picture that can be read"]
    (tmp_path / "sign.mtl").unlink()
    assert warnings_of(tmp_path / "sign.obj") == ["material file 'sign.mtl' is missing"]


def test_a_run_ends_with_the_features_it_met_and_a_sheet(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.obj").write_text(f"{SQUARE}usemtl gone\nf 1 2 3\nl 1 2\n")
    (tmp_path / "b.gltf").write_text('{"asset": {"version": "2.0"}, "extensionsRequired": ["VENDOR_magic"]}')
    arguments = ("--assets", tmp_path, "--out", tmp_path / "out", *QUICK, "--sheet")
    for _ in range(2):  # what is finished counts too
        assert run(monkeypatch, *arguments) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["feature", "objects", "rendered", "approximated", "refused"] in lines
        assert ["lines", "1", "0", "1", "0"] in lines and ["VENDOR_magic", "1", "0", "0", "1"] in lines
    with Image.open(tmp_path / "out/sheet.webp") as sheet:
        assert sheet.size == (96, 96)
        assert np.abs(np.asarray(sheet)[0, 50].astype(int) - (235, 140, 0)).max() < 30


def hungry(asset: Asset) -> render.Outcome:
    return render.render_asset(asset, render.Settings(Path(asset.source)))


def test_memory_that_is_not_there_is_one_failure(tmp_path, monkeypatch):
    pytest.importorskip("resource")
    monkeypatch.setattr(workers, "limit_memory", lambda most: None)

    def greedy(*_):
        raise MemoryError

    monkeypatch.setitem(render.BACKENDS, "light", greedy)
    (outcome,) = render.run_all(hungry, [Asset("a", "train", tmp_path / "a.obj", source=str(tmp_path))], workers=1)
    assert "not enough memory" in outcome.failure


def test_textures_are_found_where_scans_keep_them(tmp_path):
    (tmp_path / "Shoe/meshes").mkdir(parents=True)
    (tmp_path / "Shoe/materials/textures").mkdir(parents=True)
    obj = tmp_path / "Shoe/meshes/model.obj"
    obj.write_text(f"mtllib model.mtl\n{SQUARE}usemtl m\nf 1/1 2/2 3/3 4/4\n")
    (tmp_path / "Shoe/meshes/model.mtl").write_text("newmtl m\nmap_Kd -s 1 1 1 texture.png\n")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "Shoe/materials/textures/texture.png")
    assert warnings_of(obj) == []
    np.testing.assert_array_equal(load_surface(obj).materials[0].base.pixels[0, 0], [255, 0, 0, 255])
    with open_assets(tmp_path) as assets:
        assert [(a.id, a.path, a.source) for a in assets] == [("Shoe", obj, "Shoe/meshes/model.obj")]
    (tmp_path / "secret.png").write_bytes((tmp_path / "Shoe/materials/textures/texture.png").read_bytes())
    (tmp_path / "Shoe/meshes/model.mtl").write_text("newmtl m\nmap_Kd ../../secret.png\n")
    assert len(warnings_of(obj)) == 1  # outside of the object's own folders


def test_colours_of_vertices_faces_and_gltf_factors(tmp_path):
    def colour(mesh: trimesh.Trimesh, name: str) -> np.ndarray:
        mesh.export(tmp_path / name)
        return Raycaster(load_surface(tmp_path / name)).render(orbit_pose(20, 60), 16, 2)[8, 8] / 255

    box = trimesh.creation.box()
    box.visual.vertex_colors = [255, 0, 0, 255]
    red = colour(box, "vertex.ply")
    assert red[0] > 0.7 and red[1] < 0.1
    assert colour(box, "vertex.glb")[0] > 0.7
    box = trimesh.creation.box()
    box.visual.face_colors = [0, 0, 255, 255]
    assert colour(box, "face.ply")[2] > 0.7
    half = trimesh.visual.material.PBRMaterial(baseColorFactor=[55, 55, 55, 10])  # of light; opaque as it says no more
    box = trimesh.creation.box()
    box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((8, 2)), material=half)
    box.export(tmp_path / "half.glb")
    colour = load_surface(tmp_path / "half.glb").materials[0].colour
    np.testing.assert_allclose(colour, [0.502, 0.502, 0.502, 1], atol=0.01)


def test_lists_and_zip_files_name_the_same_assets_as_folders(assets, tmp_path):
    inside = tmp_path / "set/sub dir"
    inside.mkdir(parents=True)
    for name in ("box.obj", "box.mtl"):
        (inside / name).write_bytes((assets / name).read_bytes())
    (tmp_path / "set/.hidden.obj").write_text("")
    with zipfile.ZipFile(tmp_path / "set.sh3f", "w") as file:
        for name in ("box.obj", "box.mtl"):
            file.write(inside / name, f"/sub dir/{name}")
    with open_assets(tmp_path / "set") as folder, open_assets(tmp_path / "set.sh3f") as zipped:
        assert [a.id for a in folder] == [a.id for a in zipped] == ["sub-dir_box"]
        assert folder[0].source == zipped[0].source == "sub dir/box.obj"
        one, two = (load_surface(a[0].path) for a in (folder, zipped))
        np.testing.assert_array_equal([m.colour for m in one.materials], [m.colour for m in two.materials])
        unpacked = zipped[0].path
    assert not unpacked.exists()
    (tmp_path / "list.txt").write_text("# two\n\nset/sub dir/box.obj\n/elsewhere/chair.glb  # not here\n")
    with open_assets(tmp_path / "list.txt", split="test") as listed:
        assert [(a.id, a.split, a.source) for a in listed] == [
            ("box", "test", "set/sub dir/box.obj"),
            ("chair", "test", "chair.glb"),
        ]


def test_assets_without_splits_get_a_validation_list(assets, tmp_path, monkeypatch):
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    for name in ("a.obj", "b.obj", "c.obj", "d.obj"):
        (folder / name).write_text(SQUARE + "f 1 2 3\n")
    (folder / "d.obj").write_text("")  # by its hash it would come first
    assert run(monkeypatch, "--assets", folder, "--out", out, *QUICK) == 0
    lists = {name: (out / f"{name}.txt").read_text().split() for name in ("train", "val", "test")}
    assert lists == {"train": ["a_0", "b_0"], "val": ["c_0"], "test": []}
    assert orbit_dataset(out, "val.txt", size=16)[0]["id"] == "c_0"
    assert run(monkeypatch, "--assets", folder, "--out", out, *QUICK, "--val_share", 0) == 0
    assert len((out / "train.txt").read_text().split()) == 3
    with pytest.raises(SystemExit):
        run(monkeypatch, "--assets", folder, "--out", out, *QUICK, "--val_share", 1)


def test_the_share_that_is_held_out():
    many = [Asset(f"object {i}", "", None) for i in range(2000)]
    few, more = ({a.id for a in hold_out(many, share) if a.split == "val"} for share in (0.02, 0.1))
    assert 20 < len(few) < 60 and 150 < len(more) < 250 and few < more
    assert {a.id for a in hold_out(many[::-1], 0.02) if a.split == "val"} == few
    assert few & {a.id for a in many[:1000]} == {a.id for a in hold_out(many[:1000], 0.02) if a.split == "val"}
    assert [a.split for a in hold_out([Asset("a", "", None), Asset("b", "test", None)], 0.5)] == ["train", "test"]
    assert [a.split for a in hold_out(many[:1], 0.5)] == ["train"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "id,path\nx,a.obj\nx,b.obj\n", "occurs twice"),
        ("a.csv", "id,path\n../x,a.obj\n", "no name for a folder"),
        ("a.csv", "id,path\nx y,a.obj\n", "no name for a folder"),
        ("a.csv", "id,path,split\nx,a.obj,exam\n", "split 'exam'"),
        ("a.csv", "name\nx\n", "columns id and path"),
        ("a.csv", "id,path\n", "no assets"),
        ("a.txt", "a/chair.obj\nb/chair.glb\n", "a/chair.obj and b/chair.glb"),
        ("a.zip", "no zip", "cannot be read"),
    ],
)
def test_bad_lists_are_named(name, content, reason, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason) as error, open_assets(tmp_path / name):
        pass
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b"\xef\xbb\xbfid,path,split\r\nx,a b.obj,val\r\ny,c.obj,\r\n"),
        ("a.csv", b"id;path;split\nx;a b.obj;val\n\ny;c.obj;\n"),
        ("a.csv", b"sep=\t\nPath\tID\tSplit\n a b.obj\tx\tval\nc.obj\ty\n"),
        ("a.txt", b"id;path;split\rx;a b.obj;val\ry;c.obj"),
        ("a.csv", "id;path;split\nx;a b.obj;val\ny;c.obj;\n".encode("utf-16")),
    ],
)
def test_tables_of_every_program(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with open_assets(tmp_path / name) as assets:
        assert [(a.id, a.split, a.source) for a in assets] == [("x", "val", "a b.obj"), ("y", "", "c.obj")]


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfa.obj\r\n\r\nb c.obj;\r\n", "a.obj\nb c.obj".encode("utf-16")])
def test_lists_of_every_program(data, tmp_path):
    (tmp_path / "a.txt").write_bytes(data)
    with open_assets(tmp_path / "a.txt") as assets:
        assert [(a.id, a.source) for a in assets] == [("a", "a.obj"), ("b-c", "b c.obj")]


def test_ids_and_folders_that_are_too_long_fail_alone(assets, tmp_path, monkeypatch):
    folder, out = tmp_path / "deep", tmp_path / "out"
    here = folder
    for _ in range(8):
        here = here / ("a-folder-with-a-rather-long-name" + "x" * 8)
    here.mkdir(parents=True)
    for place in (folder, here):
        (place / "box.obj").write_text((assets / "box.obj").read_text())
    place = os.open(here, os.O_RDONLY)
    for _ in range(30):  # deeper than a path may be long
        os.mkdir("y" * 200, dir_fd=place)
        place = os.open("y" * 200, os.O_RDONLY, dir_fd=place)
    (folder / os.fsdecode(b"caf\xe9.obj")).write_text("no mesh")  # a name that is no UTF-8
    assert run(monkeypatch, "--assets", folder, "--out", out, *QUICK) == 0
    assert (out / "train.txt").read_text() == "box_0\n"
    failures = (out / "failures.txt").read_text().splitlines()
    assert len(failures) == 3 and sum("too long" in line for line in failures) == 2
    assert any(line.startswith("caf-\t") and "no triangles" in line for line in failures)
    (tmp_path / "long.csv").write_text(f"id,path\n{'é' * 150},box.obj\nbox,{assets / 'box.obj'}\n", encoding="utf-8")
    assert run(monkeypatch, "--assets", tmp_path / "long.csv", "--out", tmp_path / "out2", *QUICK) == 0
    assert "302 bytes" in (tmp_path / "out2/failures.txt").read_text()


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.obj", b"v 0 0 0\n" * 100_000)
    monkeypatch.setattr("ouroboros3d.datagen.assets.MIN_BOMB", 1000)
    assert run(monkeypatch, "--assets", tmp_path / "bomb.zip", "--out", tmp_path / "out", *QUICK) == 2
    assert "bomb.zip: unpacks to" in capsys.readouterr().err


def test_a_zip_file_that_climbs_out_is_refused_by_name(tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("box.obj", SQUARE + "f 1 2 3\n")
        file.writestr("../../evil.obj", SQUARE)
    assert run(monkeypatch, "--assets", tmp_path / "evil.zip", "--out", tmp_path / "out", *QUICK) == 2
    assert "'../../evil.obj' leads out" in capsys.readouterr().err
    for member in ("../outside.txt", "a/../../outside.txt"):
        with zipfile.ZipFile(tmp_path / "bad.sh3f", "w") as file:
            file.writestr("good.txt", "x")
            file.writestr(member, "x")
        with pytest.raises(OSError, match="leads out"):
            safe_unzip(tmp_path / "bad.sh3f", tmp_path / "inner" / "target")
    assert not list(tmp_path.rglob("outside.txt")) and not list(tmp_path.rglob("good.txt"))


def test_procedural_objects_repeat_and_fit():
    for number in range(12):
        surface = random_object(0, number)
        assert np.linalg.norm(surface.vertices[np.unique(surface.faces)], axis=1).max() <= 0.5 + 1e-9
        np.testing.assert_array_equal(surface.vertices, random_object(0, number).vertices)
    assert len(random_object(0, 1).vertices) != len(random_object(1, 1).vertices)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--assets", "nowhere.csv"],
        ["--procedural", "0"],
        ["--assets", "."],
        [],
        ["--procedural", "1", "--fill", "1.5"],
        ["--procedural", "1", "--out", "file/out"],
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    try:
        status = run(monkeypatch, "--out", tmp_path / "out", *arguments)
    except SystemExit as error:
        status = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and "error: " in lines[-1] and not (tmp_path / "out").exists()


def test_the_script_runs_as_a_program(tmp_path):
    command = [sys.executable, str(SCRIPTS / "render_orbits.py"), "--out", "out", "--assets", "nowhere.csv"]
    environment = {"PYTHONPATH": str(SCRIPTS.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere.csv: ") and done.stderr.count("\n") == 1


def test_committed_split_keeps_variants_together_and_names_licences():
    with open(get_furniture.SPLIT_FILE, newline="", encoding="utf-8") as file:
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
