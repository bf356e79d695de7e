"""Decoded, resized views of all orbits of a list: one record per orbit, in memory or in one file on disk.

A cache never changes what is read. A record knows which of its frames are whole; the others are read from their files,
which raise the error.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock

from ouroboros3d.data.orbit_files import Views
from ouroboros3d.files import atomic_path, check_writable_dir

FORMAT = 1  # raise it when records change
_log = logging.getLogger(__name__)


def record_type(frames: int, size: int, depth: tuple[tuple[int, ...], np.dtype] | None = None) -> np.dtype:
    """Of an orbit of `frames` views at `size` pixels. depth: shape and type of one frame's map, None without."""
    fields: list[tuple] = [
        ("whole", np.bool_, (frames,)),
        ("fov", np.float64),
        ("c2w", np.float64, (frames, 4, 4)),
        ("rgba", np.uint8, (frames, size, size, 4)),
    ]
    return np.dtype(fields + ([("depth", depth[1], (frames, *depth[0]))] if depth else []))


class ViewCache:
    """Records by number in the list. Forked workers share them; a worker that is spawned gets a copy of those in
    memory, and opens those on disk again."""

    def __init__(self, records: np.ndarray, path: Path | None = None) -> None:
        self.records, self.path = records, path

    def get(self, index: int, chosen: Sequence[int]) -> Views | None:
        """The chosen frames, or None if one of them is not whole."""
        record, chosen = self.records[index], list(chosen)
        if not record["whole"][chosen].all():
            return None
        depth = torch.from_numpy(record["depth"][chosen]) if "depth" in record.dtype.names else None
        c2w, rgba = torch.from_numpy(record["c2w"][chosen]), torch.from_numpy(record["rgba"][chosen])
        return Views(c2w, float(record["fov"]), rgba, depth)

    def __getstate__(self) -> dict[str, Any]:
        return {"records": None if self.path else self.records, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["records"] if state["path"] is None else _open(state["path"]), state["path"])


def fill_memory(dtype: np.dtype, count: int, records: Iterable[bytes]) -> ViewCache:
    """From the bytes of `count` records."""
    table = np.empty(count, dtype)
    for index, record in enumerate(records):
        table[index] = np.frombuffer(record, dtype)[0]
    return ViewCache(table)


def fill_disk(path: Path, dtype: np.dtype, count: int, records: Callable[[], Iterable[bytes]]) -> ViewCache:
    """The file if it is there, otherwise writes it. One process writes, the others that ask for it wait.

    Raises OutputError if it cannot be written."""
    if not path.is_file():
        check_writable_dir(path.parent)
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                _log.info("writing %s, %.1f GB", path, count * dtype.itemsize / 1e9)
                with atomic_path(path) as temporary, open(temporary, "wb") as file:
                    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
                    np.lib.format.write_array_header_1_0(file, header)
                    file.writelines(records())  # not into a memory map: a full disk would kill the process
    return ViewCache(_open(path), path)


def _open(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def fingerprint(dtype: np.dtype, stamps: Iterable[str]) -> str:
    """16 hexadecimal digits of everything records follow from: their layout, the decoder's version, and the stamps."""
    digest = hashlib.sha256(f"{FORMAT} {dtype.descr} {PIL.__version__}\n".encode())
    for stamp in stamps:
        digest.update(f"{stamp}\n".encode())
    return digest.hexdigest()[:16]
