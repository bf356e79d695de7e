"""The training loop: order of samples, resume after every kind of end, accumulation and processes, EMA, bad input."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ouroboros3d.config.loading import parse_duration
from ouroboros3d.config.schema import TrainConfig
from ouroboros3d.errors import ConfigError
from ouroboros3d.files import OutputError
from ouroboros3d.training.checkpoints import run_lock
from ouroboros3d.training.optimization import SpikeWatch, learning_rate_factor, make_optimizer
from ouroboros3d.training.sample_order import StepBatches, Stream
from ouroboros3d.training.trainer import Trainer, TrainingError


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
    """Fits y = sum(x) plus noise drawn per sample, so that any change of a draw shows in the weights; `dropout` draws
    from the global random state, which a resumed run must restore."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.dropout = nn.Dropout(0.0)
        self.factors: dict[int, float] = {}  # of the loss, by step
        self.gradient_factors: dict[int, float] = {}

    @staticmethod
    def collate(items: list[dict]) -> Batch:
        return Batch(torch.stack([i["x"] for i in items]), [i["id"] for i in items])

    def draw(self, seed: int, step: int, samples: list[int], batch: Batch) -> Tensor:
        self.step = step
        return torch.stack([torch.randn(1, generator=torch.Generator().manual_seed(seed + s)) for s in samples])

    def forward(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        error = self.dropout(self.net(batch.x)) - batch.x.sum(-1, keepdim=True) - 0.1 * noise
        total = (error**2).mean() * self.factors.get(self.step, 1.0)
        if total.requires_grad and self.step in self.gradient_factors:
            factor = self.gradient_factors[self.step]
            total.register_hook(lambda gradient: gradient * factor)
        return {"total": total}


def make(folder: Path, dropout: float = 0.0, settings: dict | None = None, workers: int = 0, **changes) -> Trainer:
    defaults = {"steps": 6, "batch_size": 2, "learning_rate": 0.05, "save_every": 2, "log_every": 1}
    config = TrainConfig(
        **{"output_dir": str(folder), "tracker": "none", "validate_every": 1000, **defaults, **changes}
    )
    torch.manual_seed(0)
    objective = Regression()
    objective.dropout.p = dropout
    settings = settings and {"train": config, **settings}
    return Trainer(objective, Points(), config, cpu=True, settings=settings, workers=workers)


def stop_after(trainer: Trainer, step: int) -> Trainer:
    trainer._should_stop = lambda: trainer.step >= step
    return trainer


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def in_a_process(work: Callable[[], None], rank: int = 0, world: int = 1) -> multiprocessing.Process:
    """Started, in a copy of this process (no imports again) that knows nothing of the trainers before."""

    def start() -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        if world > 1:
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "RANK": rank, "WORLD_SIZE": world}
            os.environ |= {key: str(value) for key, value in (where | {"LOCAL_RANK": rank}).items()}
        work()

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process


def in_two_processes(work: Callable[[], None]) -> list[int]:
    """Their exit codes."""
    global PORT
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        PORT = free.getsockname()[1]
    processes = [in_a_process(work, rank, 2) for rank in range(2)]
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


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


def assert_same_end(one: Trainer, other: Trainer) -> None:
    """Weights, optimiser, EMA, schedule, random state and logged losses, to the bit."""
    assert one.step == other.step and torch.equal(weights(one), weights(other))
    states = [t.optimizer.state_dict()["state"] for t in (one, other)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]
    assert one.schedule.state_dict() == other.schedule.state_dict()
    if one.ema is not None:
        assert all(torch.equal(a, b) for a, b in zip(one.ema.shadow_params, other.ema.shadow_params, strict=True))
    logs = [[(r["step"], r["total"], r["gradient_norm"]) for r in rows(t.folder)] for t in (one, other)]
    assert logs[0] == logs[1]
    assert torch.equal(one.random_state, other.random_state)


def finish(trainer: Trainer) -> Trainer:
    trainer.run()
    trainer.random_state = torch.get_rng_state()
    return trainer


EVERYTHING = {"ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 2, "log_every": 2, "dropout": 0.2}


@pytest.fixture
def whole(tmp_path) -> Trainer:
    """A run of six steps without interruption."""
    return finish(make(tmp_path / "whole", **EVERYTHING))


def test_resume_repeats_the_uninterrupted_run(tmp_path, whole):
    # Between two saves and two logs, whose means then span the interruption.
    first = stop_after(make(tmp_path / "parts", **EVERYTHING), 3)
    assert first.run() == 3
    assert_same_end(whole, finish(make(tmp_path / "parts", **EVERYTHING)))


def test_a_signal_stops_after_the_step_and_loses_nothing(tmp_path, whole, capsys):
    # And with processes that load data, which a terminal's ctrl-C or a scheduler's signal reaches too.
    first = make(tmp_path / "parts", workers=1, **EVERYTHING)
    step = first.train_step

    def interrupted(batches) -> dict[str, float]:
        losses = step(batches)
        for pid in (*(child.pid for child in multiprocessing.active_children()), os.getpid()):
            os.kill(pid, signal.SIGTERM)
        return losses

    first.train_step = interrupted
    assert first.run() == 1
    assert first.stopped_by == signal.SIGTERM
    assert "stopped at step 1: SIGTERM" in capsys.readouterr().out
    assert_same_end(whole, finish(make(tmp_path / "parts", **EVERYTHING)))


@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_killed_while_a_checkpoint_is_written(tmp_path, whole, moment):
    """kill -9 before anything of step 4's checkpoint is there, between its files, and between rename and rotation."""

    def train_until_killed() -> None:
        trainer = make(tmp_path / "parts", **EVERYTHING)
        owner, name = {
            "before": (trainer.checkpoints, "begin"),
            "while": (trainer.checkpoints, "commit"),
            "after": (trainer.checkpoints, "rotate"),
        }[moment]
        method = getattr(owner, name)

        def killed(*arguments) -> None:
            if trainer.step == 4:
                (trainer.folder / "metrics.jsonl").open("a").write('{"step": 4, "ki')  # a torn line too
                os.kill(os.getpid(), signal.SIGKILL)
            method(*arguments)

        setattr(owner, name, killed)
        trainer.run()

    process = in_a_process(train_until_killed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    found = saved(tmp_path / "parts")
    assert found == [*([".tmp_step_00000004"] if moment == "while" else []), "step_00000002"] + (
        ["step_00000004"] if moment == "after" else []
    )
    again = make(tmp_path / "parts", **EVERYTHING)
    assert_same_end(whole, finish(again))
    assert saved(tmp_path / "parts") == ["step_00000004", "step_00000006"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0")]
)
def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(tmp_path, whole, error, monkeypatch):
    trainer = make(tmp_path / "parts", **EVERYTHING)
    save_state = trainer.accelerator.save_state

    def full(folder: str) -> None:
        save_state(folder)
        if trainer.step == 4:
            raise error

    trainer.accelerator.save_state = full
    free = 0 if isinstance(error, RuntimeError) else 2**40  # torch does not say that it is for want of room
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    reason = "the disk is full" if free == 0 else "No space left on device"
    with pytest.raises(TrainingError, match=rf"cannot save .*step_00000004 \(.*{reason}\); .*make room and") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert saved(tmp_path / "parts") == ["step_00000002"]
    assert_same_end(whole, finish(make(tmp_path / "parts", **EVERYTHING)))


def test_accumulation_equals_one_large_batch(tmp_path):
    large = make(tmp_path / "a", batch_size=4)
    large.run()  # before the other is built: accelerate's gradient state is one per process
    small = make(tmp_path / "b", batch_size=2, gradient_accumulation=2)
    small.run()
    torch.testing.assert_close(weights(large), weights(small), rtol=0, atol=1e-6)


def test_ema_goes_to_the_device_after_a_resume(tmp_path, monkeypatch):
    """accelerate leaves it on the CPU, where a step on a GPU would fail (tests/test_device_mixing.py)."""
    stop_after(make(tmp_path, ema_decay=0.5), 2).run()
    trainer, moved = make(tmp_path, ema_decay=0.5), []
    monkeypatch.setattr(trainer.ema, "to", moved.append)
    trainer.resume()
    assert moved == [trainer.accelerator.device]


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


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "trainer.json"])
def test_damaged_newest_checkpoint_falls_back(tmp_path, capsys, name):
    make(tmp_path).run()
    path = tmp_path / "checkpoints" / "step_00000006" / name
    path.write_bytes(path.read_bytes()[:-20])
    trainer = make(tmp_path)
    trainer.resume()
    assert trainer.step == 4
    assert f"step_00000006: {name} is damaged; trying the checkpoint before it" in capsys.readouterr().out


def test_one_folder_is_for_one_training_at_a_time(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    other = rf"another training \(process {os.getpid()}\) writes there; stop it"
    with run_lock(tmp_path), pytest.raises(TrainingError, match=other):
        trainer.run()
    assert trainer.step == 0 and trainer.run() == 6

    def read_only(*_, **_options) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("filelock.FileLock.acquire", read_only)
    with pytest.raises(OutputError, match="Read-only file system; choose another"):
        trainer.run()


def test_tensorboard_s_curve_has_every_step_once(tmp_path):
    """Also where the run ended steps after the checkpoint that it resumes from."""
    first = stop_after(make(tmp_path, tracker="tensorboard"), 3)
    first.save = lambda: first.step == 2 and Trainer.save(first)
    first.run()
    assert saved(tmp_path) == ["step_00000002"]
    make(tmp_path, tracker="tensorboard").run()
    events = EventAccumulator(str(tmp_path / "ouroboros3d")).Reload().Scalars("train/total")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_checkpoint_is_never_seen(tmp_path, monkeypatch):
    trainer = make(tmp_path, steps=2)
    trainer.run()
    trainer.step = 4
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    monkeypatch.undo()
    again = make(tmp_path, steps=2)
    again.resume()
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


@pytest.mark.parametrize(
    ("where", "factor", "words"),
    [
        ("factors", float("nan"), "the loss is nan at step 3"),
        ("factors", float("inf"), "the loss is inf at step 3"),
        ("gradient_factors", float("nan"), "the gradient is not finite at step 3"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, where, factor, words):
    """Stops with a saved state from before it; whoever removes the cause ends as if nothing had been."""
    whole = finish(make(tmp_path / "whole", **EVERYTHING | {"dropout": 0.0}))  # the step draws from no global state
    trainer = make(tmp_path / "parts", **EVERYTHING | {"dropout": 0.0})
    getattr(trainer.objective, where)[3] = factor
    with pytest.raises(TrainingError, match=words) as caught:
        trainer.run()
    samples = dict(trainer.stream.key(n)[::2] for n in (6, 7))
    assert all(str(index) in str(caught.value).split("objects ")[1] for index in samples.values())
    report = json.loads((tmp_path / "parts" / "stopped.json").read_text())
    assert report["samples"] == {str(n): str(index) for n, index in samples.items()}
    assert saved(tmp_path / "parts") == ["step_00000002", "step_00000003"]
    assert_same_end(whole, finish(make(tmp_path / "parts", **EVERYTHING | {"dropout": 0.0})))


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


def test_the_best_checkpoint_stays_and_is_exported(tmp_path):
    """Also over a resume: 5 at step 2 is not beaten by 4 at step 4, but by 6 at step 6."""
    scores = {1: 1.0, 2: 5.0, 3: 3.0, 4: 4.0, 5: 2.0, 6: 6.0}
    exports = []

    def run(**changes) -> Trainer:
        trainer = make(tmp_path, validate_every=1, save_every=1, keep=1, best_metric=["absent", "score"], **changes)
        trainer.validate = lambda: ({"score": scores[trainer.step]}, {})
        trainer.export = lambda folder: exports.append((trainer.step, Path(folder).name))
        trainer.run()
        return trainer

    run(steps=3)
    assert saved(tmp_path) == ["step_00000002", "step_00000003"]
    assert json.loads((tmp_path / "best" / "validation.json").read_text()) == {"step": 2, "score": 5.0}
    trainer = run(steps=5)
    assert trainer.best == {"step": 2, "metric": "score", "value": 5.0}
    assert saved(tmp_path) == ["step_00000002", "step_00000005"]
    run(steps=6)
    assert saved(tmp_path) == ["step_00000006"]
    assert [step for step, name in exports if name != "export"] == [1, 2, 6]


def test_the_best_may_be_the_lowest(tmp_path):
    trainer = make(tmp_path, best_metric=["score"], best_direction="min")
    assert [trainer._is_best({"score": score}) for score in (3.0, 4.0, 3.0, 2.0)] == [True, False, False, True]


MODEL = {"model": {"width": 8}, "data": {"root": "a"}}


def test_a_resume_with_another_configuration(tmp_path, capsys):
    make(tmp_path, settings=MODEL).run()
    with pytest.raises(
        TrainingError, match=r"step_00000006 is of another configuration: model\.width 8 -> 16, train\.seed 0 -> 1;"
    ):
        make(tmp_path, settings={"model": {"width": 16}, "data": {"root": "b"}}, seed=1, steps=8).run()
    with pytest.raises(TrainingError, match=r"ema_decay 0\.0 -> 0\.9"):
        make(tmp_path, settings=MODEL, ema_decay=0.9).run()
    capsys.readouterr()
    trainer = make(tmp_path, settings=MODEL | {"data": {"root": "b"}}, steps=8, learning_rate=0.01)
    assert trainer.run() == 8
    assert (
        "changed since: data.root a -> b, train.learning_rate 0.05 -> 0.01, train.steps 6 -> 8"
        in capsys.readouterr().out
    )
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


def test_checkpoints_of_older_code_are_resumed(tmp_path, whole):
    stop_after(make(tmp_path / "parts", **EVERYTHING), 4).run()
    for folder in (tmp_path / "parts" / "checkpoints").iterdir():
        (folder / "config.yaml").unlink()
        state = json.loads((folder / "trainer.json").read_text())
        (folder / "trainer.json").write_text(json.dumps({key: state[key] for key in ("step", "seconds")}))
    assert_same_end(whole, finish(make(tmp_path / "parts", **EVERYTHING)))


def test_a_resume_may_split_the_batch_otherwise_but_not_change_it(tmp_path):
    whole = make(tmp_path / "whole", batch_size=4)
    whole.run()
    stop_after(make(tmp_path / "parts", batch_size=4), 3).run()
    with pytest.raises(TrainingError, match=r"trained with 4 samples a step, and now these are 2: choose .* make 4"):
        make(tmp_path / "parts", batch_size=2).run()
    parts = make(tmp_path / "parts", batch_size=1, gradient_accumulation=4)
    parts.run()
    torch.testing.assert_close(weights(whole), weights(parts), rtol=0, atol=1e-6)


def test_two_processes_go_on_as_one_with_accumulation(tmp_path):
    """3 steps by two processes, 3 by one: the same losses and weights as one process alone, to rounding."""
    settings = {"batch_size": 2, "log_every": 1, "ema_decay": 0.9}
    one = make(tmp_path / "one", gradient_accumulation=2, **settings)
    one.run()
    assert in_two_processes(lambda: stop_after(make(tmp_path / "two", **settings), 3).run()) == [0, 0]
    assert [row["step"] for row in rows(tmp_path / "two")] == [1, 2, 3]
    two = make(tmp_path / "two", gradient_accumulation=2, **settings)
    two.run()
    torch.testing.assert_close(weights(one), weights(two), rtol=0, atol=1e-6)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["total"] == pytest.approx(b["total"], abs=1e-6)
    for a, b in zip(one.ema.shadow_params, two.ema.shadow_params, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


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


def test_starting_over_sets_the_old_checkpoints_aside(tmp_path):
    make(tmp_path).run()
    make(tmp_path, resume="never", steps=2).run()
    assert saved(tmp_path) == ["aside_step_00000004", "aside_step_00000006", "step_00000002"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def with_scaler(trainer: Trainer) -> Trainer:
    """fp16's, which accelerate makes on a GPU alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.accelerator._optimizers = [trainer.optimizer]
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
    return trainer


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
    runs = [path.name.rpartition("-")[2] for path in (tmp_path / "offline" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len(set(runs)) == 1  # one run to wandb
    assert (tmp_path / "offline" / "validation" / "0000006_turn.mp4").stat().st_size > 0
