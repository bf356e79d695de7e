"""Many pictures: what is found, named, skipped, divided among processes, and said of those that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ouroboros3d.files import OutputError
from ouroboros3d.inference.jobs import (
    InputError,
    Job,
    Record,
    file_sha256,
    find_pictures,
    is_finished,
    name_jobs,
    read_record,
    weights_stamp,
    write_record,
)
from ouroboros3d.inference.summary import write_summary

ROOT = Path(__file__).parents[1]


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b.png", "a.JPG", "c.webp"):
        Image.new("RGB", (4, 4)).save(folder / name)
    (folder / "notes.md").write_text("no picture")
    (folder / "deeper").mkdir()
    return folder


# ---------------------------------------------------------------- finding


def test_files_folders_globs_and_lists(photos, monkeypatch):
    a, b, c = (photos / name for name in ("a.JPG", "b.png", "c.webp"))
    assert find_pictures([c, photos]) == [c, a, b]
    assert find_pictures([str(photos / "*.png"), str(photos / "**/c*")]) == [b, c]
    (photos / "list.txt").write_text("\ufeff# a comment\r\n\r\nb.png\r\nmissing.png\r\n" + str(c), encoding="utf-8")
    assert find_pictures([photos / "list.txt"]) == [b, Path("missing.png"), c]
    monkeypatch.chdir(photos.parent)
    (photos / "list.txt").write_text("photos/a.JPG\n")
    assert find_pictures(["photos/list.txt"]) == [Path("photos/a.JPG")]


def test_a_name_with_brackets_is_a_file(tmp_path):
    path = tmp_path / "photo [1].png"
    path.touch()
    assert find_pictures([path]) == [path]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.png", "no such file"),
        ("photos/deeper", "a folder without pictures"),
        ("photos/*.gif", "no picture matches"),
        ("empty.txt", "the list is empty"),
        ("binary.txt", "cannot be read as a list"),
    ],
)
def test_inputs_without_pictures_are_named(photos, name, words):
    root = photos.parent
    (root / "empty.txt").write_text("# nothing\n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match=words) as caught:
        find_pictures([root / name])
    assert str(caught.value).startswith(str(root / name)) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- naming


def test_results_are_named_after_pictures(tmp_path):
    jobs = name_jobs([Path("x/a.png"), Path("b.v2.jpg")], tmp_path, [".ply", "_steps"])
    assert jobs == [Job("a", Path("x/a.png")), Job("b.v2", Path("b.v2.jpg"))]


def test_names_that_are_too_long_are_refused_before_work(tmp_path):
    fits = "é" * 122  # two bytes each
    assert name_jobs([Path(f"{fits}.png")], tmp_path, [".ply", "_input.png"])
    with pytest.raises(OutputError, match="over 255 bytes; rename it"):
        name_jobs([Path(f"{fits}é.png")], tmp_path, [".ply", "_input.png"])


# ---------------------------------------------------------------- finished or not


def test_finished_means_the_same_picture_the_same_settings_and_all_files(photos, tmp_path):
    job, settings = Job("b", photos / "b.png"), {"steps": 5, "guidance": (1.0, 3.0)}
    endings = [".ply", ".json"]

    def finish():
        (tmp_path / "b.ply").touch()
        write_record(tmp_path, "b", Record(str(job.path), file_sha256(job.path), settings))
        assert is_finished(job, tmp_path, settings, endings)

    assert not is_finished(job, tmp_path, settings, endings)
    finish()
    assert not is_finished(job, tmp_path, settings | {"steps": 6}, endings)
    assert not is_finished(job, tmp_path, settings, [*endings, ".mp4"])
    (tmp_path / "b.ply").unlink()
    assert not is_finished(job, tmp_path, settings, endings)
    finish()
    Image.new("RGB", (5, 5)).save(job.path)
    assert not is_finished(job, tmp_path, settings, endings)
    finish()
    for text in ("", "[1]", '{"picture": 3}', json.dumps({"unknown": 1})):
        (tmp_path / "b.json").write_text(text)
        assert read_record(tmp_path, "b") is None and not is_finished(job, tmp_path, settings, endings)


def test_other_weights_are_another_stamp(tmp_path):
    (tmp_path / "recon_model.pth").write_bytes(b"weights")
    before = weights_stamp(tmp_path)
    assert before == weights_stamp(tmp_path) and before[0][:2] == ["recon_model.pth", 7]
    (tmp_path / "recon_model.pth").write_bytes(b"others!!")
    assert weights_stamp(tmp_path) != before
    assert weights_stamp(None) == weights_stamp(tmp_path / "none") == []


# ---------------------------------------------------------------- the page of all


def test_the_page_shows_and_links_every_object(tmp_path):
    files = ["a b_input.png", "a b.png", "a b.mp4", "a b.ply", "a b.html"]
    records = {"a b": Record("a b.png", "", {}, seed=3, elevation=12.5, files=files), "<i>": Record("x", "", {})}
    write_summary(tmp_path / "index.html", records, ["c.png: is damaged & more"])
    page = (tmp_path / "index.html").read_text()
    for text in ("a%20b_input.png", 'src="a%20b.mp4"', 'href="a%20b.ply"', ">player<", "seed 3, elevation 12.5°"):
        assert text in page
    assert "c.png: is damaged &amp; more" in page and "2 objects, 1 failed" in page
    assert "&lt;i&gt;" in page and "<i>" not in page and "http" not in page


# ---------------------------------------------------------------- before torch


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input_img", "nowhere.png"], "nowhere.png: no such file"),
        (["--input_img", "x", "--device", "gpu"], "--device gpu: must be cpu"),
        (["--input_img", "x", "--formats", "ply", "fbx"], "fbx: not a known format"),
        (["--input_img", "x", "--elevation", "steep"], "--elevation"),
        (["--input_img", "x", "--candidates", "0"], "0 must be 1 to 64"),
        (["--input_img", "x", "--steps", "0"], "sampler.steps = 0"),
        (["--input_img", "x", "sampler.stepz=1"], "stepz"),
        (["--help"], ""),
        (["evaluate", "--list", "none.txt", "data.root=tests/data/orbits"], "none.txt: no such file; check data.root"),
        (["train", "data.root=nowhere", "train.output_dir={tmp}"], "no such folder; check data.root"),
        (["convert", "none.ply", "--to", "glb"], "none.ply: no such file"),
    ],
)
def test_wrong_arguments_are_refused_before_torch_is_imported(arguments, words, tmp_path):
    command, arguments = ("inference", arguments) if arguments[0].startswith("--") else (arguments[0], arguments[1:])
    arguments = [text.replace("{tmp}", str(tmp_path)) for text in arguments]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from ouroboros3d.cli import call, load\n"
        f"sys.exit(call(load({command!r}).main, {arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    help_asked = arguments == ["--help"]
    assert done.returncode == (0 if help_asked else 2), done.stderr
    assert help_asked or (done.stderr.count("\n") == 1 and words in done.stderr), done.stderr
