"""Draws curves of training runs from their metrics.jsonl: one panel per metric, one line per run.

    python scripts/plot_metrics.py runs/a runs/b --metrics total views_psnr --out outputs/curves.png

Logged training losses are means over `train.log_every` steps; --smooth averages over several of these lines.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ouroboros3d.cli.options import Parser
from ouroboros3d.errors import UserError
from ouroboros3d.files import atomic_path


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. Raises UserError."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name the train.output_dir of a run") from error


def curve(lines: list[dict], metric: str, smooth: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, each value the mean of up to `smooth` lines that end with it."""
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    steps, values = (
        (np.array(column, dtype=float) for column in zip(*found, strict=True)) if found else [np.empty(0)] * 2
    )
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - smooth, 0)
    return steps, (sums[ends] - sums[starts]) / (ends - starts)


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of the runs (train.output_dir)")
    parser.add_argument("--metrics", nargs="+", default=["total"], help="metrics to draw (default: total)")
    parser.add_argument("--labels", nargs="+", help="labels of the runs (default: their folders' names)")
    parser.add_argument(
        "--smooth", type=int, default=1, help="number of logged lines to average over (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/curves.png"), help="picture to write (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    labels = options.labels or [run.name for run in options.runs]
    if len(labels) != len(options.runs) or options.smooth < 1:
        raise UserError(f"--labels: one for each of the {len(options.runs)} runs; --smooth: at least 1")
    runs = [read_metrics(run) for run in options.runs]

    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(options.metrics), 3.2), layout="constrained")
    axes = figure.subplots(1, len(options.metrics), squeeze=False)[0]
    for axis, metric in zip(axes, options.metrics, strict=True):
        curves = [(label, *curve(lines, metric, options.smooth)) for label, lines in zip(labels, runs, strict=True)]
        if not any(len(steps) for _, steps, _ in curves):
            names = sorted({name for lines in runs for line in lines for name in line} - {"step", "kind"})
            raise UserError(f"--metrics {metric}: no run has it; there are {', '.join(names)}")
        for label, steps, values in curves:
            if len(steps):
                axis.plot(steps, values, label=label)
        axis.set(title=metric, xlabel="step")
        axis.legend()
        axis.grid(alpha=0.3)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(options.out) as path:
        figure.savefig(path, dpi=110)
    print(f"wrote {options.out}")
