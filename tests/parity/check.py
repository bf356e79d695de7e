"""Checks this implementation against numbers recorded from the release, case by case.

    python scripts/check_parity.py [--fixtures FOLDER] [--only sampler render]

One line per case: pass or FAIL, its name, the largest error, the tolerance. Exit status 1 if any case fails, 2
if the folder cannot be used. The repository carries a part of the recorded tensors, the default folder.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tests.parity.fixtures import Case, FixtureError, Fixtures
from tests.parity.suites import SUITES

COMMITTED = Path(__file__).parents[1] / "data" / "parity_small"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--fixtures",
        type=Path,
        default=COMMITTED,
        help="folder with config.json and arrays (default: the committed part)",
    )
    parser.add_argument("--only", nargs="+", choices=SUITES, help="cases of these files only (default: of all)")
    parser.add_argument("--threads", type=int, default=1, help="more than one differ in float32 rounding")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    cases: list[Case] = []
    try:
        fixtures = Fixtures(args.fixtures)
        there = [name for name in SUITES if (args.fixtures / f"{name}.safetensors").is_file()]
        for name in args.only or there or SUITES:
            cases += run(name, fixtures)
    except FixtureError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 2
    failed = [case for case in cases if not case.ok]
    seconds = time.perf_counter() - start
    print(f"{len(cases) - len(failed)} of {len(cases)} cases pass ({seconds:.0f} s)")
    for case in failed:
        print(f"FAIL  {case.name}  {case.error:.3g} > {case.tolerance:.3g}")
    return 1 if failed else 0


def run(name: str, fixtures: Fixtures) -> list[Case]:
    """The cases of one fixture file, printed as they come. An exception of ours is a failed case."""
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
