"""Reads the files of an orbit and lists of orbits, and reports damage in one line.

A file is anything with `read_bytes()` and a name to print: a pathlib.Path, or a member of a shard (shards.py).
"""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ouroboros3d.errors import UserError, one_line
from ouroboros3d.files import read_list

RENDER_AGAIN = "render this orbit again or take its id out of the list"
RIGID = 1e-3  # by how much R^T R may differ from 1: float32 matrices that were multiplied a few times still pass
# Errors of a file that will be there the next time too.
LASTING = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
_log = logging.getLogger(__name__)


class DataError(UserError, ValueError):
    """Training data cannot be used. The message is one line: the file, what is wrong, what to do."""

    def __str__(self) -> str:
        # A DataLoader raises a worker's error again with the worker's whole traceback for a message; its last line
        # is "module.Class: message".
        kind = f"{type(self).__module__}.{type(self).__qualname__}: "
        lines = super().__str__().strip().splitlines() or [""]
        return lines[-1].removeprefix(kind)


class DamagedOrbit(DataError):
    """The files of one orbit cannot be used, and will not be usable the next time either."""


class File(Protocol):
    def read_bytes(self) -> bytes: ...


class Folder(Protocol):
    def __truediv__(self, name: str) -> File: ...


@dataclass(frozen=True)
class OrbitMeta:
    """What meta.json says."""

    names: list[str]  # picture files, in orbit order
    c2w: Tensor  # [frames, 4, 4] float64, OpenGL
    fov: float  # degrees


@dataclass(frozen=True)
class Views:
    """n frames of an orbit, at H = W pixels."""

    c2w: Tensor  # [n, 4, 4] float64, OpenGL
    fov: float  # degrees
    rgba: Tensor  # [n, H, W, 4] uint8
    depth: Tensor | None  # [n, h, w] along the camera's axis, 0 = empty


class Ids(Sequence[str]):
    """Ids in one array: a list of a million strings would be copied into every worker as it is read."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = np.array([name.encode() for name in ids])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> str:
        return self._ids[index].decode()


def read_ids(path: Path) -> list[str]:
    """The ids in a list file (see files.read_list). Blank lines are skipped; an id that stands more than once is read
    once, with a warning. Raises DataError if the file is missing or empty."""
    hint = "check the root and the list's name, or render orbits with scripts/render_orbits.py"
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder; {hint}")
    try:
        lines = read_list(path)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)}); {hint}") from error
    counts = Counter(filter(None, lines))
    if not counts:
        raise DataError(
            f"{path}: the list is empty; name another by data.train or data.val, or add ids of data.root, one per line"
        )
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        _log.warning(
            "%s: %d ids stand there more than once and are read once: %s", path, len(repeated), first_names(repeated)
        )
    return list(counts)


def first_names(names: Sequence[str], most: int = 8) -> str:
    """The first few names of many, in words."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def read_views(folder: Folder, frames: int, chosen: Sequence[int], size: int, depth: bool) -> Views:
    """The chosen frames of an orbit of `frames` views, at size x size pixels.

    Raises DamagedOrbit if one of these frames cannot be used; the others are not read."""
    meta = read_poses(folder, frames)
    rgba = torch.stack([read_rgba(folder / meta.names[k], size) for k in chosen])
    maps = read_depth(folder / "depth.npz", frames)[list(chosen)] if depth else None
    return Views(meta.c2w[list(chosen)], meta.fov, rgba, maps)


def read_meta(file: File, frames: int) -> OrbitMeta:
    """meta.json of an orbit of `frames` views; raises DamagedOrbit. Any finite matrices will do, see read_poses."""
    data = _read(file)
    try:
        meta = json.loads(data)
        names = [location["frames"][0]["name"] for location in meta["locations"]]
        c2w = torch.tensor([location["transform_matrix"] for location in meta["locations"]], dtype=torch.float64)
        fov = math.degrees(float(meta["camera_angle_x"]))
    except KeyError as error:
        raise DamagedOrbit(f"{file}: has no {error}; {RENDER_AGAIN}") from error
    except (ValueError, TypeError, IndexError) as error:
        raise DamagedOrbit(f"{file}: cannot be read ({one_line(error)}); {RENDER_AGAIN}") from error
    if len(names) != frames:
        raise DamagedOrbit(f"{file}: has {len(names)} frames instead of {frames}; {RENDER_AGAIN}")
    if c2w.shape[1:] != (4, 4) or not c2w.isfinite().all() or not 0 < fov < 180:
        raise DamagedOrbit(f"{file}: a matrix is not 4 x 4 finite numbers, or camera_angle_x no angle; {RENDER_AGAIN}")
    if not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise DamagedOrbit(f"{file}: a frame's name is not that of a file in the orbit's folder; {RENDER_AGAIN}")
    return OrbitMeta(names, c2w, fov)


def read_poses(folder: Folder, frames: int) -> OrbitMeta:
    """meta.json of an orbit of `frames` views, whose matrices are rotations and translations; raises DamagedOrbit."""
    meta = read_meta(folder / "meta.json", frames)
    turn, last = meta.c2w[:, :3, :3], torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    error = (turn.mT @ turn - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    bad = (error > RIGID) | (torch.linalg.det(turn) < 0) | ((meta.c2w[:, 3] - last).abs().amax(1) > RIGID)
    if bad.any():
        where = f"{folder / 'meta.json'}: the matrix of frame {int(bad.nonzero()[0])}"
        raise DamagedOrbit(f"{where} is no rotation and translation; {RENDER_AGAIN}")
    return meta


def read_rgba(file: File, size: int) -> Tensor:
    """A picture as [size, size, 4] uint8 RGBA, resized as the release does (bicubic); raises DamagedOrbit."""
    data = _read(file)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            rgba = picture.convert("RGBA")
    except MemoryError:
        raise
    except Exception as error:  # a decoder raises whatever it trips over
        reason = "no picture" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise DamagedOrbit(f"{file}: cannot be read ({reason}); {RENDER_AGAIN}") from error
    if rgba.width != rgba.height:
        raise DamagedOrbit(f"{file}: is {rgba.width} x {rgba.height}, not square; {RENDER_AGAIN}")
    if rgba.width != size:
        rgba = rgba.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgba))


def read_depth(file: File, frames: int) -> Tensor:
    """Depth maps [frames, h, w] of depth.npz; raises DamagedOrbit."""
    hint = "render the orbits with --depth or set data.depth=false"
    data = _read(file, hint)
    try:
        with np.load(io.BytesIO(data)) as archive:
            depth = torch.from_numpy(archive["depth"])
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib and numpy all have their own
        raise DamagedOrbit(f"{file}: cannot be read ({one_line(error)}); {hint}") from error
    if depth.ndim != 3 or len(depth) != frames:
        raise DamagedOrbit(f"{file}: depth has shape {tuple(depth.shape)} instead of [{frames}, h, w]; {hint}")
    return depth


def _read(file: File, hint: str = RENDER_AGAIN) -> bytes:
    try:
        return file.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in LASTING:  # a name with a zero byte is a ValueError
            raise DamagedOrbit(f"{file}: cannot be read ({one_line(error)}); {hint}") from error
        # The disk's or the network's, which may be over the next time: no reason to replace the orbit.
        raise DataError(f"{file}: cannot be read ({one_line(error)}); see whether its disk is well") from error
