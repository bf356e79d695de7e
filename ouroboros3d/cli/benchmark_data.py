"""Times the reading of orbits: images per second by number of workers, and whether GPUs would wait for data.

    python scripts/benchmark_data.py data/orbits64 --size 64 --workers 0 1 2 --gpus 8 --rate 1.85
    python scripts/benchmark_data.py data/orbits64 --size 64 --links 100000

An example is 8 views of an orbit. --rate is what one GPU trains on, in examples per second (batch size over seconds per
step). Every GPU's process has its own workers, so the number of cores is the limit. --links N measures the cost of
opening a large set: it reads a list of N ids, symbolic links in a temporary folder to the orbits of ROOT. Orbits come
in random order and are soon in the system's file cache, so this times decoding, not the disk. The verdict uses the last
line's images per CPU second, which other work on the machine hardly changes.
"""

from __future__ import annotations

import os

from ouroboros3d.cli.options import Parser


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("root", help="folder of orbits or of shards, or an address of shards")
    add("--list", default="train.txt", help="list of ids in ROOT (default: %(default)s)")
    add("--size", type=int, default=512, help="pixels per side (default: %(default)s)")
    add("--batch_size", type=int, default=4, help="examples per batch (default: %(default)s)")
    add("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers to time (default: 0 1 2)")
    add(
        "--cache",
        choices=("none", "memory", "disk"),
        default="none",
        help="cache of decoded views, see data.cache (default: %(default)s)",
    )
    add("--cache_dir", help="folder of the cache (default: <root>/.cache)")
    add("--seconds", type=float, default=10.0, help="seconds per measurement (default: %(default)s)")
    add("--links", type=int, default=0, metavar="N", help="read a list of N links to the orbits of ROOT")
    add("--rate", type=float, help="examples per second that one GPU trains on")
    add("--gpus", type=int, default=8, help="GPUs to feed, for the verdict (default: %(default)s)")
    add("--cores", type=int, default=os.cpu_count(), help="cores for workers, for the verdict (default: %(default)s)")
    options = parser.parse_args(arguments)
    from ouroboros3d.data.benchmark import benchmark

    benchmark(options)
