"""Shards at an address, or chosen by a pattern. Data that was read stays in a local folder.

    https://host/shards                          a folder that scripts/make_shards.py wrote
    https://host/shards/train-{000000..000099}.tar, data/shards/train-0000*.tar      some of its shards, or anybody's

From http and https one orbit's bytes are requested at a time. Other protocols of webdataset (pipe:, s3:, gs:, ...) and
servers without ranges deliver whole shards. A stopped download continues with the missing bytes.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
from pathlib import Path

from filelock import FileLock

from ouroboros3d.data.blocks import INDEX, ORIGIN, copy_whole, fetch_whole, open_address
from ouroboros3d.data.orbit_files import DataError, read_ids
from ouroboros3d.data.shards import read_index, scan_shard, write_index
from ouroboros3d.files import ADDRESS, atomic_path, check_writable_dir, is_remote, write_lines


def local_root(root: str, list_file: str, cache_dir: str | None = None) -> Path:
    """The folder to read `root` from; for an address or a pattern one in `cache_dir`, with its index and list.

    cache_dir: None is ~/.cache/ouroboros3d. Raises DataError, and OutputError where the cache cannot be written.
    """
    if not is_remote(root):
        return Path(root)
    base, pattern = root.rstrip("/"), ""
    if root.endswith(".tar"):
        base, _, pattern = root.rpartition("/")
    shards = _expand(base, pattern) if pattern else None
    key = root
    if not ADDRESS.match(base):
        base = str(Path(base).resolve())
        key = _state(base, pattern, shards or [])
    cache = Path(cache_dir or Path.home() / ".cache" / "ouroboros3d")
    folder = check_writable_dir(cache / hashlib.sha256(key.encode()).hexdigest()[:16])
    with FileLock(folder / ".lock"):
        write_lines(folder / ORIGIN, [base])
        has_list, has_index = (_refresh(base, folder, name) for name in (list_file, INDEX))
        _prepare_index(base, folder, shards, has_index)
        if shards is not None and not _prepare_list(folder, list_file, has_list):
            raise DataError(
                f"{root}: has no orbit of {list_file}; take a pattern that has shards of every list, like "
                f"{base}/{{train,val}}-*.tar"
            )
    return folder


def _state(base: str, pattern: str, shards: list[str]) -> str:
    """Differs for another folder, and once these shards have changed."""
    stats = [(name, os.stat(Path(base, name))) for name in shards if Path(base, name).is_file()]
    return "\n".join([f"{base}/{pattern}", *(f"{name} {s.st_size} {s.st_mtime_ns}" for name, s in stats)])


def _prepare_list(folder: Path, list_file: str, has_list: bool) -> list[str]:
    """Keeps the ids of the list that are in the index. Without a list a shard is of the one its name begins with, as
    make_shards.py has it; where none begins so, all are of every list."""
    entries, start = list(read_index(folder)), f"{Path(list_file).stem}-"
    named = {entry.id for entry in entries if entry.shard.startswith(start)}
    listed = set(read_ids(folder / list_file)) if has_list else named or {entry.id for entry in entries}
    names = [entry.id for entry in entries if entry.id in listed]
    write_lines(folder / list_file, names)
    return names


def _expand(base: str, pattern: str) -> list[str]:
    """Names of shards. Raises DataError if there are none."""
    patterns = [pattern]
    if "{" in pattern:
        from braceexpand import UnbalancedBracesError, braceexpand

        try:
            patterns = list(braceexpand(pattern))
        except UnbalancedBracesError as error:
            raise DataError(f"{base}/{pattern}: has a brace without its partner") from error
    names: list[str] = []
    for one in patterns:
        starred = "*" in one or "?" in one
        found = [] if ADDRESS.match(base) else sorted(map(os.path.basename, glob.glob(f"{base}/{one}")))
        if not found and starred:
            raise DataError(f"{base}/{one}: matches no shard; * is for folders, addresses need {{000000..000099}}")
        names += found or [one]
    return names


def _prepare_index(base: str, folder: Path, shards: list[str] | None, has_index: bool) -> None:
    """Keeps the lines of these shards, or makes them from the shards themselves."""
    if shards is None:
        if not has_index:
            raise DataError(
                f"{base}: has no {INDEX}; name its shards by a pattern, like {base}/train-{{000000..000009}}.tar"
            )
        return
    if has_index:
        write_index(folder, [entry for entry in read_index(folder) if entry.shard in set(shards)])
        return
    entries = []
    for name in shards:
        try:
            fetch_whole(f"{base}/{name}", folder / name)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{base}/{name}: cannot be fetched ({error}); correct data.root or start again") from error
        entries += scan_shard(folder / name)
    write_index(folder, entries)


def _refresh(base: str, folder: Path, name: str) -> bool:
    """Fetches a small file unless an equally long one is there. False if neither side has it."""
    path, url = folder / name, f"{base}/{name}"
    try:
        with open_address(url)[0] as source:
            size = getattr(source, "headers", {}).get("Content-Length")
            if size is None or not path.is_file() or path.stat().st_size != int(size):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary, open(temporary, "wb") as copy:
                    copy_whole(source, copy)
    except (OSError, http.client.HTTPException):
        return path.is_file()
    return path.is_file() and path.stat().st_size > 0
