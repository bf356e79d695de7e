"""Times one training step and its parts, the cost of the second pass and of options, and saving and resuming.

    python scripts/render_orbits.py --procedural 8 --orbits 1 --size 64 --depth 32 --out /tmp/orbits
    python scripts/benchmark_training.py --config configs/small/joint.yaml --weights checkpoints/small \\
      data.root=/tmp/orbits data.val=train.txt
    torchrun --nproc_per_node=2 scripts/benchmark_training.py ... train.batch_size=2    (several processes)

A row is the mean of `--steps` steps after one uncounted step (four where it is compiled), and its ratio to the first
row's. On a shared core use
--cpu_time, which counts this process's CPU seconds instead of wall time. Weights are random without --weights, which
works for a model of any size. On a CPU the peak memory is that of the process so far. TFLOP are those of one step of
this process; the share of the limit is their rate over that of a large matrix product. Writes to a temporary folder.
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import load_config


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__, "configs/small/joint.yaml")
    parser.add_argument("--weights", metavar="FOLDER", help="checkpoint to start from (default: random weights)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="kinds of steps (default: the first three)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps per row (default: %(default)s)")
    parser.add_argument("--cpu_time", action="store_true", help="measure CPU seconds instead of wall time")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args(arguments)
    load_config(options.config, options.overrides)  # refuses a bad one before seconds of imports
    say_loading()
    from ouroboros3d.training.benchmark import benchmark

    benchmark(options)
