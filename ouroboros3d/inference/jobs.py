"""Finds the pictures of a run, names their results, and skips finished ones.

Does not import torch, so wrong arguments are refused at once.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ouroboros3d.errors import UserError, one_line
from ouroboros3d.files import OutputError, write_json

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
LISTS = (".txt", ".lst")
LONGEST_NAME = 255  # bytes of a file's name, of most file systems
RECORD = ".json"


class InputError(UserError, ValueError):
    """What was named as input has no pictures. The message is one line: what was named, what to do."""


@dataclass(frozen=True)
class Job:
    """One picture and the name of its results."""

    name: str
    path: Path


@dataclass(frozen=True)
class Options:
    """What to make of each picture, beside the configuration."""

    formats: Sequence[str]  # of ouroboros3d.export
    remove_background: bool | str  # see photo.cut_out
    border: float  # of the square around a cut-out object
    elevation: float | str  # degrees; "auto" looks for it
    candidates: int
    save_steps: bool
    export: dict[str, Any]  # options of the formats' writers
    settings: dict[str, Any]  # all that the results depend on, for their record


@dataclass(frozen=True)
class Record:
    """What made the results of a picture: `<name>.json` beside them."""

    picture: str  # its path
    sha256: str  # of its file
    settings: dict[str, Any]  # all that the results depend on
    seed: int = 0
    elevation: float = 0.0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)  # of the results, in the same folder


def find_pictures(inputs: Iterable[str | Path]) -> list[Path]:
    """The pictures that files, folders (without their subfolders), globs and lists name, each once, in that order.

    A list is a .txt with one picture per line, relative to its folder or to the working folder; lines that begin with #
    are comments. Only files that are named by themselves must exist. Raises InputError.
    """
    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.is_file())
            found += _some(pictures, path, f"a folder without pictures ({', '.join(PICTURES)})")
        elif path.suffix.lower() in LISTS and path.is_file():
            found += _some(_listed(path), path, "the list is empty; write one picture per line")
        elif path.exists():
            found.append(path)
        elif glob.has_magic(str(text)):
            matches = (Path(p) for p in sorted(glob.glob(str(text), recursive=True)))
            pictures = [p for p in matches if p.suffix.lower() in PICTURES]
            found += _some(pictures, path, "no picture matches; put the pattern in quotes and check it")
        else:
            raise InputError(f"{text}: no such file; check the path")
    return list(dict.fromkeys(found))


def _some(pictures: list[Path], source: Path, otherwise: str) -> list[Path]:
    if not pictures:
        raise InputError(f"{source}: {otherwise}")
    return pictures


def _listed(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list ({one_line(error)}); write one picture per line") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return [beside if (beside := path.parent / name).exists() else Path(name) for name in names]


def name_jobs(pictures: Sequence[Path], folder: str | Path, endings: Sequence[str]) -> list[Job]:
    """Names the results of every picture after its file. Raises OutputError where results would overwrite each other or
    a picture, or would have names that are too long."""
    folder = Path(folder).resolve()
    results: dict[Path, Path] = {}
    for path in pictures:
        longest = max((f"{path.stem}{ending}" for ending in endings), key=lambda name: len(name.encode()))
        if len(longest.encode()) > LONGEST_NAME:
            raise OutputError(f"{path}: its result {longest[:20]}... would have a name of over 255 bytes; rename it")
        own = [folder / f"{path.stem}{ending}" for ending in endings]
        if other := next((results[result] for result in own if result in results), None):
            raise OutputError(f"{other} and {path}: their results would have the same name; rename one")
        results |= dict.fromkeys(own, path)
    for path in pictures:
        if (source := results.get(path.resolve())) is not None:
            raise OutputError(f"{path}: the results of {source} would overwrite it; choose another output folder")
    return [Job(path.stem, path) for path in pictures]


def file_sha256(path: Path) -> str:
    """Of a file's bytes; empty if it cannot be read, which opening the picture will explain."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError:
        return ""


def weights_stamp(folder: str | Path | None) -> list[Any]:
    """Names, sizes and times of the files in a weights folder: what tells one model from another without reading it."""
    files = sorted(Path(folder).rglob("*")) if folder is not None and Path(folder).is_dir() else []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.is_file()]


def write_record(folder: Path, name: str, record: Record) -> None:
    """`<name>.json`, atomically. Raises OutputError."""
    write_json(folder / f"{name}{RECORD}", asdict(record))


def read_record(folder: Path, name: str) -> Record | None:
    """What was written of these results, None if there is no readable record."""
    try:
        return Record(**json.loads((folder / f"{name}{RECORD}").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_finished(job: Job, folder: Path, settings: dict[str, Any], endings: Sequence[str]) -> bool:
    """Whether the results of this very picture with these settings are all there."""
    record = read_record(folder, job.name)
    if record is None or record.settings != json.loads(json.dumps(settings)):
        return False
    there = all((folder / f"{job.name}{ending}").exists() for ending in endings)
    return there and record.sha256 == file_sha256(job.path)
