"""The plan of the small model's script: its stages are files, its budget becomes steps."""

import re
from pathlib import Path

import pytest
import torch

from ouroboros3d.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def plan(load_script):
    return load_script("plan_stages")


def test_every_stage_of_the_script_has_a_file(plan):
    script = (ROOT / "scripts" / "train_small.sh").read_text()
    stages = [plan.parse_stage(s) for s in re.search(r"^stages=\((.*)\)$", script, re.M)[1].split()]
    assert len(stages) > 5
    assert all((ROOT / "configs" / "small" / f"{name}.yaml").is_file() for name, _ in stages)
    assert sum(percent for _, percent in stages) <= 100


def test_a_share_becomes_steps_and_fixed_stages_keep_theirs(plan, monkeypatch, capsys):
    monkeypatch.setattr(plan, "step_seconds", lambda *_: 2.0)
    plan.main(["--budget_seconds", "1000", "image_encoder:0", "unet:40", "train.batch_size=4"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:4]]
    assert rows[0][3:5] == ["600", "2400"]
    assert rows[1][2:5] == ["2.00", "200", "800"]


def test_a_step_is_timed(plan):
    from ouroboros3d.config.loading import load_config

    data = [f"data.root={ROOT / 'tests' / 'data' / 'orbits'}", "data.cache=none", "train.mixed_precision=fp32"]
    config = load_config(ROOT / "configs" / "small" / "image_encoder.yaml", [*data, "train.batch_size=2"])
    assert plan.step_seconds("image_encoder", config, torch.device("cpu")) > 0


@pytest.mark.parametrize("text", ["unet", "unet:", "unet:x"])
def test_what_is_no_stage_is_refused(plan, text):
    with pytest.raises(UserError, match="STAGE:PERCENT"):
        plan.parse_stage(text)
