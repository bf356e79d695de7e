"""What the documentation of inference shows runs, and names everything there is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from ouroboros3d.cli.inference import parse
from ouroboros3d.config.loading import load_config
from ouroboros3d.export import FORMATS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "inference.md"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working folder with testset/, so that what the examples write lands nowhere else."""
    os.symlink(ROOT / "testset", tmp_path / "testset")
    os.symlink(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_the_first_python_block_runs(page, elsewhere):
    block = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    if block is None:
        pytest.skip(f"{page} has no Python block")
    exec(compile(block[1], page, "exec"), {})
    assert (elsewhere / "armchair.ply").stat().st_size > 0


@pytest.mark.slow
def test_the_notebook_runs(elsewhere):
    """Every code cell in order, as Jupyter would, without its kernel."""
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    scope: dict = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), scope)
    assert (elsewhere / "outputs" / "armchair.mp4").stat().st_size > 0


def test_the_notebook_shows_its_pictures():
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]
    shown = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(shown) >= 4


def test_the_page_has_the_configurations_steps():
    said = re.search(r"the configuration's: (\d+) of the small model, (\d+) of the release", PAGE.read_text())
    configs = ("configs/small.yaml", "configs/baseline.yaml")
    assert [int(n) for n in said.groups()] == [load_config(ROOT / name).sampler.steps for name in configs]


def test_the_page_names_every_format_and_flag(capsys):
    text = PAGE.read_text()
    assert [ending for ending in FORMATS.values() if f"`{ending}`" not in text] == []
    with pytest.raises(SystemExit):
        parse(["--help"])
    flags = set(re.findall(r"--[a-z_]+", capsys.readouterr().out)) - {"--help"}
    for flag in re.findall(r"`(--[a-z_]+)", text):
        assert flag in flags, f"{flag} is in docs/inference.md, but no flag of inference.py"
