"""Speed of reading orbits (the command: scripts/benchmark_data.py)."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

from ouroboros3d.config.schema import Config, DataConfig, ModelConfig
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.data.blocks import INDEX
from ouroboros3d.data.orbit_files import read_ids
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.data.remote import local_root
from ouroboros3d.errors import UserError

FIELDS = ("workers", "images/s", "images/CPU s", "opened in", "takes", "first batch", "a worker's own")
VIEWS = 8


@contextmanager
def linked(root: Path, list_file: str, count: int) -> Iterator[Path]:
    """A folder of `count` links to the orbits of a list, with a list of the same name. Raises UserError."""
    if (root / INDEX).is_file():
        raise UserError(f"{root}: --links needs folders of orbits, this has shards")
    ids = read_ids(root / list_file)
    targets = [(root / orbit).resolve() for orbit in ids]
    with tempfile.TemporaryDirectory(prefix="orbits-") as name:
        names = [f"{number:07d}_{ids[number % len(ids)]}" for number in range(count)]
        for number, link in enumerate(tqdm(names, desc=f"linking in {name}", unit="link", leave=False)):
            os.symlink(targets[number % len(ids)], f"{name}/{link}")
        Path(name, list_file).write_text("\n".join(names), encoding="utf-8")
        yield Path(name)


@dataclass(frozen=True)
class Speed:
    """What was measured with one number of workers. Memory in MB."""

    images: float  # a second
    images_per_cpu: float  # a second of processor time, of this process and its workers
    opened: float  # seconds
    taken: float  # by the open set, of this process's memory; in the first line, later ones take what is free again
    first: float  # seconds from before opening to the first batch
    own: float  # memory that a worker shares with nobody, at the first batch


def measure(options: argparse.Namespace, root: Path, workers: int) -> Speed:
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    data = DataConfig(root=str(root), cache=options.cache, cache_dir=options.cache_dir, workers=0)
    dataset = OrbitDataset(Config(model=ModelConfig(image_size=options.size), data=data), options.list)
    opened, taken = time.perf_counter() - start, process.memory_info().rss - before
    sampler = RandomSampler(dataset, replacement=True, num_samples=1 << 30, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(
        dataset, options.batch_size, sampler=sampler, num_workers=workers, collate_fn=OrbitBatch.collate
    )
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - start
    children = process.children()
    own = max((child.memory_full_info().uss for child in children), default=0)
    for _ in range(2 * workers + 2):  # what was read ahead meanwhile
        next(batches)

    def cpu() -> float:
        return sum(p.cpu_times().user + p.cpu_times().system for p in (process, *children))

    count, start, used = 0, time.perf_counter(), cpu()
    while (seconds := time.perf_counter() - start) < options.seconds:
        next(batches)
        count += VIEWS * options.batch_size
    return Speed(count / seconds, count / (cpu() - used), opened, taken / 1e6, first, own / 1e6)


def verdict(rate: float, gpus: int, images: float, cores: int) -> str:
    """Whether `gpus` that train on `rate` examples a second each wait for workers that read `images` a second."""
    each = images / VIEWS
    a_gpu = math.ceil(rate / each)
    missing = gpus * a_gpu - cores
    wait = f"THEY WAIT, {missing} cores are missing: smaller pictures or a cache help"
    end = wait if missing > 0 else "they need not wait"
    return (
        f"{gpus} GPUs x {rate:g} examples/s = {gpus * rate:g}; a worker with a core reads {each:.1f}: "
        f"data.workers={a_gpu} a GPU, {gpus * a_gpu} of {cores} cores: {end}"
    )


def benchmark(options: argparse.Namespace) -> None:
    """The command with the options of ouroboros3d/cli/benchmark_data.py."""
    torch.set_num_threads(1)  # as in a worker

    local = local_root(options.root, options.list, options.cache_dir)
    source = linked(local, options.list, options.links) if options.links else None
    with source or nullcontext(local) as root:
        count = len(read_ids(root / options.list))
        print(
            f"{options.root}/{options.list}: {count} orbits, {VIEWS} views of {options.size} px, cache {options.cache}"
        )
        print("  ".join(FIELDS), flush=True)
        for workers in options.workers:
            speed = measure(options, root, workers)
            cells = (f"{workers}", f"{speed.images:.0f}", f"{speed.images_per_cpu:.0f}", f"{speed.opened:.2f} s")
            cells += (f"{speed.taken:.0f} MB", f"{speed.first:.2f} s", f"{speed.own:.0f} MB" if workers else "-")
            print("  ".join(cell.rjust(len(field)) for cell, field in zip(cells, FIELDS, strict=True)), flush=True)
    if options.rate:
        print(verdict(options.rate, options.gpus, speed.images_per_cpu, options.cores))
