"""Tar shards: the same examples as from folders, the library's own reading of them, and what can be wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from orbit_folders import SIZE, same, write_noise
from torch.utils.data import DataLoader

from ouroboros3d.cli import call
from ouroboros3d.data.orbit_files import DataError
from ouroboros3d.data.shards import INDEX, Shards, read_index, scan_shard

webdataset = pytest.importorskip("webdataset")
from orbit_folders import orbit_dataset  # noqa: E402

from ouroboros3d.cli import make_shards  # noqa: E402

IDS = ["a", "b.v2", "50%.off", "d" * 120, "e f", "g"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Five orbits, with names that tar files and WebDataset's keys find hard. One has a cut frame; "g" is not there."""
    root = tmp_path_factory.mktemp("orbits")
    for k, name in enumerate(IDS[:-1]):
        write_noise(root / name, elevation=5.0 * k)
    picture = root / "e f" / "render_0004.webp"
    picture.write_bytes(picture.read_bytes()[:50])
    (root / "train.txt").write_text("\n".join(IDS[:4] + IDS[5:]))
    (root / "val.txt").write_text("e f\na\n")
    (root / "test.txt").write_text("")  # as render_orbits.py leaves it where there is no such split
    return root


@pytest.fixture
def shards(folders, tmp_path) -> Path:
    out = tmp_path / "shards"
    assert call(make_shards.main, [str(folders), "--out", str(out), "--per_shard", "2"]) == 1  # "g"
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("list_file", ["train.txt", "val.txt"])
def test_the_same_examples_as_from_folders(folders, shards, list_file):
    options = dict(list_file=list_file, size=SIZE, mirror=True, depth=True, max_damaged=0.5)
    one, two = orbit_dataset(folders, **options), orbit_dataset(shards, **options)
    assert isinstance(two._orbits, Shards) and not isinstance(one._orbits, Shards)
    for epoch in range(4):
        for index in range(len(one)):
            assert same(one.example(epoch, index), two.example(epoch, index))
    assert torch.equal(one._damaged, two._damaged) and one._damaged.sum() == 1
    assert all(same(a, b) for a, b in zip(DataLoader(two, None, num_workers=2), one, strict=True))


def test_the_disk_cache_reads_shards_and_notices_new_ones(folders, shards, tmp_path):
    options = dict(list_file="val.txt", size=4, depth=True, max_damaged=0.5)
    cached = orbit_dataset(shards, cache="disk", cache_dir=tmp_path / "cache", **options)
    assert all(same(a, b) for a, b in zip(cached, orbit_dataset(folders, **options), strict=True))
    os.utime(shards / "val-000000.tar", (1, 1))
    orbit_dataset(shards, cache="disk", cache_dir=tmp_path / "cache", **options)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_webdataset_reads_them(folders, shards):
    samples = list(webdataset.WebDataset(str(shards / "train-{000000..000001}.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["a", "b%2Ev2", "50%25%2Eoff", "d" * 120]
    for name, sample in zip(IDS, samples, strict=False):
        files = contents(folders / name)
        assert {key: sample[key] for key in files} == files and len(files) == 18


def test_repeating_gives_the_same_bytes_and_keeps_what_is_current(folders, shards, tmp_path):
    other = tmp_path / "other"
    assert call(make_shards.main, [str(folders), "--out", str(other), "--per_shard", "2", "--workers", "2"]) == 1
    assert contents(other) == contents(shards)
    times = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    # As if it had been killed: one shard not there, one of before a change, and no index yet.
    first, second = shards / "train-000000.tar", shards / "train-000001.tar"
    first.unlink()
    os.utime(second, (1, 1))
    (shards / INDEX).unlink()
    assert call(make_shards.main, [str(folders), "--out", str(shards), "--per_shard", "2"]) == 1
    assert contents(other) == contents(shards)
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == {first, second}


def test_without_workers_no_process_is_started(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("ouroboros3d.data.shard_writer.ProcessPoolExecutor", None)  # a call would fail
    assert call(make_shards.main, [str(folders), "--out", str(tmp_path / "out"), "--workers", "0"]) == 1


def _die(task) -> None:
    os._exit(9)


def test_a_process_that_dies_ends_the_run(folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("ouroboros3d.data.shard_writer.pack", _die)
        assert call(make_shards.main, [str(folders), "--out", str(out), "--workers", "1"]) == 2
    assert "a process died, perhaps out of memory; the same command with fewer" in capsys.readouterr().err
    (out / ".tmp-a.tar").touch()  # what it leaves
    assert call(make_shards.main, [str(folders), "--out", str(out)]) == 1
    assert (out / INDEX).is_file() and not list(out.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [(["--workers", "-1"], "--workers -1: must not be"), (["--lists", "train.txt", "a/train.txt"], "the same name")],
)
def test_what_cannot_be_packed_is_refused(folders, tmp_path, capsys, options, reason):
    assert call(make_shards.main, [str(folders), "--out", str(tmp_path / "out"), *options]) == 2
    assert reason in capsys.readouterr().err


def test_an_index_says_where_everything_is(shards):
    entries = list(read_index(shards))
    assert [entry.id for entry in entries] == [*IDS[:4], "e f", "a"]
    tars = sorted(path.name for path in shards.glob("*.tar"))
    assert tars == ["train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar"]
    assert entries == [entry for name in tars for entry in scan_shard(shards / name)]
    for name in tars:
        own = [entry for entry in entries if entry.shard == name]
        assert not own or (own[0].offset == 0 and own[1].offset == own[0].length)


def test_damaged_shards_are_named(folders, shards):
    def read(**options) -> dict:
        return orbit_dataset(shards, size=SIZE, **options)[1]

    shard = shards / "train-000000.tar"
    whole, (_, entry, *_) = shard.read_bytes(), read_index(shards)
    wrong = r"train-000000\.tar: b\.v2: is not where the index says, or is cut off; run scripts/make_shards"
    for content in (
        whole[: entry.offset + 700],
        whole[: entry.offset + entry.length - 1],
        bytes(len(whole)),
        (shards / "train-000001.tar").read_bytes() + whole,
    ):
        shard.write_bytes(content)
        with pytest.raises(DataError, match=wrong):
            read()
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: no such shard"):
        read()
    assert read(max_damaged=0.5)["id"] == "50%.off"
    (shards / "train.txt").write_text("a\nnobody\n")
    with pytest.raises(DataError, match=r"shards\.tsv: has no orbit nobody; run scripts/make_shards"):
        read()
    (shards / INDEX).write_text("what is this\n")
    with pytest.raises(DataError, match=r"shards\.tsv: is no index of shards"):
        read()


def test_bad_input(folders, shards, tmp_path, capsys, monkeypatch):
    def complaint(*arguments) -> str:
        assert call(make_shards.main, [str(a) for a in arguments]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line and "orbit/s" not in line]
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    out = ["--out", tmp_path / "new"]
    assert "no such folder" in complaint(tmp_path / "nowhere", *out, "--lists", "train.txt")
    assert "has no ids in train.txt, val.txt or test.txt" in complaint(tmp_path, *out)
    assert "--per_shard 0: must be at least 1" in complaint(folders, *out, "--per_shard", 0)
    (tmp_path / "file").write_text("")
    assert "file is no folder" in complaint(folders, "--out", tmp_path / "file")
    arguments = (folders, "--out", shards, "--lists", "train.txt", "--per_shard", 2)
    assert "has other shards, val-000000.tar; remove" in complaint(*arguments)
    assert not (tmp_path / "new").exists()

    def full(self, sample):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    assert "train-000000.tar: No space left on device" in complaint(folders, *out)
    assert contents(tmp_path / "new") == {}
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert "pip install webdataset" in complaint(folders, *out)


def test_ids_without_a_folder_are_told(folders, tmp_path, capsys):
    assert call(make_shards.main, [str(folders), "--out", str(tmp_path / "out"), "--lists", "val.txt"]) == 0
    assert "2 orbits in 1 shards" in capsys.readouterr().out
    assert call(make_shards.main, [str(folders), "--out", str(tmp_path / "more")]) == 1
    assert "1 ids have no folder: g" in capsys.readouterr().err
