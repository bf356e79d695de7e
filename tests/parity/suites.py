"""Every suite of comparisons by the name of its fixture file; `scripts/check_parity.py` prints them and
`tests/test_parity.py` asserts them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.parity import NAMES
from tests.parity.cameras import check_cameras
from tests.parity.fixtures import Case, Fixtures
from tests.parity.lgm import check_lgm
from tests.parity.ply import check_ply
from tests.parity.render import check_render
from tests.parity.sampler import check_sampler, check_sampler_system
from tests.parity.train_step import check_train_step
from tests.parity.unet import check_mv_unet

CHECKS = (
    check_cameras, check_mv_unet, check_lgm, check_render, check_ply, check_sampler, check_sampler_system,
    check_train_step,
)  # fmt: skip
SUITES: dict[str, Callable[[Fixtures], Iterator[Case]]] = dict(zip(NAMES, CHECKS, strict=True))
