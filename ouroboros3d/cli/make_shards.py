"""Packs orbits into WebDataset tar shards, for sets with too many files for a file system.

    python scripts/make_shards.py data/orbits --out data/shards [--lists train.txt val.txt] [--workers 4]

    <out>/train-000000.tar ...   the unchanged files of 256 orbits each
    <out>/shards.tsv             where each orbit is
    <out>/train.txt ...          the lists

Train with `data.root=<out>`; the same class reads the shards and gives the same examples. The command can be stopped
and repeated: complete shards that are newer than their orbits are kept. The same orbits give the same bytes. Exit
status: 0 all is packed, 1 some ids have no folder (they are left out), 2 nothing could be done.
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import Parser


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("root", type=Path, help="folder of orbits")
    add("--out", type=Path, required=True, help="folder for the shards")
    add("--lists", nargs="+", metavar="FILE", help="in ROOT (default: train.txt, val.txt, test.txt, if not empty)")
    add("--per_shard", type=int, default=256, help="orbits per shard (default: %(default)s)")
    add("--workers", type=int, default=0, help="worker processes; 0: work in this process (default: %(default)s)")
    options = parser.parse_args(arguments)
    from ouroboros3d.data.shard_writer import make_shards

    return make_shards(options)
