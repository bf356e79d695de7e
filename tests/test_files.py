"""Files appear whole or not at all; an unusable output folder is refused in one line."""

import errno
import os

import pytest
import torch

from ouroboros3d.files import OutputError, atomic_path, check_writable_dir, staged
from ouroboros3d.gaussians import Gaussians, load_ply, save_ply


def test_atomic_path_renames_when_the_block_ends(tmp_path):
    with atomic_path(tmp_path / "a.png") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png"
        temporary.write_text("new")
        assert not (tmp_path / "a.png").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "new"


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file_and_nothing_else(tmp_path, failure):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(type(failure)), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise failure
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_atomic_path_takes_the_longest_name(tmp_path):
    name = "n" * 251 + ".txt"
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert (tmp_path / name).exists()


def test_a_system_error_names_the_file_the_caller_asked_for(tmp_path):
    refused = pytest.raises(OutputError, match=r"cannot write .*/a\.txt: No space left")
    with refused as caught, atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "elsewhere")
    assert "\n" not in str(caught.value)
    refused = pytest.raises(OutputError, match=r"no_such_folder/a\.txt")
    with refused, atomic_path(tmp_path / "no_such_folder" / "a.txt") as temporary:
        temporary.write_text("x")


def test_a_failed_ply_leaves_nothing(tmp_path, monkeypatch):
    gaussians = Gaussians.from_tensor(torch.rand(1, 5, 14))
    save_ply(tmp_path / "a.ply", gaussians, compatible=False)
    assert torch.equal(load_ply(tmp_path / "a.ply", compatible=False).means, gaussians.means)

    def half(self, name):
        with open(name, "wb") as file:
            file.write(b"ply\n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ouroboros3d.gaussians.PlyData.write", half)
    with pytest.raises(OutputError, match=r"b\.ply: No space"):
        save_ply(tmp_path / "b.ply", gaussians)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_check_writable_dir_creates_it_and_leaves_it_empty(tmp_path):
    out = check_writable_dir(str(tmp_path / "a" / "b"))
    assert out.is_dir() and not list(out.iterdir())
    assert check_writable_dir(out) == out


def test_check_writable_dir_names_the_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("x")
    for out in (tmp_path / "a", tmp_path / "a" / "b" / "c"):
        with pytest.raises(OutputError, match=r"/a is no folder; choose another") as caught:
            check_writable_dir(out)
        assert "\n" not in str(caught.value) and str(out) in str(caught.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_check_writable_dir_refuses_a_read_only_place(tmp_path, monkeypatch, number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)  # permission bits would not stop root
    with pytest.raises(OutputError, match=os.strerror(number)):
        check_writable_dir(tmp_path / "out")


def test_check_writable_dir_refuses_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        check_writable_dir(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- results that belong together


def test_staged_results_appear_together_and_replace_the_old(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "old").touch()
    (tmp_path / "other").touch()
    with staged(tmp_path) as stage:
        (stage / "a").write_text("new")
        (stage / "steps").mkdir()
        (stage / "steps" / "new").touch()
        assert not (tmp_path / "a").exists()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a", "other", "steps", "steps/new"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failed_stage_leaves_nothing(tmp_path, failure):
    with pytest.raises(failure), staged(tmp_path) as stage:
        (stage / "a").touch()
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_staged_file_names_where_it_was_to_go(tmp_path):
    with pytest.raises(OutputError) as caught, staged(tmp_path) as stage, atomic_path(stage / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"cannot write {tmp_path / 'a.txt'}: No space left on device"
