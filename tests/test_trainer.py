"""The training loop: order of samples, accumulation and processes, EMA, what stops it, its logs, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import Points, Regression, in_two_processes, make, rows, saved, stop_after, weights, with_scaler
from torch import Tensor, nn

from ouroboros3d.config.loading import parse_duration
from ouroboros3d.config.schema import TrainConfig
from ouroboros3d.errors import ConfigError
from ouroboros3d.training.optimization import SpikeWatch, learning_rate_factor, make_optimizer
from ouroboros3d.training.sample_order import Stream
from ouroboros3d.training.trainer import Trainer, TrainingError


def test_an_epoch_holds_every_item_once_and_epochs_differ():
    stream = Stream(Points(), seed=3)
    keys = [stream.key(n) for n in range(21)]
    orders = [[k[2] for k in keys[7 * e : 7 * e + 7]] for e in range(3)]
    assert [k[1] for k in keys] == [0] * 7 + [1] * 7 + [2] * 7
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert orders[0] != orders[1]


def test_every_process_validates(tmp_path):
    """Were one to do it alone, NCCL would give the others up after ten minutes."""

    def work() -> None:
        trainer = make(tmp_path, validate_every=1, steps=1, batch_size=1)
        rank = trainer.accelerator.process_index
        trainer.validate = lambda: (tmp_path / f"seen_by_{rank}").touch() or ({"score": 1.0}, {})
        trainer.run()

    assert in_two_processes(work) == [0, 0]
    assert {p.name for p in tmp_path.glob("seen_by_*")} == {"seen_by_0", "seen_by_1"}


def test_ema_is_what_validation_and_export_see(tmp_path):
    seen = {}
    trainer = make(tmp_path, ema_decay=0.5, steps=4)
    trainer.export = lambda folder: seen.update(exported=weights(trainer))
    trainer.run()
    ema = torch.cat([p.flatten() for p in trainer.ema.shadow_params])
    assert torch.equal(seen["exported"], ema)
    assert not torch.equal(weights(trainer), ema)


def test_a_loss_spike_stops_and_older_checkpoints_stay(tmp_path):
    trainer = make(tmp_path, steps=60, save_every=10, keep=1, spike_factor=100.0, spike_steps=2)
    trainer.objective.factors = {35: 1e4} | dict.fromkeys(range(41, 50), 1e4)  # one step alone is no spike
    with pytest.raises(TrainingError, match=r"2\. in a row over train.spike_factor = 100 .* at step 42"):
        trainer.run()
    assert saved(tmp_path) == ["step_00000040", "step_00000042"]


def test_the_watch_goes_on_where_it_was():
    watch, again = SpikeWatch(10, 2), SpikeWatch(10, 2)
    assert not any(watch.spikes(1.0) for _ in range(30)) and not watch.spikes(11.0)
    again.restore(json.loads(json.dumps(watch.state())))
    assert again.spikes(11.0)
    off = SpikeWatch(0, 1)
    assert not any(off.spikes(x) for x in [1.0] * 30 + [1e9])


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


def test_a_nan_in_one_process_stops_both_and_names_all_objects(tmp_path):
    def work() -> None:
        trainer = make(tmp_path)
        if trainer.accelerator.process_index == 1:
            trainer._unwrapped.factors[3] = float("nan")
        with pytest.raises(TrainingError, match="the loss is nan at step 3"):
            trainer.run()
        assert trainer.step == 3

    assert in_two_processes(work) == [0, 0]
    assert sorted(json.loads((tmp_path / "stopped.json").read_text())["samples"]) == ["12", "13", "14", "15"]
    assert saved(tmp_path) == ["step_00000002", "step_00000003"]


def test_the_scaler_of_fp16_is_kept(tmp_path):
    """Its scale after growing is what a resumed run starts with."""
    whole = with_scaler(make(tmp_path / "whole"))
    whole.run()
    stop_after(with_scaler(make(tmp_path / "parts")), 3).run()
    parts = with_scaler(make(tmp_path / "parts"))
    parts.run()
    scalers = [t.accelerator.scaler.state_dict() for t in (whole, parts)]
    assert scalers[0] == scalers[1] and scalers[0]["scale"] == 32.0
    assert torch.equal(weights(whole), weights(parts))


def test_fp16_goes_on_after_an_overflow_but_not_for_ever(tmp_path):
    """A step whose gradients overflow changes no weight and lowers the scale."""
    trainer = with_scaler(make(tmp_path, steps=40))
    trainer.objective.gradient_factors = {0: float("inf")} | dict.fromkeys(range(5, 40), float("inf"))
    with pytest.raises(TrainingError, match="the gradient is not finite at step 25"):
        trainer.run()
    assert torch.isfinite(weights(trainer)).all() and trainer.accelerator.scaler.get_scale() == 8 / 2**20


def test_the_log_has_speed_and_the_parts_of_a_step(tmp_path):
    make(tmp_path, log_every=3).run()
    for row in rows(tmp_path):
        parts = [row[f"seconds_{name}"] for name in ("data", "backward", "optimizer")]
        assert all(part > 0 for part in parts) and sum(parts) < 2 / row["samples_per_second"]
        assert row["memory_gib"] > 0.05 and row["gradient_norm"] > 0 and row["learning_rate"] == 0.05


def test_optimizers_by_name():
    def trained(name: str) -> Tensor:
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
        optimizer = make_optimizer(net.parameters(), TrainConfig(optimizer=name, learning_rate=0.1))
        for _ in range(3):
            net(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
        return net.weight.detach()

    torch.testing.assert_close(trained("adamw"), trained("adamw_fused"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"train\.optimizer = 'adamw_8bit': runs on CUDA"):
            trained("adamw_8bit")


def test_eight_bit_without_its_library_names_the_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        make_optimizer([nn.Parameter(torch.zeros(1))], TrainConfig(optimizer="adamw_8bit"))


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.5, 0]), ("cosine", [0.5, 1, 1, 0.5, 0])],
)
def test_schedules_after_two_steps_of_warm_up(schedule, factors):
    config = TrainConfig(schedule=schedule, warmup_steps=2, steps=10)
    assert [learning_rate_factor(config, step) for step in (0, 1, 2, 6, 10)] == pytest.approx(factors)
    assert learning_rate_factor(config, 2, budget_used=1.0) == (1 if schedule == "constant" else 0)


def test_what_cannot_be_trained_is_refused_at_once(tmp_path):
    with pytest.raises(TrainingError, match=r"4 \(train\.batch_size\) x 2 .* x 1 processes are 8 samples .* has 7"):
        make(tmp_path, batch_size=4, gradient_accumulation=2)
    with pytest.raises(ConfigError, match="fp16"):
        make(tmp_path, mixed_precision="fp16")
    with pytest.raises(ConfigError, match="nothing is trained"):
        config = TrainConfig(output_dir=str(tmp_path), tracker="none", batch_size=1)
        Trainer(Regression().requires_grad_(False), Points(), config, cpu=True)


def test_wandb_offline_and_without_a_key(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # it reads the environment once
    with pytest.raises(TrainingError, match=r"train\.tracker = wandb: No API key.*WANDB_MODE=offline"):
        make(tmp_path / "online", tracker="wandb").run()
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    trainer = make(tmp_path / "offline", tracker="wandb", validate_every=6)
    video = [np.full((4, 4, 3), 9 * k, np.uint8) for k in range(12)]
    trainer.validate = lambda: ({"score": 1.0}, {"grid": Image.new("RGB", (4, 4)), "turn": video})
    trainer.run()
    (images,) = (tmp_path / "offline" / "wandb").glob("offline-run-*/files/media/images/validation")
    assert len(list(images.glob("grid*.png"))) == 1 and len(list(images.glob("turn*.png"))) == 8
    assert list((tmp_path / "offline" / "wandb").glob("offline-run-*/*.wandb"))
    make(tmp_path / "offline", tracker="wandb", steps=7).run()
    # offline-run-<second>-<id>, and -1 behind it where both are of one second
    runs = [path.name.split("-")[3] for path in (tmp_path / "offline" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1  # one run to wandb
    assert (tmp_path / "offline" / "validation" / "0000006_turn.mp4").stat().st_size > 0
