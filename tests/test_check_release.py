"""scripts/check_release.py: the paper's numbers, what agrees, and the whole command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ouroboros3d.cli import call
from ouroboros3d.cli.check_release import PAPER, compare_to_paper, main
from ouroboros3d.config.loading import save_config
from ouroboros3d.evaluation.bootstrap import Interval, bootstrap_mean
from ouroboros3d.models.weights import save_checkpoint

ORBITS = Path(__file__).parent / "data" / "orbits"


def test_what_agrees_with_the_paper():
    assert PAPER["views_all"]["psnr"] == 21.770 and PAPER["render_all"]["lpips"] == 0.1091
    summary = {
        "views_all_psnr": Interval(21.0, 20.6, 21.4, 100),  # 21.77 is within the tolerance of 0.5
        "views_all_ssim": Interval(0.85, 0.84, 0.86, 100),
        "render_all_psnr": bootstrap_mean([21.7]),
    }
    lines = {line.name: line for line in compare_to_paper(summary)}
    assert [name for name, line in lines.items() if line.agrees] == ["views psnr", "render psnr"]
    assert lines["views lpips"].here is None and "absent" in str(lines["views lpips"])


def test_the_whole_command(make_config, make_models, tmp_path, capsys):
    config = make_config({"sampler": {"steps": 1}}, textbook=True, lean=True)
    save_checkpoint(tmp_path / "ckpt", make_models(config), frozen=True)
    save_config(config, tmp_path / "tiny.yaml")
    common = ["--ckpt", str(tmp_path / "ckpt"), "--config", str(tmp_path / "tiny.yaml"), "--device", "cpu"]
    status = call(main, [*common, "--orbits", str(ORBITS), "--list", "test.txt", "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert status == 1  # random weights are not the paper's
    assert "1. weights: all" in text and "2. one object: covers" in text and "views psnr" in text and "DIFFERS" in text
    report = json.loads((tmp_path / "out" / "release.json").read_text())
    assert len(report["table"]) == 6 and (tmp_path / "out" / "object.ply").is_file()
    assert call(main, [*common, "--orbits", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "make the orbits with scripts/render_eval.py" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["views_all", "render_all"])
def test_every_number_of_the_table_is_compared(kind):
    names = {line.name.split()[1] for line in compare_to_paper({}) if line.name.startswith(kind.removesuffix("_all"))}
    assert names == {"psnr", "ssim", "lpips"}
