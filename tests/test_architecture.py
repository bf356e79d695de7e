"""docs/architecture.md and docs/extending.md: files that exist, figures that are the script's, code that is tested."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from test_extending import Billboards, depth_map

from ouroboros3d.cli import code_size, draw_architecture

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", draw_architecture.FIGURES)
def test_figures_are_the_script_s_and_name_files_that_exist(name):
    boxes, arrows = draw_architecture.FIGURES[name]
    assert (DOCS / "images" / f"{name}.svg").read_text() == draw_architecture.draw(boxes, arrows)
    assert f"images/{name}.svg" in (DOCS / "architecture.md").read_text()
    for box in boxes:
        assert (ROOT / "ouroboros3d" / box.file).is_file(), box.file


def test_every_path_in_the_text_exists():
    paths = re.findall(r"`((?:ouroboros3d|scripts|tests)/[\w./]*)`", (DOCS / "architecture.md").read_text())
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_folder_of_the_package_is_in_the_table():
    text = (DOCS / "architecture.md").read_text()
    for init in (ROOT / "ouroboros3d").glob("*/__init__.py"):
        assert f"`ouroboros3d/{init.parent.name}/`" in text, init.parent.name


@pytest.mark.parametrize("thing", [Billboards, depth_map])
def test_the_examples_are_the_tested_code(thing):
    assert inspect.getsource(thing) in (DOCS / "extending.md").read_text()


def test_code_lines_are_neither_blank_nor_words():
    source = '"""Words\nabout it."""\n\nx = """a\nb"""  # a comment\n\n'
    source += 'def f():\n    """Words."""\n    # more\n    return x\n'
    assert code_size.code_lines(source) == 4


def test_levels_and_circles():
    assert code_size.levels({"a": {"b"}, "b": {"c"}, "c": set()}) == (3, False)
    assert code_size.levels({"a": {"b"}, "b": {"a"}})[1]


def test_the_package_has_no_circle():
    assert not code_size.levels(code_size.graph_of(dict(code_size.files(None))))[1]
