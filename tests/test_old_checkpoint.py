"""A run begun with much older code resumes: its configuration, names of weights and random state.

tests/data/old_run is what the code of commit 14cc34e left of step 2 of 4: LGM alone, of a few thousand parameters, on
the orbits that `write_orbits` makes. NEXT is what it logged in its own steps 3 and 4.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_train import write_orbits

CHECKPOINT = Path(__file__).parent / "data" / "old_run" / "step_00000002"
NEXT = {
    3: {"total": 0.17772366106510162, "gradient_norm": 0.7715154886245728, "learning_rate": 0.00014644660940672628},
    4: {"total": 0.1789902299642563, "gradient_norm": 0.7345799803733826, "learning_rate": 0.0},
}


def test_it_resumes_and_goes_on_as_it_would_have(tmp_path, capsys):
    from ouroboros3d.cli.train import main

    write_orbits(tmp_path / "orbits")
    shutil.copytree(CHECKPOINT, tmp_path / "run" / "checkpoints" / CHECKPOINT.name)
    where = [f"data.root={tmp_path / 'orbits'}", f"train.output_dir={tmp_path / 'run'}"]
    assert main(["--config", str(CHECKPOINT / "config.yaml"), "--device", "cpu", *where]) == 0
    assert f"resumed from {tmp_path / 'run' / 'checkpoints' / CHECKPOINT.name}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 4]
    for row in rows:
        for name, value in NEXT[row["step"]].items():
            assert row[name] == pytest.approx(value, rel=1e-4), name
