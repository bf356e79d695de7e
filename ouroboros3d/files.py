"""Atomic writes, checks of output folders before the work starts, and lists."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ouroboros3d.errors import UserError

PACKAGE = Path(__file__).resolve().parent
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
ROOT = PACKAGE.parent  # of a clone; an installed package has configs/ and checkpoints/ inside itself


def is_remote(root: str) -> bool:
    """Whether data are at an address or chosen by a pattern, and not simply in a folder."""
    return bool(ADDRESS.match(root)) or any(sign in root for sign in "*?{")


def locate(path: str | Path) -> Path:
    """`path`, or if there is no such file or folder the one of that name in the repository or the installed package,
    so that configs/small.yaml or checkpoints/small can be named from any working folder."""
    path = Path(path)
    if path.is_absolute() or path.exists():
        return path
    return next((found for root in (ROOT, PACKAGE) if (found := root / path).exists()), path)


def config_beside(weights: str | Path) -> Path | None:
    """The config.yaml that belongs to weights: in their folder; for a file, and for export/ and best/ of a run, in the
    folder above. None if there is none."""
    path = locate(Path(weights).expanduser())
    folders = [path, path.parent] if path.is_file() or path.name in ("export", "best") else [path]
    return next((file for folder in folders if (file := folder / "config.yaml").is_file()), None)


class OutputError(UserError, OSError):
    """A result cannot be written. The message is one line: where, why, what to do."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary sibling of `path` to write to, with the same suffix (writers go by it).

    The sibling becomes `path` when the block ends and is removed when it fails, so a reader sees the old
    file, the new one or none, but never half of one. Raises OutputError if the system refuses (no space, no
    permission).
    """
    path = Path(path)
    # Not derived from the name, which may be as long as the file system allows already.
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:  # not from the system: a library's own
            raise
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, blank ones too: any line ends, a byte order mark is no part of the text.

    Raises OSError and UnicodeError.
    """
    data = Path(path).read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return [line.strip() for line in re.split(r"\r\n|\r|\n", data.decode("utf-16" if wide else "utf-8-sig"))]


def read_table(path: str | Path, columns: Sequence[str]) -> list[dict[str, str]] | None:
    """The rows of a csv file by the names of its columns, in small letters; None where the first line does not name
    all of `columns`. Columns are separated by commas, semicolons or tabs; an empty field is "".

    Raises OSError, UnicodeError and csv.Error.
    """
    lines = read_lines(path)
    if lines and lines[0].lower().startswith("sep="):  # which Excel reads and writes
        lines = lines[1:]
    for separator in ",;\t":
        rows = [row for row in csv.reader(lines, delimiter=separator) if any(row)]
        names = [name.strip().lower() for name in rows[0]] if rows else []
        if set(columns) <= set(names):
            return [dict(zip(names, (*map(str.strip, row), *[""] * len(names)), strict=False)) for row in rows[1:]]
    return None


def read_list(path: str | Path) -> list[str]:
    """The ids of a list: one per line, or the column `id` of a csv file; "" for a blank line.

    Raises OSError, UnicodeError and csv.Error.
    """
    table = read_table(path, ["id"])
    if table is not None:
        return [row["id"] for row in table]
    lines = [line.rstrip(";,").rstrip() for line in read_lines(path)]
    return lines[: -1 if lines and not lines[-1] else None]


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Bytes, or text in UTF-8, all or nothing. Raises OutputError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """One a line, all or nothing. Raises OutputError."""
    write_whole(path, "".join(f"{line}\n" for line in lines))


def write_json(path: str | Path, values: Any) -> None:
    """Indented, all or nothing; NaN and infinity, which JSON lacks, become null. Raises OutputError."""
    finite = json.loads(json.dumps(values), parse_constant=lambda _name: None)
    write_whole(path, json.dumps(finite, indent=1) + "\n")


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """A header and these columns of the rows, all or nothing. Raises OutputError."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Yields an empty folder inside `folder`, for results that belong together.

    When the block ends, what it holds moves to `folder`, in place of what has the same name there; when it
    fails, nothing of it stays. Raises OutputError if the system refuses.
    """
    folder = Path(folder)
    stage = folder / f".tmp-{uuid.uuid4().hex[:12]}"
    try:
        stage.mkdir()
        yield stage
        for path in sorted(stage.iterdir()):
            target = folder / path.name
            if path.is_dir() and target.is_dir():  # which os.replace refuses unless it is empty
                os.replace(target, stage / f".old-{path.name}")
            os.replace(path, target)
    except OutputError as error:  # of a file here, which the user knows by where it was to go
        raise OutputError(str(error).replace(str(stage), str(folder))) from error
    except OSError as error:
        if error.errno is None:  # not from the system: a library's own
            raise
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_writable_dir(path: str | Path) -> Path:
    """Creates the folder `path` with its parents and proves that a file can be written there.

    Raises OutputError if a file is in the way, the folder is read-only or the disk is full.
    """
    path = Path(path)
    probe = path / f".tmp-{uuid.uuid4().hex[:12]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        try:
            with open(probe, "wb") as file:
                file.write(bytes(1 << 16))
                file.flush()
                os.fsync(file.fileno())  # some file systems notice only here that they are full
        finally:
            probe.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        in_the_way = next(part for part in (path, *path.parents) if os.path.lexists(part))
        raise OutputError(f"cannot write to {path}: {in_the_way} is no folder; choose another output folder") from error
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}; choose another output folder") from error
    return path
