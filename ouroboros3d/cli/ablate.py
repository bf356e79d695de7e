"""The paper's ablation tables, trained, evaluated and printed beside the paper's numbers.

    python scripts/ablate.py --base configs/small/joint.yaml --steps 2000 --out runs/ablation [key=value ...]
    python scripts/ablate.py --base configs/mv/svd_lgm_rgb_ccm_lvis.yaml --launcher "torchrun --nproc_per_node=8" \
        --steps 30000 --out runs/ablation_full

Every row is a file of configs/ablations/ over the base. Rows are trained from the same start, on the same samples in
the same order (--steps) or for the same time (--budget), and evaluated by scripts/evaluate.py on the same objects and
noise; rows of the schedule table and the controls sample from the weights of `full`. The same command goes on where
it was. --out gets table.md, table.csv, table.json, plot.png, grid.png, and a folder a row: training and objects.csv.
docs/evaluation.md has the protocol.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ouroboros3d.cli.options import Parser, say_loading
from ouroboros3d.config.loading import load_config, parse_duration, split_overrides
from ouroboros3d.devices import DTYPE_NAMES, check_device_name
from ouroboros3d.errors import UserError
from ouroboros3d.evaluation.ablation_rows import ROWS, TABLES


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(__doc__)
    parser.add_argument(
        "--base", type=Path, default=Path("configs/small/joint.yaml"), help="YAML file (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", default=["feedback", "schedule"], help="of " + ", ".join([*TABLES, *ROWS]))
    parser.add_argument("--steps", type=int, help="training steps of each row: equal samples")
    parser.add_argument("--budget", help="training time of each row, e.g. 10m: equal time")
    parser.add_argument("--start", type=Path, help="checkpoint folder all start from (default: what the base says)")
    parser.add_argument("--train_seeds", type=int, nargs="+", default=[0], help="a training for each (default: 0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the sampling (default: 0 1 2)")
    parser.add_argument("--list", default="test.txt", help="evaluated orbits, in data.root (default: %(default)s)")
    parser.add_argument("--objects", type=int, default=0, help="evaluated objects (default: all)")
    parser.add_argument("--batch", type=int, default=4, help="orbits at a time in evaluation (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="float32", help="of evaluation (default: %(default)s)")
    parser.add_argument("--launcher", default="", help='e.g. "torchrun --nproc_per_node=8" (default: python)')
    parser.add_argument("--device", help="cpu or cuda (default: what the machine has)")
    parser.add_argument("--report", action="store_true", help="only the tables, of what earlier commands have made")
    arguments, overrides = split_overrides(arguments)
    options = parser.parse_args(arguments)
    check_device_name(options.device)
    if bool(options.steps) == bool(options.budget):
        raise UserError("give either --steps (equal samples) or --budget (equal time)")
    if options.budget:
        parse_duration(options.budget)
    unknown = [name for name in options.rows if name not in ROWS and name not in TABLES]
    if unknown:
        raise UserError(f"--rows {unknown[0]}: must be of {', '.join([*TABLES, *ROWS])}")
    chosen = {row for name in options.rows for row in (TABLES[name][1] if name in TABLES else [name])}
    options.rows = [name for name in ROWS if name in chosen]
    if options.start and not options.start.is_dir():
        raise UserError(f"--start {options.start}: no such checkpoint folder")
    return options, overrides


def main(arguments: list[str], run=None) -> None:
    """`run` stands in for processes of their own, in tests."""
    options, overrides = parse(arguments)
    load_config(options.base, overrides)  # refuses bad ones before seconds of imports
    say_loading()
    from ouroboros3d.evaluation.ablation import ablate

    ablate(options, overrides, run)
