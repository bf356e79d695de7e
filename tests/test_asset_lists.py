"""Lists, folders and zip files of assets: what they name, what is held out, and what is refused."""

import csv
import os
import zipfile

import numpy as np
import pytest

pytest.importorskip("embreex")
from orbit_folders import QUICK, SQUARE, box_file, orbit_dataset, run

from ouroboros3d.cli import get_furniture
from ouroboros3d.datagen.assets import Asset, hold_out, open_assets, safe_unzip
from ouroboros3d.datagen.meshes import load_surface
from ouroboros3d.errors import UserError


def test_lists_and_zip_files_name_the_same_assets_as_folders(tmp_path):
    inside = box_file(tmp_path / "set/sub dir").parent
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


def test_assets_without_splits_get_a_validation_list(tmp_path):
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    for name in ("a.obj", "b.obj", "c.obj", "d.obj"):
        (folder / name).write_text(SQUARE + "f 1 2 3\n")
    (folder / "d.obj").write_text("")  # by its hash it would come first
    assert run("--assets", folder, "--out", out, *QUICK) == 0
    lists = {name: (out / f"{name}.txt").read_text().split() for name in ("train", "val", "test")}
    assert lists == {"train": ["a_0", "b_0"], "val": ["c_0"], "test": []}
    assert orbit_dataset(out, "val.txt", size=16)[0]["id"] == "c_0"
    assert run("--assets", folder, "--out", out, *QUICK, "--val_share", 0) == 0
    assert len((out / "train.txt").read_text().split()) == 3
    with pytest.raises(SystemExit):
        run("--assets", folder, "--out", out, *QUICK, "--val_share", 1)


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


TABLE, LIST = [("x", "val", "a b.obj"), ("y", "", "c.obj")], [("a", "", "a.obj"), ("b-c", "", "b c.obj")]


@pytest.mark.parametrize(
    ("name", "data", "found"),
    [
        ("a.csv", b"\xef\xbb\xbfid,path,split\r\nx,a b.obj,val\r\ny,c.obj,\r\n", TABLE),
        ("a.csv", b"id;path;split\nx;a b.obj;val\n\ny;c.obj;\n", TABLE),
        ("a.csv", b"sep=\t\nPath\tID\tSplit\n a b.obj\tx\tval\nc.obj\ty\n", TABLE),
        ("a.txt", b"id;path;split\rx;a b.obj;val\ry;c.obj", TABLE),
        ("a.csv", "id;path;split\nx;a b.obj;val\ny;c.obj;\n".encode("utf-16"), TABLE),
        ("a.txt", b"\xef\xbb\xbfa.obj\r\n\r\nb c.obj;\r\n", LIST),
        ("a.txt", "a.obj\nb c.obj".encode("utf-16"), LIST),
    ],
)
def test_lists_and_tables_of_every_program(name, data, found, tmp_path):
    (tmp_path / name).write_bytes(data)
    with open_assets(tmp_path / name) as assets:
        assert [(a.id, a.split, a.source) for a in assets] == found


def test_ids_and_folders_that_are_too_long_fail_alone(tmp_path):
    folder, out = tmp_path / "deep", tmp_path / "out"
    here = folder
    for _ in range(8):
        here = here / ("a-folder-with-a-rather-long-name" + "x" * 8)
    box = box_file(folder)
    box_file(here)
    place = os.open(here, os.O_RDONLY)
    for _ in range(30):  # deeper than a path may be long
        os.mkdir("y" * 200, dir_fd=place)
        place = os.open("y" * 200, os.O_RDONLY, dir_fd=place)
    (folder / os.fsdecode(b"caf\xe9.obj")).write_text("no mesh")  # a name that is no UTF-8
    assert run("--assets", folder, "--out", out, *QUICK) == 0
    assert (out / "train.txt").read_text() == "box_0\n"
    failures = (out / "failures.txt").read_text().splitlines()
    assert len(failures) == 3 and sum("too long" in line for line in failures) == 2
    assert any(line.startswith("caf-\t") and "no triangles" in line for line in failures)
    (tmp_path / "long.csv").write_text(f"id,path\n{'é' * 150},box.obj\nbox,{box}\n", encoding="utf-8")
    assert run("--assets", tmp_path / "long.csv", "--out", tmp_path / "out2", *QUICK) == 0
    assert "302 bytes" in (tmp_path / "out2/failures.txt").read_text()


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch, capsys):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.obj", b"v 0 0 0\n" * 100_000)
    monkeypatch.setattr("ouroboros3d.datagen.assets.MIN_BOMB", 1000)
    assert run("--assets", tmp_path / "bomb.zip", "--out", tmp_path / "out", *QUICK) == 2
    assert "bomb.zip: unpacks to" in capsys.readouterr().err


def test_a_zip_file_that_climbs_out_is_refused_by_name(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("box.obj", SQUARE + "f 1 2 3\n")
        file.writestr("../../evil.obj", SQUARE)
    assert run("--assets", tmp_path / "evil.zip", "--out", tmp_path / "out", *QUICK) == 2
    assert "'../../evil.obj' leads out" in capsys.readouterr().err
    for member in ("../outside.txt", "a/../../outside.txt"):
        with zipfile.ZipFile(tmp_path / "bad.sh3f", "w") as file:
            file.writestr("good.txt", "x")
            file.writestr(member, "x")
        with pytest.raises(OSError, match="leads out"):
            safe_unzip(tmp_path / "bad.sh3f", tmp_path / "inner" / "target")
    assert not list(tmp_path.rglob("outside.txt")) and not list(tmp_path.rglob("good.txt"))


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
