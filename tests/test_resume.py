"""A run that ended in any way goes on as if it had not; damaged checkpoints, those kept and those of other settings."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_training import (
    EVERYTHING,
    assert_same_end,
    finish,
    in_a_process,
    in_two_processes,
    make,
    rows,
    saved,
    stop_after,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ouroboros3d.config.loading import as_kwargs, flatten_keys
from ouroboros3d.config.schema import Config
from ouroboros3d.files import OutputError
from ouroboros3d.training.checkpoints import differences, run_lock
from ouroboros3d.training.trainer import Trainer, TrainingError


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
    assert "stopped at step 1: SIGTERM; resume with the same command\n" in capsys.readouterr().out
    assert_same_end(whole, finish(make(tmp_path / "parts", **EVERYTHING)))


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("begin", ["step_00000002"]),
        ("commit", [".tmp_step_00000004", "step_00000002"]),
        ("rotate", ["step_00000002", "step_00000004"]),
    ],
)
def test_killed_while_a_checkpoint_is_written(tmp_path, whole, method, found):
    """kill -9 before anything of step 4's checkpoint is there, between its files, and between rename and rotation."""

    def train_until_killed() -> None:
        trainer = make(tmp_path / "parts", **EVERYTHING)
        original = getattr(trainer.checkpoints, method)

        def killed(*arguments) -> None:
            if trainer.step == 4:
                (trainer.folder / "metrics.jsonl").open("a").write('{"step": 4, "ki')  # a torn line too
                os.kill(os.getpid(), signal.SIGKILL)
            original(*arguments)

        setattr(trainer.checkpoints, method, killed)
        trainer.run()

    process = in_a_process(train_until_killed)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert saved(tmp_path / "parts") == found
    assert_same_end(whole, finish(make(tmp_path / "parts", **EVERYTHING)))
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


def test_ema_goes_to_the_device_after_a_resume(tmp_path, monkeypatch):
    """accelerate leaves it on the CPU, where a step on a GPU would fail (tests/test_device_mixing.py)."""
    stop_after(make(tmp_path, ema_decay=0.5), 2).run()
    trainer, moved = make(tmp_path, ema_decay=0.5), []
    monkeypatch.setattr(trainer.ema, "to", moved.append)
    trainer.resume()
    assert moved == [trainer.accelerator.device]


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


def test_a_best_metric_that_validation_lacks_is_said(tmp_path, caplog):
    trainer = make(tmp_path, best_metric=["scoer"])
    assert not trainer._is_best({"score": 1.0, "other": 2.0})
    assert "train.best_metric = ['scoer']: validation has score, other, so best/ is not kept" in caplog.text


def test_the_best_may_be_the_lowest(tmp_path):
    trainer = make(tmp_path, best_metric=["score"], best_direction="min")
    assert [trainer._is_best({"score": score}) for score in (3.0, 4.0, 3.0, 2.0)] == [True, False, False, True]


MODEL = {"model": {"width": 8}, "data": {"root": "a"}}


def test_a_resume_with_another_configuration(tmp_path, capsys):
    make(tmp_path, settings=MODEL).run()
    with pytest.raises(
        TrainingError, match=r"step_00000006 is of another configuration: model\.width 8 -> 16, train\.seed 0 -> 1, "
    ):
        make(tmp_path, settings={"model": {"width": 16}, "data": {"root": "b"}}, seed=1, steps=8).run()
    with pytest.raises(TrainingError, match=r"ema_decay 0\.0 -> 0\.9"):
        make(tmp_path, settings=MODEL, ema_decay=0.9).run()
    named = str(tmp_path / "checkpoints" / "step_00000006")
    changes = {"settings": MODEL | {"data": {"root": "b"}}, "steps": 8, "learning_rate": 0.01}
    with pytest.raises(TrainingError, match=rf": data\.root a -> b; set these back, .* by train\.resume={named}$"):
        make(tmp_path, **changes).run()
    assert saved(tmp_path) == ["step_00000004", "step_00000006"]
    capsys.readouterr()
    trainer = make(tmp_path, **changes, resume=named)
    assert trainer.run() == 8
    assert (
        "changed since: data.root a -> b, train.learning_rate 0.05 -> 0.01, train.steps 6 -> 8"
        in capsys.readouterr().out
    )
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("fixed", ["model.lgm.groups", "objective.freeze", "train.optimizer", "cameras.num_views"]),
        ("defining", ["objective.reconstruction", "data.root", "data.train", "data.mirror", "model.pretrained.lgm"]),
        ("defining", ["model.conventions.rays", "model.conventions.decode_chunk"]),
        ("free", ["train.steps", "train.time_budget", "train.learning_rate", "train.tracker", "train.validate_every"]),
        ("free", ["data.val", "data.cache_dir", "data.workers", "model.conventions.renderer", "sampler.steps"]),
    ],
)
def test_what_a_change_of_a_key_is(kind, keys):
    old = flatten_keys(as_kwargs(Config()))
    found = differences(old, old | dict.fromkeys(keys, "another"))
    assert found[kind] == [f"{key} {old[key]} -> another" for key in sorted(keys)]
    assert not any(lines for name, lines in found.items() if name != kind)


def test_a_path_may_be_seen_from_another_folder():
    """Which is printed, since it may be another file of that name."""
    old = flatten_keys(as_kwargs(Config())) | {"data.root": "data/orbits", "model.pretrained.lgm": "runs/lgm/"}
    found = differences(old, old | {"data.root": "/home/me/data/orbits", "model.pretrained.lgm": "runs/lgm"})
    assert found["free"] == [
        "data.root data/orbits -> /home/me/data/orbits",
        "model.pretrained.lgm runs/lgm/ -> runs/lgm",
    ]
    assert not found["fixed"] + found["defining"]


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
    with pytest.raises(TrainingError, match=r"trained with 4 samples per step, and now these are 2: choose .* make 4"):
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


def test_starting_over_sets_the_old_checkpoints_aside(tmp_path):
    make(tmp_path).run()
    make(tmp_path, resume="never", steps=2).run()
    assert saved(tmp_path) == ["aside_step_00000004", "aside_step_00000006", "step_00000002"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
