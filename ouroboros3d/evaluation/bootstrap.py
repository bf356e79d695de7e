"""Means over objects with bootstrap intervals, and paired comparisons (Efron & Tibshirani 1993, ch. 13)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over `count` objects and the bounds of its interval; without at least two objects they are NaN."""

    mean: float
    low: float
    high: float
    count: int

    def text(self, digits: int = 2, sign: bool = False) -> str:
        """ "16.28 [15.91, 16.66]"; a mean without bounds stands alone, without objects it is a dash."""
        if self.count == 0:
            return "-"
        form = f"{'+' if sign else ''}.{digits}f"
        if np.isnan(self.low):
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def bootstrap_mean(values: Iterable[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95) -> Interval:
    """The mean of one value per object, and its percentile bootstrap interval. NaN stands for "has none" and is left
    out. The same seed and number of values give the same resamples."""
    values = np.asarray(list(values), dtype=np.float64)
    values = values[~np.isnan(values)]
    count = len(values)
    if count == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    if count == 1:
        return Interval(float(values[0]), np.nan, np.nan, 1)
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.quantile(values[draws].mean(1), [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(values.mean()), float(low), float(high), count)


def group_means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(object, value) pairs -> the mean of each object's values, which are not independent. NaNs are left out; an
    object that has nothing else is NaN. Objects keep the order in which they came."""
    groups: dict[str, list[float]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    means = {}
    for name, values in groups.items():
        finite = [v for v in values if not np.isnan(v)]
        means[name] = float(np.mean(finite)) if finite else float("nan")
    return means


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float], **options) -> Interval:
    """Of ours - theirs over the objects that both have; `options` as `bootstrap_mean`'s."""
    return bootstrap_mean([ours[name] - theirs[name] for name in ours if name in theirs], **options)


def spread_evenly(items: Sequence, count: int | None) -> list:
    """`count` of the items, spread evenly over them; all of them for None, 0 or more than there are."""
    count = min(count or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]
