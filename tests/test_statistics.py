"""Bootstrap intervals: reproducible, right on known data, paired."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ouroboros3d.evaluation.bootstrap import Interval, bootstrap_mean, group_means, paired_difference, spread_evenly


def test_the_mean_and_its_interval_follow_from_the_values_and_the_seed():
    values = np.random.default_rng(0).normal(5, 2, 40)
    one, again, other = (bootstrap_mean(values, seed=s) for s in (0, 0, 1))
    assert one == again != other
    assert one.mean == pytest.approx(values.mean()) and one.count == 40
    assert one.low < one.mean < one.high
    # The normal approximation of the interval of a mean, to within the bootstrap's own noise.
    half = 1.96 * values.std() / math.sqrt(40)
    assert (one.mean - one.low, one.high - one.mean) == pytest.approx((half, half), rel=0.08)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_mean(rng.normal(0, 1, 50), seed=i, resamples=400) for i in range(400)]
    covered = np.mean([i.low <= 0 <= i.high for i in intervals])
    assert 0.91 < covered < 0.97


def test_a_level_is_the_share_between_the_bounds():
    values = np.random.default_rng(2).normal(size=30)
    narrow, wide = bootstrap_mean(values, level=0.5), bootstrap_mean(values, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_constant_few_or_no_values():
    assert bootstrap_mean([3.0, 3.0, 3.0]) == Interval(3.0, 3.0, 3.0, 3)
    single, none = bootstrap_mean([3.0, math.nan]), bootstrap_mean([math.nan])
    assert (single.mean, single.count) == (3.0, 1) and math.isnan(single.low)
    assert none.count == 0 and math.isnan(none.mean)


def test_text():
    assert Interval(1.234, 1.0, 1.5, 9).text() == "1.23 [1.00, 1.50]"
    assert Interval(1.234, -1.0, 1.5, 9).text(1, sign=True) == "+1.2 [-1.0, +1.5]"
    assert Interval(1.234, math.nan, math.nan, 1).text(3) == "1.234"
    assert Interval(math.nan, math.nan, math.nan, 0).text() == "-"


def test_an_object_s_values_are_averaged_first():
    pairs = [("a", 1.0), ("b", 4.0), ("a", 3.0), ("b", math.nan), ("c", math.nan)]
    means = group_means(pairs)
    assert (means["a"], means["b"]) == (2.0, 4.0) and math.isnan(means["c"])


def test_pairing_takes_the_objects_own_spread_away():
    rng = np.random.default_rng(3)
    level = rng.normal(20, 5, 30)
    ours = {str(i): float(v) + 0.3 + e for i, (v, e) in enumerate(zip(level, rng.normal(0, 0.1, 30), strict=True))}
    theirs = {str(i): float(v) for i, v in enumerate(level)} | {"only theirs": 99.0}
    paired = paired_difference(ours, theirs)
    assert paired.count == 30 and paired.mean == pytest.approx(0.3, abs=0.05)
    assert paired.low > 0.2 and paired.high - paired.low < 0.1
    unpaired = bootstrap_mean(ours.values())
    assert unpaired.high - unpaired.low > 2


def test_objects_are_spread_evenly():
    assert spread_evenly("abcdef", 3) == ["a", "c", "e"]
    assert spread_evenly("abc", None) == spread_evenly("abc", 0) == spread_evenly("abc", 9) == ["a", "b", "c"]
