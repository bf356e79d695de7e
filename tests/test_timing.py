"""The stopwatch: seconds by part, and on CUDA no waiting inside the loop."""

import pytest
import torch

from ouroboros3d.timing import Stopwatch


def test_seconds_add_up_by_name():
    ticks = iter([0.0, 1.0, 5.0, 7.0, 10.0, 10.5])
    clock = Stopwatch(timer=lambda: next(ticks))
    for name in ("unet", "decode", "unet"):
        with clock(name):
            pass
    assert dict(clock.seconds) == {"unet": 1.5, "decode": 2.0}
    assert clock.summary() == "decode 2.0 s, unet 1.5 s"
    clock.reset()
    assert not clock.seconds


def test_a_part_that_fails_is_timed():
    ticks = iter([0.0, 3.0])
    clock = Stopwatch(timer=lambda: next(ticks))
    with pytest.raises(KeyError), clock("unet"):
        raise KeyError
    assert clock.seconds["unet"] == 3.0


def test_on_cuda_events_are_waited_for_only_when_the_seconds_are_read(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            log.append("record")

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, _end: "Event") -> float:
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    clock = Stopwatch()
    for _ in range(2):
        with clock("unet", "cuda:1"):
            pass
    assert log == ["record"] * 4
    assert clock.seconds["unet"] == 3.0 and log[4:] == ["wait"] * 2
    assert clock.seconds["unet"] == 3.0 and len(log) == 6
    monkeypatch.setattr("ouroboros3d.timing.MANY", 3)
    for _ in range(4):  # nobody asks
        with clock("unet", "cuda:1"):
            pass
    assert not clock._events and "wait" not in log[6:] and clock.seconds["unet"] == 9.0
