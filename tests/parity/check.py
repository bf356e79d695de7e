"""Checks this implementation against numbers recorded from the release, case by case.

    python scripts/check_parity.py [--fixtures FOLDER] [--only sampler render]

One line per case: pass or FAIL, its name, the largest error, the tolerance. Exit status 1 if any case fails, 2
if the folder cannot be used. The repository carries a part of the recorded tensors, the default folder.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")

from ouroboros3d.cli.options import Parser, say_loading
from ouroboros3d.errors import UserError
from tests.parity import NAMES

if TYPE_CHECKING:
    from tests.parity.fixtures import Case, Fixtures

COMMITTED = Path(__file__).parents[1] / "data" / "parity_small"


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "--fixtures",
        type=Path,
        default=COMMITTED,
        help="folder with config.json and arrays (default: the committed part)",
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, help="cases of these files only (default: of all)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch; several change the rounding of float32 sums (default: 1)",
    )
    args = parser.parse_args(arguments)
    if not args.fixtures.is_dir():
        raise UserError(f"{args.fixtures}: no such folder of fixtures")
    there = [name for name in NAMES if (args.fixtures / f"{name}.safetensors").is_file()]
    say_loading()
    import torch

    from tests.parity.fixtures import Fixtures

    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    cases: list[Case] = []
    fixtures = Fixtures(args.fixtures)
    for name in args.only or there or NAMES:
        cases += run(name, fixtures)
    failed = [case for case in cases if not case.ok]
    seconds = time.perf_counter() - start
    print(f"{len(cases) - len(failed)} of {len(cases)} cases pass ({seconds:.0f} s)")
    for case in failed:
        print(f"FAIL  {case.name}  {case.error:.3g} > {case.tolerance:.3g}")
    return 1 if failed else 0


def run(name: str, fixtures: Fixtures) -> list[Case]:
    """The cases of one fixture file, printed as they come. An exception of ours is a failed case."""
    from tests.parity.fixtures import Case, FixtureError
    from tests.parity.suites import SUITES

    cases: list[Case] = []

    def report(case: Case) -> None:
        case = Case(f"{name}.{case.name}", case.error, case.tolerance)
        cases.append(case)
        verdict = "pass" if case.ok else "FAIL"
        print(f"{verdict}  {case.name:<72} error {case.error:<9.3g} tolerance {case.tolerance:.3g}", flush=True)

    try:
        for case in SUITES[name](fixtures):
            report(case)
    except FixtureError:
        raise
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        report(Case(f"raised {type(error).__name__}", float("inf"), 0.0))
    return cases
