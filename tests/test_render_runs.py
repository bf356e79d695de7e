"""Runs of render_orbits.py: they repeat, stop and go on, and report what cannot be rendered."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("embreex")
from mesh_files import warnings_of
from orbit_folders import QUICK, SQUARE, box_file, run

from ouroboros3d.datagen import orbit_renderer as render
from ouroboros3d.datagen import workers
from ouroboros3d.datagen.assets import Asset
from ouroboros3d.datagen.meshes import load_surface
from ouroboros3d.files import PACKAGE


def test_runs_repeat_and_skip_what_is_finished(tmp_path):
    assets = box_file(tmp_path / "assets").parent
    for out in ("a", "b"):
        assert run("--assets", assets, "--out", tmp_path / out, *QUICK) == 0
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 16 + 1 + 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    marked, lost = tmp_path / "a/box_0/render_0001.webp", tmp_path / "b/box_0"
    marked.write_bytes(b"mine")
    (lost / "meta.json").unlink()  # was not finished
    (lost / "render_0001.webp").unlink()
    for out in ("a", "b"):
        assert run("--assets", assets, "--out", tmp_path / out, *QUICK) == 0
    assert marked.read_bytes() == b"mine" and (lost / "render_0001.webp").is_file()
    assert not list(tmp_path.rglob(".tmp-*"))


# A run of render_orbits.py whose worker kills it in the midst of its third object.
KILLED = """
import multiprocessing, os, signal, sys, time
from PIL import Image
from ouroboros3d.cli import render_orbits

original = Image.Image.save

def save(image, path, *args, **kwargs):
    if "procedural_000002" in str(path) and "0007" in str(path):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)  # its worker must not outlive it
    original(image, path, *args, **kwargs)

Image.Image.save = save
multiprocessing.set_start_method("fork")
render_orbits.main(sys.argv[1:])
"""


def test_a_killed_run_leaves_nothing_half_done_and_continues(tmp_path):
    arguments = ("--procedural", 4, *QUICK)
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, *map(str, arguments), "--out", str(out)]
    # Its output ends with the last process that holds it, which is a worker that outlives the run.
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(out.glob(".tmp-*"))) == 1
    complete = sorted(p for p in out.iterdir() if p.name.startswith("procedural"))
    assert [p.name for p in complete] == ["procedural_000000_0", "procedural_000001_0"]
    assert all(len(list(p.iterdir())) == 17 for p in complete)
    (hidden,) = out.glob(".tmp-*")
    os.utime(hidden, (0, 0))  # an orbit may take longer than an hour: what it has written counts
    render.prepare_out(render.Settings(out, size=16, samples=1))
    assert hidden.is_dir()
    for path in hidden.rglob("*"):
        os.utime(path, (0, 0))  # as if an hour had passed since its last picture
    os.utime(hidden, (0, 0))
    stamps = {p: (p / "meta.json").stat().st_mtime_ns for p in complete}
    assert run(*arguments, "--out", out) == 0
    assert stamps == {p: (p / "meta.json").stat().st_mtime_ns for p in complete}
    files = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    whole = tmp_path / "whole"
    assert files == {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}


def test_other_options_into_the_same_folder_are_refused(tmp_path, capsys):
    arguments = ("--assets", box_file(tmp_path / "assets").parent, "--out", tmp_path / "out", *QUICK)
    assert run(*arguments) == 0
    assert run(*arguments, "--seed", 1) == 2
    assert "error: " in (err := capsys.readouterr().err) and "seed was 0 and is now 1" in err


def test_shards_are_disjoint_and_complete(tmp_path, capsys):
    arguments = ("--procedural", 5, "--out", tmp_path, *QUICK)
    assert run(*arguments, "--shard", "0/2") == 0
    first = {p.name for p in tmp_path.glob("procedural*")}
    assert run(*arguments, "--shard", "1/2") == 0
    both = {p.name for p in tmp_path.glob("procedural*")}
    assert len(first) == 3 and len(both) == 5 and not (tmp_path / "train.txt").exists()
    stamp = (tmp_path / "procedural_000000_0/meta.json").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert sorted((tmp_path / "train.txt").read_text().split()) == sorted(both)
    assert stamp == (tmp_path / "procedural_000000_0/meta.json").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        run(*arguments, "--shard", "2/2")
    assert "from 0 to n - 1" in capsys.readouterr().err


def test_lists_keep_what_another_run_finished(tmp_path):
    box_file(tmp_path)
    (tmp_path / "assets.csv").write_text("id,split,path\na,train,box.obj\nb,test,box.obj\n")
    for split in ("train", "test"):
        arguments = ("--assets", tmp_path / "assets.csv", "--out", tmp_path / "out", *QUICK, "--split", split)
        assert run(*arguments) == 0
    assert [(tmp_path / f"out/{s}.txt").read_text() for s in ("train", "val", "test")] == ["a_0\n", "", "b_0\n"]


TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
BAD_ASSETS = {  # file name -> contents and what the failures file must say
    "broken.obj": ("v 0 0 0\nf 1 2 nonsense\n", "cannot be read"),
    "empty.obj": ("v 0 0 0\n", ""),
    "point.obj": ("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "one point"),
    "line.obj": ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "nothing is to be seen"),
    "nan.obj": (TRIANGLE.replace("v 1 0", "v nan 0"), "not a finite number"),
    "text.glb": ("this is no glb", "cannot be read"),
    "range.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", "outside the range"),
    "endless.obj": (TRIANGLE.replace("v 1 0", "v 1e200 0"), "too large"),
    "many.obj": (TRIANGLE + "f 1 2 3\n" * 10, "more than the limit of 8"),
    "model.fbx": ("Kaydara", "--backend blender"),
}


def test_bad_assets_are_reported_and_others_go_on(tmp_path):
    folder = tmp_path / "assets"
    folder.mkdir()
    (folder / "good.obj").write_text(SQUARE + "f 1 2 3\n")
    for name, (text, _) in BAD_ASSETS.items():
        (folder / name).write_text(text)
    out = tmp_path / "out"
    assert run("--assets", folder, "--out", out, *QUICK, "--max_faces", 8) == 0
    reasons = dict(line.split("\t", 1) for line in (out / "failures.txt").read_text().splitlines())
    assert reasons.keys() == {Path(name).stem for name in BAD_ASSETS}
    for name, (_, reason) in BAD_ASSETS.items():
        assert reason in reasons[Path(name).stem] and name in reasons[Path(name).stem]
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["good_0"]
    assert (out / "train.txt").read_text() == "good_0\n"
    (folder / "good.obj").unlink()
    assert run("--assets", folder, "--out", tmp_path / "none", *QUICK, "--max-faces", 8) == 2


def test_an_asset_that_is_gone_fails_alone(tmp_path):
    box_file(tmp_path)
    (tmp_path / "assets.csv").write_text("id,split,path\ngone,val,gone.obj\nbox,test,box.obj\n")
    out = tmp_path / "out"
    assert run("--assets", tmp_path / "assets.csv", "--out", out, *QUICK) == 0
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
    assert run("--procedural", 4, "--out", tmp_path, *QUICK) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and str(tmp_path) in error[0] and os.strerror(code) in error[0]
    folders = [p for p in tmp_path.iterdir() if p.is_dir()]
    assert folders and all(len(list(p.iterdir())) == 17 for p in folders)
    assert "procedural_000001_0" not in {p.name for p in folders}
    monkeypatch.setattr(Image.Image, "save", original)
    assert run("--procedural", 4, "--out", tmp_path, *QUICK) == 0
    assert len((tmp_path / "train.txt").read_text().split()) == 4


def test_a_missing_texture_is_a_warning_and_leaves_the_plain_colour(tmp_path, capsys):
    (tmp_path / "sign.obj").write_text(f"mtllib sign.mtl\n{SQUARE}usemtl paint\nf 1/1 2/2 3/3 4/4\n")
    unused = "newmtl unused\nmap_Kd nobody.png\n"
    (tmp_path / "sign.mtl").write_text(f"{unused}newmtl paint\nKd 0 1 0\nmap_Kd gone.png\n")
    assert run("--assets", tmp_path, "--out", tmp_path / "out", *QUICK) == 0
    warning = (tmp_path / "out/warnings.txt").read_text()
    assert warning == "sign\tmaterial 'paint': texture 'gone.png' is missing\n"
    assert "1 have warnings" in capsys.readouterr().out
    rgba = load_surface(tmp_path / "sign.obj").materials[0].colour
    np.testing.assert_allclose(rgba, [0, 1, 0, 1])
    (tmp_path / "gone.png").write_bytes(b"no picture")
    assert run("--assets", tmp_path, "--out", tmp_path / "out", *QUICK) == 0  # finished, still said
    assert (tmp_path / "out/warnings.txt").read_text() == warning
    assert warnings_of(tmp_path / "sign.obj") == ["material 'paint': texture 'gone.png' is no picture that can be read"]
    (tmp_path / "sign.mtl").unlink()
    assert warnings_of(tmp_path / "sign.obj") == ["material file 'sign.mtl' is missing"]


def test_a_run_ends_with_the_features_it_met_and_a_sheet(tmp_path, capsys):
    (tmp_path / "a.obj").write_text(f"{SQUARE}usemtl gone\nf 1 2 3\nl 1 2\n")
    (tmp_path / "b.gltf").write_text('{"asset": {"version": "2.0"}, "extensionsRequired": ["VENDOR_magic"]}')
    arguments = ("--assets", tmp_path, "--out", tmp_path / "out", *QUICK, "--sheet")
    for _ in range(2):  # what is finished counts too
        assert run(*arguments) == 0
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
        status = run("--out", tmp_path / "out", *arguments)
    except SystemExit as error:
        status = error.code
    message = capsys.readouterr().err
    assert status == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
