"""The benchmark of training steps: what is compiled is timed compiled, and no row holds another's memory."""

from __future__ import annotations

import time
import weakref
from argparse import Namespace
from types import SimpleNamespace

from small_training import Points, Regression, make

from ouroboros3d.timing import COMPILED_WARM_UP
from ouroboros3d.training import benchmark as module
from ouroboros3d.training.trainer import Trainer


def test_compiled_steps_are_timed_compiled(tmp_path):
    events = []

    def backend(graph, _inputs):
        events.append("compiled")
        return lambda *inputs: events.append("ran") or graph(*inputs)

    trainer = make(tmp_path, compile=True)
    trainer.objective.compile(backend=backend, dynamic=True)
    module.measure(trainer, 2, time.perf_counter)
    assert events == ["compiled"] + ["ran"] * (COMPILED_WARM_UP + 2)


def test_a_trainer_is_gone_before_the_next_is_made(monkeypatch):
    alive, before = weakref.WeakSet(), []

    class Watched(Trainer):
        def __init__(self, *args, **kwargs) -> None:
            before.append(len(alive))
            super().__init__(*args, **kwargs)
            alive.add(self)

    monkeypatch.setattr(module, "Trainer", Watched)
    monkeypatch.setattr(module, "build_dataset", lambda *_: Points())
    monkeypatch.setattr(module, "build_models", lambda _config: SimpleNamespace(to=lambda _device: None))
    monkeypatch.setattr(module, "build_objective", lambda _models, _config: Regression())
    changes = ["train.batch_size=1", "train.mixed_precision=fp32"]
    options = {"config": "configs/small/joint.yaml", "overrides": changes, "weights": None}
    options |= {"rows": ["one pass", "two passes"]}
    module.benchmark(Namespace(**options, cpu_time=False, device="cpu", steps=1, json=None))
    assert before == [0, 0, 0]  # a row each, and the one that resumes
