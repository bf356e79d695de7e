"""The benchmark of reading runs on folders, links and shards, and its verdict counts right."""

from __future__ import annotations

from pathlib import Path

import pytest
from orbit_folders import SIZE, write_noise

from ouroboros3d.cli import benchmark_data, call
from ouroboros3d.data import benchmark


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("orbits")
    write_noise(root / "a")
    (root / "train.txt").write_text("a\n")
    return root


def test_it_measures_a_set_of_links(root, capsys):
    arguments = [str(root), "--size", str(SIZE), "--seconds", "0.05", "--workers", "0", "1", "--links", "300"]
    assert call(benchmark_data.main, [*arguments, "--rate", "1", "--gpus", "1"]) == 0
    title, header, alone, one, verdict = capsys.readouterr().out.splitlines()
    assert "300 orbits, 8 views of 8 px" in title and header.split("  ") == list(benchmark.FIELDS)
    assert alone.split()[0] == "0" and alone.endswith("-") and one.split()[0] == "1" and one.endswith("MB")
    assert float(alone.split()[1]) > 0 and float(one.split()[2]) > 0
    assert verdict.startswith("1 GPUs x 1 examples/s = 1; ") and verdict.endswith("they need not wait")
    assert not list(root.glob("*_a"))


def test_verdict():
    """A worker of 24 images a second reads 3 examples: 10 a second want 4 of them."""
    enough = benchmark.verdict(10.0, 8, 24.0, cores=32)
    assert "data.workers=4 a GPU, 32 of 32 cores: they need not wait" in enough
    assert "THEY WAIT, 1 cores are missing" in benchmark.verdict(10.0, 8, 24.0, cores=31)


def test_bad_input(root, tmp_path, capsys):
    assert call(benchmark_data.main, [str(tmp_path / "nowhere")]) == 2
    (tmp_path / "shards.tsv").write_text("")
    assert call(benchmark_data.main, [str(tmp_path), "--links", "3"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "no such folder" in lines[0] and "--links needs folders" in lines[1]
