"""Shards that lie elsewhere: at an address, or chosen by a pattern. What is read stays in a local folder.

    https://host/shards                          a folder that scripts/make_shards.py wrote
    https://host/shards/train-{000000..000099}.tar, data/shards/train-0000*.tar      some of its shards, or anybody's

http and https are asked for the bytes of one orbit at a time; whatever else webdataset opens (pipe:, s3:, gs:, ...),
and servers that know no ranges, for whole shards. A stopped download goes on with what is missing.
"""

from __future__ import annotations

import glob
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from filelock import FileLock

from ouroboros3d.data.orbit_files import DamagedOrbit, DataError, read_ids
from ouroboros3d.files import atomic_path, check_writable_dir, write_lines

ORIGIN, INDEX = "origin.txt", "shards.tsv"  # origin.txt: where the shards of the local folder come from
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_TRIES, _WAIT, _TIMEOUT = 4, 0.5, 60.0  # the wait doubles, seconds


def is_remote(root: str) -> bool:
    """Whether this is no folder but an address or a pattern."""
    return bool(_ADDRESS.match(root)) or any(sign in root for sign in "*?{")


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
    names = [] if _ADDRESS.match(base) else sorted(map(os.path.basename, glob.glob(f"{base}/{pattern}")))
    if not names and ("*" in pattern or "?" in pattern):
        raise DataError(f"{base}/{pattern}: matches no shard; * is for folders, addresses need {{000000..000099}}")
    return names or [pattern]


def _prepare_index(base: str, folder: Path, shards: list[str] | None, has_index: bool) -> None:
    """Keeps the lines of these shards, or makes them from the shards themselves."""
    from ouroboros3d.data.shards import read_index, scan_shard, write_index

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
            _fetch_whole(f"{base}/{name}", folder / name)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{base}/{name}: cannot be fetched ({error}); correct data.root or start again") from error
        entries += scan_shard(folder / name)
    write_index(folder, entries)


def _refresh(base: str, folder: Path, name: str) -> bool:
    """Fetches a small file unless an equally long one is there. False if neither side has it."""
    path, url = folder / name, f"{base}/{name}"
    try:
        with _open(url)[0] as source:
            size = getattr(source, "headers", {}).get("Content-Length")
            if size is None or not path.is_file() or path.stat().st_size != int(size):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary, open(temporary, "wb") as copy:
                    shutil.copyfileobj(source, copy)
    except (OSError, http.client.HTTPException):
        return path.is_file()
    return path.is_file() and path.stat().st_size > 0


def read_block(folder: Path, shard: str, offset: int, length: int) -> bytes:
    """Bytes of a shard, from the local copy or, the first time, from its origin.

    The local copy has holes; an orbit's first 512 bytes, a tar header, are written last. Raises DataError.
    """
    path = folder / shard
    block = _local_block(path, offset, length)
    if len(block) == length and any(block[:512]):
        return block
    origin = (folder / ORIGIN).read_text(encoding="utf-8").strip()
    url = f"{origin}/{shard}"
    for attempt in range(_TRIES):
        try:
            source, partial = _open(url, offset, length)
            if not partial:
                source.close()
                _fetch_whole(url, path)
                return _local_block(path, offset, length)
            with source:
                block = source.read(length)
            if len(block) == length:
                _keep(path, offset, block)
                return block
        except urllib.error.HTTPError as error:
            if error.code in (403, 404, 410):
                raise DamagedOrbit(f"{url}: {error.code} {error.reason}; correct data.root or the list") from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == _TRIES - 1:
                raise DataError(f"{url}: cannot be fetched ({error}); start again when the network is back") from error
        time.sleep(_WAIT * 2**attempt)
    raise DataError(f"{url}: cannot be fetched; start again when the network is back")


def _local_block(path: Path, offset: int, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)
    except FileNotFoundError:
        return b""


def _keep(path: Path, offset: int, block: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, block[512:], offset + 512)
        os.pwrite(descriptor, block[:512], offset)
    finally:
        os.close(descriptor)


def _open(url: str, offset: int = 0, length: int | None = None) -> tuple[IO[bytes], bool]:
    """A stream, and whether it holds just the bytes asked for."""
    if not _ADDRESS.match(url):
        return open(url, "rb"), False
    if not url.startswith(("http:", "https:")):
        from webdataset import gopen

        return gopen(url, "rb"), False
    ranges = {} if length is None else {"Range": f"bytes={offset}-{offset + length - 1}"}
    answer = urllib.request.urlopen(urllib.request.Request(url, headers=ranges), timeout=_TIMEOUT)
    return answer, answer.status == 206


def _fetch_whole(url: str, path: Path) -> None:
    """The whole shard, unless it is there; a part that an earlier run left is continued where the server can."""
    with FileLock(path.with_suffix(".lock")):
        whole = path.with_suffix(".whole")
        if whole.is_file():
            return
        part = path.with_suffix(".part")
        start = part.stat().st_size if part.is_file() else 0
        try:
            source, partial = _open(url, start, 1 << 40) if start else _open(url)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the part is as long as the whole, or longer
                raise
            source, partial = _open(url)
        with source, open(part, "ab" if partial else "wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
        os.replace(part, path)
        whole.touch()
