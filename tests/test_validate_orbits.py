"""The validator finds every kind of damage, says where, and leaves sound orbits alone."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from orbit_folders import orbit_dataset, write_frames
from PIL import Image, ImageDraw

from ouroboros3d.camera_defaults import DISTANCE, FOV
from ouroboros3d.cli import call
from ouroboros3d.data.orbit_files import read_ids
from ouroboros3d.datagen.orbit_checks import check_orbit, check_poses, check_set, good_lists, read_list
from ouroboros3d.datagen.raycast import orbit_pose

FRAMES, SIZE = 8, 40
FACES = {(0, -1): "red", (0, 1): "orange", (1, -1): "blue", (1, 1): "green", (2, -1): "grey", (2, 1): "white"}


def write_orbit(folder: Path, sides=(0.5, 0.6, 0.4), elevation=20.0, start=7.0, size=SIZE, colour=None) -> None:
    """Views of a box with a colour a side; the silhouettes are exact."""
    poses = [orbit_pose(start + 360 * k / FRAMES, elevation) for k in range(FRAMES)]
    scale = size / 2 / np.tan(np.radians(FOV / 2))
    pictures = []
    for pose in poses:
        picture = Image.new("RGBA", (size, size))
        draw = ImageDraw.Draw(picture)
        for (axis, sign), name in FACES.items():
            others = [a for a in range(3) if a != axis]
            if (pose[:3, 3] * sign)[axis] < sides[axis] / 2:
                continue  # turned away
            corners = np.zeros((4, 3))
            corners[:, axis] = sign * sides[axis] / 2
            corners[:, others] = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array(sides)[others] / 2
            seen = (corners - pose[:3, 3]) @ pose[:3, :3]
            points = size / 2 + scale * seen[:, :2] * [1, -1] / -seen[:, 2:]
            draw.polygon([tuple(point) for point in points], fill=colour or name)
        pictures.append(np.asarray(picture))
    write_frames(folder, pictures, poses, elevation=elevation)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Four different orbits, two for training, one each for validation and test."""
    root = tmp_path_factory.mktemp("sound")
    for k in range(4):
        write_orbit(root / f"box_{k}", elevation=-5.0 + 10 * k, start=30.0 * k)
    (root / "train.txt").write_text("box_0\nbox_1\n")
    (root / "val.txt").write_text("box_2\n")
    (root / "test.txt").write_text("box_3\n")
    return root


@pytest.fixture
def root(sound, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(sound, tmp_path / "set"))


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("validate_orbits")


def run(script, root: Path, *arguments) -> int:
    return script.main([str(root), "--frames", str(FRAMES), "--workers", "1", *map(str, arguments)])


def redraw(change: Callable[[np.ndarray], np.ndarray], frames=(2,)) -> Callable[[Path], None]:
    """A damage: the pictures of `frames`, changed."""

    def damage(folder: Path) -> None:
        for k in frames:
            path = folder / f"render_{k:04d}.webp"
            with Image.open(path) as picture:
                pixels = change(np.array(picture))
            Image.fromarray(pixels).save(path, lossless=True)

    return damage


def remeta(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """A damage: meta.json, changed."""

    def damage(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def repose(change: Callable[[np.ndarray], None]) -> Callable[[Path], None]:
    """A damage: the matrices [N, 4, 4], changed in place."""

    def apply(meta: dict) -> None:
        poses = np.array([location["transform_matrix"] for location in meta["locations"]])
        change(poses)
        for location, pose in zip(meta["locations"], poses.tolist(), strict=True):
            location["transform_matrix"] = pose

    return remeta(apply)


def turned_about_own(axis: int, degrees: float) -> Callable[[np.ndarray], None]:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = (k for k in range(3) if k != axis)

    def change(poses: np.ndarray) -> None:
        turn = np.eye(4)
        turn[[a, b, a, b], [a, b, b, a]] = cos, cos, -sin, sin
        poses[3] = poses[3] @ turn

    return change


def with_alpha(pixels: np.ndarray, alpha) -> np.ndarray:
    pixels[..., 3] = alpha
    return pixels


def shifted(pixels: np.ndarray) -> np.ndarray:
    return np.roll(pixels, -np.flatnonzero(pixels[..., 3].any(0))[0], 1)


def truncate(folder: Path) -> None:
    path = folder / "render_0005.webp"
    path.write_bytes(path.read_bytes()[:60])


def in_orbit(change: Callable[[int], float]) -> Callable[[np.ndarray], None]:
    """Other azimuths, at the same elevation of 5 degrees."""

    def apply(poses: np.ndarray) -> None:
        poses[:] = [orbit_pose(change(k), 5.0) for k in range(FRAMES)]

    return apply


DAMAGES = {
    "truncated": (truncate, r"picture: cannot be read .*\(render_0005.webp\)"),
    "missing picture": (lambda f: (f / "render_0001.webp").unlink(), r"picture: .*No such file.*render_0001"),
    "no alpha": (redraw(lambda p: p[..., :3], (0, 1)), r"no alpha channel \(render_0000.webp and 1 more\)"),
    "not square": (redraw(lambda p: p[:-4], range(FRAMES)), "size: 40 x 36 is not square"),
    "sizes differ": (redraw(lambda p: p[4:-4, 4:-4]), "size: the pictures differ: 32 x 32, 40 x 40"),
    "other size": (redraw(lambda p: p[2:-2, 2:-2], range(FRAMES)), "size: 36 pixels per side instead of 40"),
    "empty": (redraw(lambda p: with_alpha(p, 0)), r"empty: .*\(render_0002.webp\)"),
    "hardly there": (redraw(lambda p: with_alpha(p, p[..., 3] // 20)), "empty: "),
    "full": (redraw(lambda p: with_alpha(p, np.minimum(p[..., 3], 200) | 100)), "full: "),
    "cut": (redraw(shifted), r"cut: .*\(render_0002.webp\)"),
    "no json": (lambda f: (f / "meta.json").write_text("{"), "meta: cannot be read"),
    "no meta": (lambda f: (f / "meta.json").unlink(), "meta: .*No such file"),
    "frame missing": (remeta(lambda m: m["locations"].pop()), "meta: has 7 frames instead of 8"),
    "same picture": (
        remeta(lambda m: m["locations"][3].update(frames=m["locations"][2]["frames"])),
        "meta: two frames have the same picture",
    ),
    "elevation": (remeta(lambda m: m.update(elevation=12.0)), "elevation: the file says 12.00, the matrices 5.00"),
    "singular": (repose(lambda c: c[1].fill(0)), "pose: the matrix of frame 1 is no rotation"),
    "scaled": (repose(lambda c: np.multiply(c[:, :3, :3], 1.01, out=c[:, :3, :3])), "is no rotation"),
    "mirrored": (repose(lambda c: np.negative(c[2, :3, 0], out=c[2, :3, 0])), "frame 2 is no rotation"),
    "far": (repose(lambda c: np.multiply(c[4, :3, 3], 1.1, out=c[4, :3, 3])), "pose: distances from 1.742 to 1.916"),
    "origin": (repose(lambda c: c[4, :3, 3].fill(0)), "stands at the origin"),
    "looks away": (repose(turned_about_own(1, 180.0)), "frame 3 does not look at the origin"),
    "looks past": (repose(turned_about_own(1, 1.0)), "frame 3 does not look at the origin"),
    "rolled": (repose(turned_about_own(2, 10.0)), "rolled"),
    "higher": (repose(lambda c: np.copyto(c[3], orbit_pose(30 + 135, 9.0))), "pose: elevations from 5.00 to 9.00"),
    "repeated": (repose(in_orbit(lambda k: 45 * min(k, 6))), "azimuth: only 7 of 8 are distinct"),
    "uneven": (repose(in_orbit(lambda k: 45 * k + (k == 3))), "azimuth: steps from 44.00 to 46.00"),
    "clockwise": (repose(in_orbit(lambda k: -45 * k)), "clockwise"),
    "broken depth": (lambda f: (f / "depth.npz").write_bytes(b"PK"), "depth: "),
    "short depth": (lambda f: np.savez(f / "depth.npz", depth=np.zeros((7, 4, 4))), r"depth: .*\(7, 4, 4\)"),
    "empty depth": (lambda f: np.savez(f / "depth.npz", depth=np.zeros((8, 4, 4))), "depth: covers 0%"),
    "nan depth": (lambda f: np.savez(f / "depth.npz", depth=np.full((8, 4, 4), np.nan)), "depth: not finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_and_nothing_else(root, name):
    damage, expected = DAMAGES[name]
    damage(root / "box_1")
    reports = {f"box_{k}": check_orbit(root, f"box_{k}", FRAMES) for k in range(4)}
    assert check_set(reports, {"train.txt": ["box_0", "box_1"]}) == {"train.txt": []}
    assert len(reports["box_1"].problems) == 1, reports["box_1"].problems
    assert re.search(expected, reports["box_1"].problems[0]), reports["box_1"].problems
    assert all(reports[i].good for i in ("box_0", "box_2", "box_3"))


def test_what_is_no_damage(root):
    np.savez(root / "box_1" / "depth.npz", depth=np.kron(np.eye(4), np.ones((8, 2, 2)))[:8, :8, :8] * 1.7)
    turned = repose(lambda c: np.copyto(c, np.roll(c, 3, 0)))  # any frame may be the first
    turned(root / "box_1")
    remeta(lambda m: m.pop("elevation"))(root / "box_1")
    meta = root / "box_1" / "meta.json"
    meta.write_bytes(b"\xef\xbb\xbf" + meta.read_bytes())  # a byte order mark, as Windows's editors write it
    report = check_orbit(root, "box_1", FRAMES)
    assert report.good and not report.degenerate, report
    assert (report.size, report.fov) == (SIZE, pytest.approx(FOV))
    assert (report.distance, report.elevation) == (pytest.approx(DISTANCE), pytest.approx(5.0))
    assert check_poses(np.stack([orbit_pose(22.5 * k, -5.0, 3.0) for k in range(16)]))[0] == []


@pytest.mark.parametrize("elevation", [-4.0, 12.0, 29.0])
@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"sides": (0.8, 0.02, 0.6)}, "flat"),  # a picture on a wall
        ({"sides": (0.7, 0.7, 0.02)}, "flat"),  # a carpet
        ({"sides": (0.15, 0.12, 0.1)}, "tiny"),
        ({"colour": (40, 40, 40)}, "one colour"),
        ({"sides": (0.15, 0.15, 0.8)}, None),  # a column
        ({"sides": (0.7, 0.5, 0.12)}, None),  # a low table
    ],
)
def test_degenerate_objects_are_named_and_stay_good(tmp_path, changes, kind, elevation):
    write_orbit(tmp_path / "box", elevation=elevation, **changes)
    report = check_orbit(tmp_path, "box", FRAMES)
    assert report.good and [text.split(":")[0] for text in report.degenerate] == ([kind] if kind else [])


def test_lists(root):
    (root / "train.txt").write_text("box_0\n\nbox_1\nbox_0\nbox_3\nbox_9\n")
    ids, problems = read_list(root / "train.txt")
    assert ids == ["box_0", "box_1", "box_3", "box_9"]
    assert problems == ["blank: 1 blank lines", "duplicate: box_0 more than once"]
    reports = {i: check_orbit(root, i, FRAMES) for i in (*ids, "box_2")}
    lists = {"train.txt": ids, "val.txt": ["box_2"], "test.txt": ["box_3"]}
    found = check_set(reports, lists)
    assert found["train.txt"] == ["missing: no folder for box_9", "overlap: box_3 stand in test.txt too"]
    assert found["val.txt"] == found["test.txt"] == []
    assert good_lists(reports, lists) == {"train.txt": ["box_0", "box_1"], "val.txt": ["box_2"], "test.txt": ["box_3"]}


def test_one_asset_in_two_splits_and_one_orbit_under_two_names(root):
    for k, source in enumerate(("aa", "bb", "cc", "aa")):
        remeta(lambda m, source=source: m.update(source_sha256=source))(root / f"box_{k}")
    shutil.copytree(root / "box_1", root / "copy")
    lists = {"train.txt": ["box_0", "box_1", "copy"], "test.txt": ["box_3"]}
    reports = {i: check_orbit(root, i, FRAMES) for i in ("box_0", "box_1", "box_2", "box_3", "copy")}
    found = check_set(reports, lists)
    assert found["train.txt"] == ["overlap: box_0 show an asset that test.txt shows too"]
    assert reports["copy"].problems == ["duplicate: has the pictures of box_1"]
    assert good_lists(reports, lists) == {"train.txt": ["box_1"], "test.txt": ["box_3"]}


def test_a_clean_set(script, sound, tmp_path, capsys):
    assert run(script, sound, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "good.txt").read_text() == "box_0\nbox_1\nbox_2\nbox_3\n"
    assert (tmp_path / "out" / "good_train.txt").read_text() == "box_0\nbox_1\n"
    assert "4 of 4 orbits are good" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    assert summary["good"] == 4 and summary["ranges"]["elevation"] == "-5 to 25"
    with Image.open(tmp_path / "out" / "contact_sheet.webp") as sheet:
        assert sheet.size == (4 * 136, 149)
        assert sheet.getpixel((4 + 32, 4 + 32)) != sheet.getpixel((6, 6))  # the object, the canvas


def test_a_spoilt_set_leaves_what_trains(script, root, capsys):
    truncate(root / "box_0")
    write_orbit(root / "unlisted", sides=(0.8, 0.02, 0.5))
    (root / ".box_7.part").mkdir()
    (root / "notes").mkdir()
    assert run(script, root) == 1
    said = capsys.readouterr().out
    assert "box_0: picture" in said and "1 folders in no list, the first unlisted" in said
    assert "4 of 5 orbits are good" in said and "degenerate: flat 1" in said
    with open(root / "validation" / "report.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"box_0", "box_1", "box_2", "box_3", "unlisted"}
    assert rows["box_0"]["lists"] == "train.txt" and rows["box_0"]["problems"].startswith("picture: ")
    assert rows["unlisted"]["degenerate"].startswith("flat: ") and rows["unlisted"]["problems"] == ""
    assert read_ids(root / "validation" / "good.txt") == ["box_1", "box_2", "box_3", "unlisted"]
    data = orbit_dataset(root, "validation/good_train.txt", size=16, num_views=4, frames=FRAMES)
    assert [item["id"] for item in data] == ["box_1"]
    with Image.open(root / "validation" / "contact_sheet.webp") as sheet:
        red, orange = sheet.getpixel((1, 70)), sheet.getpixel((137, 70))
    assert red[0] > 150 and red[1] < 80 and orange[0] > 180 and 100 < orange[1] < 180
    assert run(script, root, "--drop_degenerate") == 1  # a second run reads nothing that the first one wrote
    assert read_ids(root / "validation" / "good.txt") == ["box_1", "box_2", "box_3"]


def test_the_committed_orbits_are_sound_and_train(script, tmp_path):
    root = Path(__file__).parent / "data" / "orbits"
    assert script.main([str(root), "--out", str(tmp_path), "--workers", "1", "--size", "128"]) == 0
    ranges = json.loads((tmp_path / "report.json").read_text())["ranges"]
    assert (ranges["fov"], ranges["distance"]) == ("39.6", "1.742")
    assert sum(p.stat().st_size for p in root.rglob("*")) < 2e6
    data = orbit_dataset(root, size=32, depth=True)
    bear, cake = data
    assert (bear["id"], cake["id"]) == ("blendswap-cc-0_teddybear_0", "blendswap-cc-0_cupcake_0")
    for item in (bear, cake):
        agree = ((item["depth"] > 0) == (item["alpha"] > 0.5)).float().mean()
        assert agree > 0.98 and 1.2 < item["depth"][item["depth"] > 0].mean() < 1.75
    rgb = (bear["images"] / 2 + 0.5)[:, :, 16, 16].mean(0)
    assert rgb[0] > rgb[1] > rgb[2]  # a brown bear


def test_empty_lists_are_a_problem_of_the_set(script, root, capsys):
    for name in ("train", "val", "test"):
        (root / f"{name}.txt").write_text("\n")
    assert run(script, root) == 1
    said = capsys.readouterr().out
    assert "set: empty: no id in train.txt, val.txt, test.txt" in said and "4 of 4 orbits are good" in said
    assert (root / "validation" / "good_train.txt").read_text() == ""
    for name in ("train", "val", "test"):
        (root / f"{name}.txt").unlink()
    assert run(script, root) == 1
    assert "set: empty: no id in train.txt or val.txt or test.txt" in capsys.readouterr().out


def test_a_set_of_the_wrong_size(script, sound, tmp_path, capsys):
    assert run(script, sound, "--out", tmp_path, "--size", 64, "--show", 1) == 1
    said = capsys.readouterr().out
    assert "box_0: size: 40 pixels per side instead of 64" in said and "and 3 more" in said


def test_a_set_without_anything_to_show(script, root, tmp_path, capsys):
    for meta in root.glob("*/meta.json"):
        meta.write_bytes(b"no JSON")
    assert run(script, root, "--out", tmp_path, "--sheet", 1) == 1
    assert "0 of 4 orbits are good" in capsys.readouterr().out


def test_what_cannot_run_ends_with_one_line_and_status_2(script, sound, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    commands = {
        "nowhere: no such folder": [tmp_path / "nowhere"],
        "holds no orbits": [tmp_path / "empty"],
        "missing.txt: cannot be read": [sound, "--lists", "missing.txt"],
        "choose another output folder": [sound, "--out", tmp_path / "file" / "out"],
    }
    for reason, arguments in commands.items():
        assert call(script.main, [str(a) for a in arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and reason in said and said.count("\n") == 1


def test_strict_refuses_what_was_rendered_with_warnings(tmp_path):
    orbit_checks_root = tmp_path / "set"
    shutil.copytree(Path(__file__).parent / "data/orbits", orbit_checks_root)
    name = next(p.parent.name for p in sorted(orbit_checks_root.glob("*/meta.json")))
    meta = orbit_checks_root / name / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"warnings": ["texture 'a.png' is missing"]}))
    assert check_orbit(orbit_checks_root, name).problems == []
    assert check_orbit(orbit_checks_root, name, strict=True).problems == ["warning: texture 'a.png' is missing"]
