"""Times the reading of orbits: images a second by number of workers, and whether GPUs would wait for them.

    python scripts/benchmark_data.py data/orbits64 --size 64 --workers 0 1 2 --gpus 8 --rate 1.85
    python scripts/benchmark_data.py data/orbits64 --size 64 --links 100000

An example is 8 views of an orbit. --rate is what one GPU trains on, in examples a second (batch size over seconds a
step); every GPU's process has workers of its own, so what counts is how many of them there are cores for. --links N
reads a list of N ids, symbolic links in a temporary folder to the orbits of ROOT in turn: what a large set costs to
open. The orbits come in random order and soon lie in the system's file cache: decoding is timed, not the disk.
The verdict goes by the last line's images a second of processor time, which other work on the machine changes little.
"""

from __future__ import annotations

import os

from ouroboros3d.cli.options import Parser


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("root", help="folder of orbits or of shards, or an address of shards")
    parser.add_argument("--list", default="train.txt", help="of ids, in ROOT (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="pixels (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=4, help="examples (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers to time (default: 0 1 2)")
    parser.add_argument("--cache", choices=("none", "memory", "disk"), default="none", help="(default: %(default)s)")
    parser.add_argument("--cache_dir", help="default: <root>/.cache")
    parser.add_argument("--seconds", type=float, default=10.0, help="to time each for (default: %(default)s)")
    parser.add_argument("--links", type=int, default=0, help="read a list of so many links to the orbits of ROOT")
    parser.add_argument("--rate", type=float, help="examples a second that one GPU trains on")
    parser.add_argument("--gpus", type=int, default=8, help="for the verdict (default: %(default)s)")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="for the verdict (default: %(default)s)")
    options = parser.parse_args(arguments)
    from ouroboros3d.data.benchmark import benchmark

    benchmark(options)
