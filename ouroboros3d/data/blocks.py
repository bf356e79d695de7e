"""Blocks of bytes of remote shards, kept in a sparse local copy."""

from __future__ import annotations

import http.client
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from filelock import FileLock

from ouroboros3d.data.orbit_files import DamagedOrbit, DataError
from ouroboros3d.files import ADDRESS

ORIGIN, INDEX = "origin.txt", "shards.tsv"  # origin.txt: where the shards of the local folder come from
_TRIES, _WAIT, _TIMEOUT = 4, 0.5, 60.0  # the wait doubles, seconds


def read_block(folder: Path, shard: str, offset: int, length: int) -> bytes:
    """Bytes of a shard, from the local copy or, the first time, from its origin.

    The local copy has holes; an orbit's first 512 bytes, a tar header, are written last. Raises DataError.
    """
    path = folder / shard
    block = local_block(path, offset, length) if path.exists() else b""
    if len(block) == length and any(block[:512]):
        return block
    origin = (folder / ORIGIN).read_text(encoding="utf-8").strip()
    url = f"{origin}/{shard}"
    for attempt in range(_TRIES):
        try:
            source, partial = open_address(url, offset, length)
            if not partial:
                source.close()
                fetch_whole(url, path)
                return local_block(path, offset, length)
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


def local_block(path: Path, offset: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length)


def _keep(path: Path, offset: int, block: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, block[512:], offset + 512)
        os.pwrite(descriptor, block[:512], offset)
    finally:
        os.close(descriptor)


def open_address(url: str, offset: int = 0, length: int | None = None) -> tuple[IO[bytes], bool]:
    """A stream, and whether it holds just the bytes asked for."""
    if not ADDRESS.match(url):
        return open(url, "rb"), False
    if not url.startswith(("http:", "https:")):
        from webdataset import gopen

        return gopen(url, "rb"), False
    ranges = {} if length is None else {"Range": f"bytes={offset}-{offset + length - 1}"}
    answer = urllib.request.urlopen(urllib.request.Request(url, headers=ranges), timeout=_TIMEOUT)
    return answer, answer.status == 206


def copy_whole(source: IO[bytes], copy: IO[bytes]) -> None:
    """All that a stream announces: one that ends early is no error to shutil. Raises OSError."""
    start = copy.tell()
    shutil.copyfileobj(source, copy, 1 << 20)
    announced, came = getattr(source, "headers", {}).get("Content-Length"), copy.tell() - start
    if announced is not None and came != int(announced):
        raise OSError(f"it broke off after {came:,} of {int(announced):,} bytes")


def fetch_whole(url: str, path: Path) -> None:
    """The whole shard, unless it is there; a part that an earlier run left is continued where the server can."""
    with FileLock(path.with_suffix(".lock")):
        whole = path.with_suffix(".whole")
        if whole.is_file():
            return
        part = path.with_suffix(".part")
        start = part.stat().st_size if part.is_file() else 0
        try:
            source, partial = open_address(url, start, 1 << 40) if start else open_address(url)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the part is as long as the whole, or longer
                raise
            source, partial = open_address(url)
        with source, open(part, "ab" if partial else "wb") as copy:
            copy_whole(source, copy)
        os.replace(part, path)
        whole.touch()
