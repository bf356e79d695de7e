"""Checks a set of orbits before training: every picture, matrix and list.

    python scripts/validate_orbits.py data/orbits [--workers 8] [--size 512] [--out data/orbits/validation]

Writes into --out:

    good.txt, good_train.txt, ...   the ids without a problem, of the whole set and of every list; train with
                                    data.train=validation/good_train.txt
    report.csv                      one row per orbit: its lists, problems, signs of degeneracy, and its numbers
    report.json                     counts, and the problems of the lists
    contact_sheet.webp              four views per orbit: first those with problems (red), then degenerate ones
                                    (orange), then others, evenly from the set

Exit status: 0 all is good, 1 problems were found, 2 the check could not run. A degenerate orbit (flat, tiny, of one
colour) is named and stays good unless --drop_degenerate is given. An orbit whose meta.json has warnings of the renderer
(a missing texture, a feature that was not rendered) is named and stays good unless --strict is given.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ouroboros3d.cli.options import Parser


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("root", type=Path, help="folder of the orbits and lists")
    add("--out", type=Path, help="folder for the results (default: ROOT/validation)")
    add("--lists", nargs="+", metavar="FILE", help="lists in ROOT (default: train.txt, val.txt, test.txt, if present)")
    add("--frames", type=int, default=16, help="views per orbit, at least 3 (default: %(default)s)")
    add("--size", type=int, help="pixels per side that pictures must have (default: the most common size)")
    add("--drop_degenerate", action="store_true", help="count degenerate orbits as bad")
    add("--strict", action="store_true", help="count orbits with warnings of the renderer as bad")
    add("--sheet", type=int, default=64, help="number of orbits on the contact sheet (default: %(default)s)")
    add("--show", type=int, default=20, help="number of bad orbits to print (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="worker processes (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.frames < 3:
        parser.error("--frames must be at least 3")
    for name in ("size", "sheet", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    from ouroboros3d.datagen.orbit_report import validate

    return 0 if validate(options) else 1
