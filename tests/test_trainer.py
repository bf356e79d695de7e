"""The training loop: order of samples, resume, accumulation, EMA, budgets, damaged checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ouroboros3d.config import ConfigError, TrainConfig
from ouroboros3d.trainer import StepBatches, Stream, Trainer, TrainingError, parse_duration


class Points(torch.utils.data.Dataset):
    """Item (epoch, index) is a number that tells both apart."""

    def __len__(self) -> int:
        return 7

    def example(self, epoch: int, index: int) -> dict:
        return {"x": torch.tensor([float(index), float(epoch), 1.0]) / 7, "id": str(index)}


@dataclass(frozen=True)
class Batch:
    x: Tensor
    ids: list[str]

    def to(self, device) -> Batch:
        return Batch(self.x.to(device), self.ids)


class Regression(nn.Module):
    """Fits y = sum(x) plus noise drawn per sample, so that any change of a draw shows in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.break_at = None

    @staticmethod
    def collate(items: list[dict]) -> Batch:
        return Batch(torch.stack([i["x"] for i in items]), [i["id"] for i in items])

    def draw(self, seed: int, step: int, samples: list[int], batch: Batch) -> Tensor:
        self.step = step
        return torch.stack([torch.randn(1, generator=torch.Generator().manual_seed(seed + s)) for s in samples])

    def forward(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        error = self.net(batch.x) - batch.x.sum(-1, keepdim=True) - 0.1 * noise
        total = (error**2).mean()
        return {"total": total * float("nan") if self.break_at == self.step else total}


def make(folder: Path, **changes) -> Trainer:
    settings = {"steps": 6, "batch_size": 2, "learning_rate": 0.05, "save_every": 2, "log_every": 1} | changes
    config = TrainConfig(output_dir=str(folder), tracker="none", validate_every=1000, **settings)
    torch.manual_seed(0)
    return Trainer(Regression(), Points(), config, cpu=True)


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parameters])


def test_an_epoch_holds_every_item_once_and_epochs_differ():
    stream = Stream(Points(), seed=3)
    keys = [stream.key(n) for n in range(21)]
    orders = [[k[2] for k in keys[7 * e : 7 * e + 7]] for e in range(3)]
    assert [k[1] for k in keys] == [0] * 7 + [1] * 7 + [2] * 7
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] != orders[1]


def test_two_processes_see_the_samples_one_would_with_accumulation():
    config = TrainConfig(steps=3, batch_size=2)
    stream = Stream(Points(), seed=0)
    ranks = [list(StepBatches(stream, config, rank, 2, 0)) for rank in range(2)]
    one = list(StepBatches(stream, replace(config, gradient_accumulation=2), 0, 1, 0))
    assert [k for pair in zip(*ranks, strict=True) for micro in pair for k in micro] == [k for m in one for k in m]


def test_resume_repeats_the_uninterrupted_run(tmp_path):
    changes = {"ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 2}
    whole = make(tmp_path / "whole", **changes)
    whole.run()
    first = make(tmp_path / "parts", **changes)
    first._should_stop = lambda: first.step >= 3  # an interruption between two saves
    first.run()
    assert first.step == 3
    second = make(tmp_path / "parts", **changes)
    assert second.run() == 6
    assert torch.equal(weights(whole), weights(second))
    assert all(torch.equal(a, b) for a, b in zip(whole.ema.shadow_params, second.ema.shadow_params, strict=True))
    losses = [
        [json.loads(line)["total"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]


def test_accumulation_equals_one_large_batch(tmp_path):
    large = make(tmp_path / "a", batch_size=4)
    large.run()  # before the other is built: accelerate's gradient state is one per process
    small = make(tmp_path / "b", batch_size=2, gradient_accumulation=2)
    small.run()
    torch.testing.assert_close(weights(large), weights(small), rtol=0, atol=1e-6)


def test_ema_is_what_validation_and_export_see(tmp_path):
    seen = {}
    trainer = make(tmp_path, ema_decay=0.5, steps=4)
    trainer.export = lambda folder: seen.update(exported=weights(trainer))
    trainer.run()
    ema = torch.cat([p.flatten() for p in trainer.ema.shadow_params])
    assert torch.equal(seen["exported"], ema)
    assert not torch.equal(weights(trainer), ema)


def test_damaged_newest_checkpoint_falls_back(tmp_path, capsys):
    make(tmp_path).run()
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    (newest / "model.safetensors").write_bytes(b"half")
    trainer = make(tmp_path)
    trainer._resume()
    assert trainer.step == 4
    assert "step_00000006 cannot be resumed" in capsys.readouterr().out


def test_a_half_written_checkpoint_is_never_seen(tmp_path, monkeypatch):
    trainer = make(tmp_path, steps=2)
    trainer.run()
    trainer.step = 4
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer._save()
    monkeypatch.undo()
    again = make(tmp_path, steps=2)
    again._resume()
    assert again.step == 2


def test_keeps_the_last_k(tmp_path):
    make(tmp_path, keep=2).run()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]


def test_no_fitting_checkpoint_is_an_error(tmp_path):
    make(tmp_path, steps=2).run()
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "trainer.json").write_text("{")
    with pytest.raises(TrainingError, match="resume=never"):
        make(tmp_path).run()
    make(tmp_path, resume="never").run()


def test_nan_stops_with_the_objects_named(tmp_path):
    trainer = make(tmp_path)
    trainer.objective.break_at = 3
    with pytest.raises(TrainingError, match=r"not finite at step 3 .*objects"):
        trainer.run()
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()


def test_time_budget_saves_and_stops(tmp_path, capsys):
    trainer = make(tmp_path, time_budget="0.000001s")
    assert trainer.run() == 1
    assert "time budget" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir()


@pytest.mark.parametrize(("text", "seconds"), [("", 0), ("90m", 5400), ("7h", 25200), ("30s", 30), ("12", 12)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


def test_bad_duration_names_the_key():
    with pytest.raises(ConfigError, match=r"train\.time_budget"):
        parse_duration("soon")
