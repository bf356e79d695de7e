"""Orbits in WebDataset tar shards, for sets with too many files for a file system, read by index like folders.

    <root>/train-000000.tar ...   members <id>.meta.json, <id>.render_0000.webp ...: the files of the orbits' folders
    <root>/shards.tsv             the index: id, shard, offset and length in bytes of the orbit's members
    <root>/train.txt ...          lists of ids

`scripts/make_shards.py` writes them. The webdataset library streams the same files; reading here needs only tarfile.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from ouroboros3d.data.blocks import INDEX, ORIGIN, local_block, read_block
from ouroboros3d.data.orbit_files import RENDER_AGAIN, DamagedOrbit, DataError, Folder
from ouroboros3d.errors import UserError
from ouroboros3d.files import atomic_path

_MAKE_AGAIN = "run scripts/make_shards.py again"


@dataclass(frozen=True)
class Entry:
    """Where the members of an orbit are: `length` bytes from `offset` on, whole tar headers and blocks."""

    id: str
    shard: str
    offset: int
    length: int


class Folders:
    """Orbits as folders on disk, by their number in the list."""

    def __init__(self, root: Path, ids: Sequence[str]) -> None:
        self.root, self.ids = root, ids

    def __getitem__(self, index: int) -> Folder:
        return self.root / self.ids[index]

    def stamp(self, index: int) -> str:
        """Changes when a file of the orbit does: names, sizes and times."""
        try:
            with os.scandir(self.root / self.ids[index]) as files:
                stats = sorted((file.name, file.stat()) for file in files)
        except OSError as error:
            return str(error.errno)
        return " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)


class Shards:
    """Orbits in shards, by their number in the list."""

    def __init__(self, root: Path, ids: Sequence[str]) -> None:
        """Raises DataError if the index cannot be read. An id that is not in it is a damaged orbit."""
        self.root, self.ids, self._remote = root, ids, (root / ORIGIN).is_file()
        # Arrays, not objects: they are small for millions of orbits, and workers share them.
        self._where = np.full((len(ids), 3), -1, dtype=np.int64)  # number of the shard, offset, length
        numbers, positions = {}, {name: k for k, name in enumerate(ids)}
        for entry in read_index(root):
            position = positions.get(entry.id)
            if position is not None:
                shard = numbers.setdefault(entry.shard, len(numbers))
                self._where[position] = shard, entry.offset, entry.length
        self._shards = list(numbers)

    def __getitem__(self, index: int) -> Folder:
        """Reads all files of the orbit at once. Raises DamagedOrbit."""
        shard, offset, length = self._where[index].tolist()
        if shard < 0:
            raise DamagedOrbit(
                f"{self.root / INDEX}: has no orbit {self.ids[index]}; {_MAKE_AGAIN} or correct the list"
            )
        path = self.root / self._shards[shard]
        try:
            if self._remote:
                block = read_block(self.root, self._shards[shard], offset, length)
            else:
                block = local_block(path, offset, length)
        except FileNotFoundError as error:
            raise DamagedOrbit(f"{path}: no such shard; {_MAKE_AGAIN}") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); see whether its disk is well") from error
        return _ShardFolder(path, self.ids[index], block, length)

    def stamp(self, index: int) -> str:
        """Changes when a shard with the orbit does."""
        shard, offset, length = self._where[index].tolist()
        if shard < 0:
            return "missing"
        if self._remote:  # the copy changes with every orbit first read, its folder's name with the shards (remote.py)
            return f"{self.root.name} {self._shards[shard]} {offset} {length}"
        try:
            stat = (self.root / self._shards[shard]).stat()
        except OSError as error:
            return str(error.errno)
        return f"{self._shards[shard]} {offset} {length} {stat.st_size} {stat.st_mtime_ns}"


class _ShardFolder:
    """The members of one orbit: stands for its folder."""

    def __init__(self, shard: Path, name: str, block: bytes, length: int) -> None:
        self._label = f"{shard}: {name}"
        try:
            with tarfile.open(fileobj=io.BytesIO(block), mode="r:") as tar:
                members = tar.getmembers()
        except tarfile.TarError:
            members = []
        prefix = f"{to_key(name)}."
        if len(block) < length or not all(member.name.startswith(prefix) for member in members) or not members:
            raise DamagedOrbit(f"{self._label}: is not where the index says, or is cut off; {_MAKE_AGAIN}")
        self._files = {
            member.name.removeprefix(prefix): block[member.offset_data : member.offset_data + member.size]
            for member in members
        }

    def __truediv__(self, name: str) -> _ShardFile:
        return _ShardFile(f"{self._label}/{name}", self._files.get(name))


@dataclass(frozen=True)
class _ShardFile:
    label: str
    data: bytes | None

    def __str__(self) -> str:
        return self.label

    def read_bytes(self) -> bytes:
        if self.data is None:
            raise FileNotFoundError(2, "No such file in the shard")
        return self.data


def open_orbits(root: Path, ids: Sequence[str]) -> Folders | Shards:
    """The orbits of a list: in shards where the root has an index of them, otherwise in folders."""
    return Shards(root, ids) if (root / INDEX).is_file() else Folders(root, ids)


def to_key(name: str) -> str:
    """An id as the key of a WebDataset sample, which must not have dots; `unquote` is the way back."""
    return name.replace("%", "%25").replace(".", "%2E")


def write_shard(path: Path, root: Path, ids: Sequence[str]) -> None:
    """Packs all files of the orbits' folders, as they are; the shard appears when it is whole.

    The same files give the same bytes. A folder that is not there is left out: as without shards, reading it is
    what complains. Raises OutputError, and DataError for a file that cannot be read."""
    try:
        from webdataset import TarWriter
    except ModuleNotFoundError as error:
        raise UserError("shards are written by webdataset, which is not installed: pip install webdataset") from error

    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, encoder=False, keep_meta=True, mtime=0) as tar,
    ):
        for name in ids:
            files = {}
            for source in orbit_files(root / name):
                try:
                    files[source.name] = source.read_bytes()
                except OSError as error:
                    raise DataError(f"{source}: cannot be read ({error.strerror}); {RENDER_AGAIN}") from error
            if files:
                tar.write({"__key__": to_key(name), **files})


def is_current(path: Path, root: Path, ids: Sequence[str]) -> bool:
    """Whether the shard is whole, has these orbits, and no file or folder of theirs is newer."""
    files = {name: orbit_files(root / name) for name in ids}
    try:
        written = path.stat().st_mtime_ns
        found = [entry.id for entry in scan_shard(path)]
        times = [p.stat().st_mtime_ns for name, inside in files.items() if inside for p in (root / name, *inside)]
    except (OSError, DataError):
        return False
    return found == [name for name, inside in files.items() if inside] and max(times, default=0) < written


def orbit_files(folder: Path) -> list[Path]:
    """What is packed: the folder's files by name; none if it is not there."""
    return sorted(p for p in folder.glob("[!.]*") if p.is_file())


def scan_shard(path: Path) -> Iterator[Entry]:
    """The orbits in a shard, in its order. Raises DataError if it is no tar file or cut off."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            members = [
                (unquote(m.name.partition(".")[0]), m.offset, m.offset_data + -(-m.size // 512) * 512) for m in tar
            ]
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_MAKE_AGAIN}") from error
    start = 0
    for k, (name, offset, end) in enumerate(members):
        if k == 0 or members[k - 1][0] != name:
            start = offset
        if k + 1 == len(members) or members[k + 1][0] != name:
            yield Entry(name, path.name, start, end - start)


def write_index(root: Path, entries: Sequence[Entry]) -> None:
    """Writes the index of a folder of shards. Raises OutputError."""
    with atomic_path(root / INDEX) as path, open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{e.id}\t{e.shard}\t{e.offset}\t{e.length}\n" for e in entries)


def read_index(root: Path) -> Iterator[Entry]:
    """The entries of the index, one by one. Raises DataError."""
    path = root / INDEX
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                name, shard, offset, length = line.rstrip("\n").rsplit("\t", 3)
                yield Entry(name, shard, int(offset), int(length))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no index of shards ({error}); {_MAKE_AGAIN}") from error
