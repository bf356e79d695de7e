"""Trains and evaluates the rows of the paper's ablation tables, and prints them beside the paper's numbers.

    python scripts/ablate.py --base configs/small/joint.yaml --steps 2000 --out runs/ablation [key=value ...]
    python scripts/ablate.py --base configs/mv/svd_lgm_rgb_ccm_lvis.yaml --launcher "torchrun --nproc_per_node=8" \\
        --steps 30000 --out runs/ablation_full

Every row is a file of configs/ablations/ over the base. Rows are trained from the same start, on the same samples in
the same order (--steps) or for the same time (--budget), and evaluated by scripts/evaluate.py on the same objects and
noise. Rows of the schedule table and the controls sample from the weights of `full`. The same command continues an
interrupted run. --out gets table.md, table.csv, table.json, plot.png, grid.png, and a folder per row: training and
objects.csv.
docs/evaluation.md has the protocol.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ouroboros3d.cli.options import ConfigParser, refuse_keys, say_loading
from ouroboros3d.config.loading import load_config, parse_duration
from ouroboros3d.devices import check_device_name
from ouroboros3d.errors import UserError
from ouroboros3d.evaluation.ablation_rows import ROWS, TABLES

# Keys that this command sets itself, and what to do instead.
OWN_KEYS = {
    "train.seed": "use --train_seeds",
    "train.steps": "use --steps",
    "train.time_budget": "use --budget",
    "train.output_dir": "use --out",
    "train.validate_every": "the evaluation that follows scores the rows",
    "sampler.seed": "use --seeds",
    "sampler.dtype": "use --dtype",
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ConfigParser(__doc__, "configs/small/joint.yaml", "--base")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    rows = f"tables ({', '.join(TABLES)}) or single rows ({', '.join(ROWS)}) (default: feedback schedule)"
    add("--rows", nargs="+", default=["feedback", "schedule"], help=rows)
    add("--steps", type=int, help="training steps per row, at least 1; this or --budget")
    add("--budget", help="training time per row, such as 30s, 10m or 2h; this or --steps")
    add("--start", type=Path, help="checkpoint folder that all rows start from (default: the base's)")
    add("--train_seeds", type=int, nargs="+", default=[0], help="training seeds; one training per seed (default: 0)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="sampling seeds (default: 0 1 2)")
    add("--list", default="test.txt", help="list of orbits to evaluate, in data.root (default: %(default)s)")
    add("--objects", type=int, default=0, help="number of objects to evaluate (default: all)")
    add("--batch", type=int, default=4, help="orbits per evaluation batch (default: %(default)s)")
    parser.add_dtype("precision of evaluation (default: %(default)s)", "float32")
    add("--launcher", default="", help='launcher, e.g. "torchrun --nproc_per_node=8" (default: python)')
    add("--device", type=check_device_name, help="cpu or cuda (default: cuda if available)")
    add("--report", action="store_true", help="only make the tables, from finished rows")
    options = parser.parse_args(arguments)
    if not options.report:  # finished rows of older code may have such keys
        start = {"model.pretrained.checkpoint": "name it by --start alone"} if options.start else {}
        refuse_keys(options.overrides, OWN_KEYS | start)
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
    return options


def main(arguments: list[str], run=None) -> None:
    """`run` stands in for processes of their own, in tests."""
    options = parse(arguments)
    load_config(options.base, options.overrides)  # refuses bad ones before seconds of imports
    say_loading()
    from ouroboros3d.evaluation.ablation import ablate

    ablate(options, run)
