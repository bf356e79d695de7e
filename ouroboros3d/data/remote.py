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
import shutil
from pathlib import Path

from filelock import FileLock

from ouroboros3d.data.blocks import ADDRESS, INDEX, ORIGIN, fetch_whole, open_address
from ouroboros3d.data.orbit_files import DataError, read_ids
from ouroboros3d.data.shards import read_index, scan_shard, write_index
from ouroboros3d.files import atomic_path, check_writable_dir, write_lines


def is_remote(root: str) -> bool:
    """Whether this is no folder but an address or a pattern."""
    return bool(ADDRESS.match(root)) or any(sign in root for sign in "*?{")


def local_root(root: str, list_file: str, cache_dir: str | None = None) -> Path:
    """The folder to read `root` from; for an address or a pattern one in `cache_dir`, with its index and list.

    cache_dir: None is ~/.cache/ouroboros3d. Raises DataError, and OutputError where the cache cannot be written.
    """
    if not is_remote(root):
        return Path(root)
    base, pattern = root.rstrip("/"), ""
    if root.endswith(".tar"):
        base, _, pattern = root.rpartition("/")
    cache = Path(cache_dir or Path.home() / ".cache" / "ouroboros3d")
    folder = check_writable_dir(cache / hashlib.sha256(root.encode()).hexdigest()[:16])
    with FileLock(folder / ".lock"):
        write_lines(folder / ORIGIN, [base])
        shards = _expand(base, pattern) if pattern else None
        has_list, has_index = (_refresh(base, folder, name) for name in (list_file, INDEX))
        _prepare_index(base, folder, shards, has_index)
        if shards is not None:
            known = [line.split("\t")[0] for line in (folder / INDEX).read_text(encoding="utf-8").splitlines()]
            listed = set(read_ids(folder / list_file)) if has_list else set(known)
            write_lines(folder / list_file, [name for name in known if name in listed])
    return folder


def _expand(base: str, pattern: str) -> list[str]:
    """Names of shards. Raises DataError if there are none."""
    if "{" in pattern:
        from braceexpand import braceexpand

        return list(braceexpand(pattern))
    names = [] if ADDRESS.match(base) else sorted(map(os.path.basename, glob.glob(f"{base}/{pattern}")))
    if not names and ("*" in pattern or "?" in pattern):
        raise DataError(f"{base}/{pattern}: matches no shard; * is for folders, addresses need {{000000..000099}}")
    return names or [pattern]


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
                    shutil.copyfileobj(source, copy)
    except (OSError, http.client.HTTPException):
        return path.is_file()
    return path.is_file() and path.stat().st_size > 0
