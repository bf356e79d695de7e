"""Processes assets in worker processes; a failure or a crash is one of the outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field

from ouroboros3d.processes import end_with_parent

from .assets import Asset

MIN_MEMORY = 6.0  # GB that every worker may take, else its share of the machine's


@dataclass(frozen=True)
class Outcome:
    """What came of one asset. failure: the reason, or None; warnings, features: see assets.Findings; views: rendered
    now; seconds, processor: time it took."""

    asset: Asset
    failure: str | None = None
    warnings: list[str] = field(default_factory=list)
    features: dict[str, str] = field(default_factory=dict)
    views: int = 0
    seconds: float = 0.0
    processor: float = 0.0


def run_all(work: Callable[[Asset], Outcome], assets: list[Asset], workers: int) -> Iterator[Outcome]:
    """Outcomes of all assets in the order in which they come, from processes of their own.

    An asset whose process dies (a crash in a native library, the memory gone) is found by trying the suspects one by
    one, and becomes a failure. What `work` raises ends the run; the objects under way are finished first.
    """
    waiting = list(assets)
    while waiting:
        done = set()
        try:
            yield from _pooled(work, waiting, workers, done)
        except BrokenProcessPool:
            # Assets are handed out in order, so the first ones without an outcome were under way.
            suspects = [asset for asset in waiting if asset.id not in done][:workers]
            for asset in suspects:
                done.add(asset.id)
                try:
                    yield from _pooled(work, [asset], 1, set())
                except BrokenProcessPool:
                    yield Outcome(asset, "its process died: out of memory, or a crash in the renderer")
        waiting = [asset for asset in waiting if asset.id not in done]


def _pooled(work: Callable, assets: Iterable[Asset], workers: int, done: set[str]) -> Iterator[Outcome]:
    with ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(workers,)) as pool:
        try:
            futures: list[Future[Outcome]] = [pool.submit(work, asset) for asset in assets]
            for future in as_completed(futures):
                outcome = future.result()
                done.add(outcome.asset.id)
                yield outcome
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(workers: int) -> None:
    import psutil  # asks the system for more than --help needs

    limit_memory(max(MIN_MEMORY, psutil.virtual_memory().total / 1e9 / workers))
    end_with_parent()


def limit_memory(most: float) -> None:
    """Let this process take `most` GB: an asset that needs more is a failure, not the end of the machine."""
    with suppress(ImportError, ValueError, OSError):  # where the system has no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(most * 1e9),) * 2)
