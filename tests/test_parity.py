"""Every recorded number of the release: all where the fixtures are, a carried part of them everywhere."""

import os
from pathlib import Path

import pytest
import torch

from tests.parity.fixtures import Case, FixtureError, Fixtures
from tests.parity.suites import SUITES

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("OUROBOROS3D_PARITY", ROOT.parent / "shared" / "parity"))
CARRIED = ROOT / "tests" / "data" / "parity_small"


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    if not FOLDER.is_dir():
        pytest.skip(f"no fixtures in {FOLDER} (set OUROBOROS3D_PARITY)")
    return Fixtures(FOLDER)


def assert_all_pass(cases: list[Case]) -> None:
    assert cases
    failed = [f"{c.name}: error {c.error:.3g}, tolerance {c.tolerance:.3g}" for c in cases if not c.ok]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("suite", SUITES)
def test_all_recorded_numbers(fixtures, suite):
    assert_all_pass(list(SUITES[suite](fixtures)))


@pytest.mark.parametrize(("suite", "at_least"), [("cameras", 25), ("render", 10), ("ply", 8)])
def test_carried_numbers(suite, at_least):
    cases = list(SUITES[suite](Fixtures(CARRIED)))
    assert len(cases) >= at_least  # the carried arrays are still found
    assert_all_pass(cases)


def test_a_difference_is_noticed(tmp_path):
    """The check itself can fail: by NaN, by a wrong shape, by a value."""
    from tests.parity.fixtures import close, pictures

    one = torch.ones(2, 3, 4, 4)
    assert close("x", one, one, 0).ok
    assert not close("x", one.fill_(float("nan")), torch.ones(2, 3, 4, 4), 1).ok
    assert not close("x", torch.ones(2), torch.ones(1, 2), 1).ok
    assert not close("x", torch.ones(2), torch.tensor([1, 1.1]), 0.05).ok
    few, many = torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    few[..., 0, :4] = 4e-3  # 4 of 4096 pixels may differ by less than 5e-3
    many[..., 0, :5] = 4e-3
    zero = torch.zeros_like(few)
    assert all(case.ok for case in pictures("x", few, zero))
    assert not all(case.ok for case in pictures("x", many, zero))
    assert not all(case.ok for case in pictures("x", 2 * few, zero))


def test_unusable_folders_are_named(tmp_path):
    with pytest.raises(FixtureError, match="no such folder"):
        Fixtures(tmp_path / "none")
    with pytest.raises(FixtureError, match=r"config\.json: cannot be read"):
        Fixtures(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FixtureError, match=r"config\.json: has no 'unet'"):
        Fixtures(tmp_path)
