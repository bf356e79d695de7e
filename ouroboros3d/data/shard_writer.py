"""Packs folders of orbits into shards (the command: scripts/make_shards.py)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ouroboros3d.data.orbit_files import DataError, first_names, read_ids
from ouroboros3d.data.shards import Entry, is_current, scan_shard, write_index, write_shard
from ouroboros3d.errors import UserError
from ouroboros3d.files import OutputError, check_writable_dir, write_lines
from ouroboros3d.processes import end_with_parent


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
    """The entries of all shards, in order, with a progress bar over orbits. Raises OutputError if a process dies."""
    entries: list[Entry] = []
    bar = tqdm(total=sum(len(task.ids) for task in tasks), desc=str(tasks[0].path.parent), unit="orbit")
    with bar, ProcessPoolExecutor(workers, initializer=end_with_parent) if workers else nullcontext() as pool:
        try:
            for task, packed in zip(tasks, (pool.map if pool else map)(pack, tasks), strict=True):
                entries += packed
                bar.update(len(task.ids))
        except BrokenProcessPool as error:
            raise OutputError(
                f"{tasks[0].path.parent}: a process died, perhaps out of memory; the same command with fewer --workers "
                "goes on from here"
            ) from error
    return entries


def make_shards(options: argparse.Namespace) -> int:
    """The command with the options of ouroboros3d/cli/make_shards.py."""
    if options.per_shard < 1:
        raise UserError(f"--per_shard {options.per_shard}: must be at least 1")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: must not be negative")
    there = [path for path in map(options.root.joinpath, ("train.txt", "val.txt", "test.txt")) if path.is_file()]
    lists = options.lists or [path.name for path in there if path.stat().st_size]  # a set may have no split
    if not lists:
        raise DataError(f"{options.root}: has no ids in train.txt, val.txt or test.txt; name its lists with --lists")
    if len({Path(name).stem for name in lists}) < len(lists):
        raise UserError(f"--lists {' '.join(lists)}: two have the same name, and so would their shards; rename one")
    tasks = list(plan(options.root, options.out, lists, options.per_shard))
    check_writable_dir(options.out)
    for left in options.out.glob(".tmp-*.tar"):  # of a killed run
        left.unlink(missing_ok=True)
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
