"""Seconds per part of a loop."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

MANY = 1000  # events that wait to be read
COMPILED_WARM_UP = 3  # calls of a compiled network before it runs at its speed: compiling, recording a graph, a replay


class Stopwatch:
    """`with clock("unet", device): ...` adds up the seconds of each name in `seconds`.

    CUDA runs ahead of Python: there the seconds lie between two events in its queue, which are waited for only when
    `seconds` is read. The `timer` of the CPU may be time.process_time, which leaves out what other programs take of a
    shared core.
    """

    def __init__(self, timer: Callable[[], float] = time.perf_counter) -> None:
        self.timer = timer
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str, device: torch.device | str = "cpu") -> Iterator[None]:
        if torch.device(device).type == "cuda" and torch.cuda.is_available():  # not for simulated tensors
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(device)  # of that GPU, which need not be the current one
            begin.record(stream)
            try:
                yield
            finally:
                end.record(stream)
                self._events.append((name, begin, end))
                if len(self._events) > MANY:
                    self._fold([event for event in self._events if event[2].query()])
            return
        start = self.timer()
        try:
            yield
        finally:
            self._seconds[name] += self.timer() - start

    @property
    def seconds(self) -> defaultdict[str, float]:
        """By name; of CUDA's parts once they are done."""
        for *_, end in self._events:
            end.synchronize()
        self._fold(list(self._events))
        return self._seconds

    def _fold(self, done: list[tuple[str, torch.cuda.Event, torch.cuda.Event]]) -> None:
        """Adds up what is done, so that a program that never asks does not collect events."""
        for event in done:
            name, begin, end = event
            self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.remove(event)

    def reset(self) -> None:
        self._seconds.clear()
        self._events.clear()

    def summary(self) -> str:
        """One line, largest first: "unet 12.3 s, decode 4.5 s"."""
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts)


def seconds_of(
    call: Callable[[], object], device: torch.device, timer: Callable[[], float] = time.perf_counter
) -> float:
    """Of a call and, on CUDA, of all that it started."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return timer()

    start = now()
    call()
    return now() - start


def count_tflop(call: Callable[[], object]) -> float:
    """10^12 floating-point operations of the matrix products, convolutions and attention of a call, run eagerly: what
    torch.compile meets under the counter it would leave uncompiled for good."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e12


def matrix_rate(device: torch.device, dtype: torch.dtype, timer: Callable[[], float] = time.perf_counter) -> float:
    """TFLOP/s of a large matrix product, the limit of everything that computes: the best of three."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    _warm_up, *times = (seconds_of(lambda: [a @ b for _ in range(4)], device, timer) for _ in range(4))
    return 4 * 2 * size**3 / min(times) / 1e12
