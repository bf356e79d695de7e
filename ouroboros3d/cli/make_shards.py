"""Packs orbits into WebDataset tar shards, for sets of more files than a file system likes.

    python scripts/make_shards.py data/orbits --out data/shards [--lists train.txt val.txt] [--workers 4]

    <out>/train-000000.tar ...   the files of 256 orbits each, as they are
    <out>/shards.tsv             where each orbit is
    <out>/train.txt ...          the lists

`data.root=<out>` then trains from the shards: the same class reads them and gives the same examples. The command can
be stopped and repeated: shards that are whole and newer than their orbits stay. The same orbits give the same bytes.
Exit status 1 if ids have no folder (they are left out), 2 if it cannot be done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

from tqdm import tqdm

from ouroboros3d.data.orbit_files import DataError, first_names, read_ids
from ouroboros3d.data.shards import Entry, is_current, scan_shard, write_index, write_shard
from ouroboros3d.errors import UserError
from ouroboros3d.files import OutputError, check_writable_dir, write_lines


@dataclass(frozen=True)
class Task:
    """One shard: the orbits `ids` of `root` into `path`."""

    path: Path
    root: Path
    ids: list[str]


def plan(root: Path, out: Path, lists: list[str], per_shard: int) -> Iterator[Task]:
    """The shards of every list, in order. Raises DataError."""
    for name in lists:
        ids = read_ids(root / name)
        for number, start in enumerate(range(0, len(ids), per_shard)):
            yield Task(out / f"{Path(name).stem}-{number:06d}.tar", root, ids[start : start + per_shard])


def pack(task: Task) -> list[Entry]:
    """Writes the shard unless it is there and current."""
    if not is_current(task.path, task.root, task.ids):
        write_shard(task.path, task.root, task.ids)
    return list(scan_shard(task.path))


def run(tasks: list[Task], workers: int) -> list[Entry]:
    """The entries of all shards, in order, with a progress bar over orbits."""
    entries: list[Entry] = []
    bar = tqdm(total=sum(len(task.ids) for task in tasks), desc=str(tasks[0].path.parent), unit="orbit")
    with bar, Pool(max(1, workers)) as pool:
        for task, packed in zip(tasks, pool.imap(pack, tasks) if workers else map(pack, tasks), strict=True):
            entries += packed
            bar.update(len(task.ids))
    return entries


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of orbits")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--lists", nargs="+", metavar="FILE", help="in ROOT; default: train.txt, val.txt, test.txt, those that have ids"
    )
    parser.add_argument("--per_shard", type=int, default=256, help="orbits in a shard (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is this one (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.per_shard < 1:
        raise UserError(f"--per_shard {options.per_shard}: must be at least 1")
    there = [path for path in map(options.root.joinpath, ("train.txt", "val.txt", "test.txt")) if path.is_file()]
    lists = options.lists or [path.name for path in there if path.stat().st_size]  # a set may have no split
    if not lists:
        raise DataError(f"{options.root}: has no ids in train.txt, val.txt or test.txt; name its lists with --lists")
    tasks = list(plan(options.root, options.out, lists, options.per_shard))
    check_writable_dir(options.out)
    others = sorted(path.name for path in set(options.out.glob("*.tar")) - {task.path for task in tasks})
    if others:
        raise OutputError(
            f"{options.out}: has other shards, {first_names(others)}; remove them or choose another --out"
        )

    entries = run(tasks, options.workers)
    for name in lists:
        write_lines(options.out / Path(name).name, read_ids(options.root / name))
    write_index(options.out, entries)
    print(f"{options.out}: {len(entries)} orbits in {len(tasks)} shards, {sum(e.length for e in entries) / 1e9:.2f} GB")
    packed = {entry.id for entry in entries}
    missing = [name for task in tasks for name in task.ids if name not in packed]
    if missing:
        print(f"error: {options.root}: {len(missing)} ids have no folder: {first_names(missing)}", file=sys.stderr)
    return 1 if missing else 0
