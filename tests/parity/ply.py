"""The release's .ply files, there and back."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ouroboros3d.gaussians import Gaussians, load_ply, save_ply
from tests.parity.fixtures import Case, FixtureError, Fixtures, close


def check_ply(f: Fixtures) -> Iterator[Case]:
    """Both flavours of the .ply: header byte for byte, values, and what reading gives back (quirk 20)."""
    a = f.arrays("ply")
    gaussians = Gaussians.from_tensor(a["gaussians"])
    with tempfile.TemporaryDirectory() as folder:
        for flavour, compatible in (("compatible", True), ("plain", False)):
            recorded, written = f.folder / f"ply_{flavour}.ply", Path(folder) / f"{flavour}.ply"
            save_ply(written, gaussians, compatible)
            (header, rows), (our_header, our_rows) = _split_ply(recorded), _split_ply(written)
            yield Case(f"{flavour}.header (differs)", float(header != our_header), 0)
            yield close(f"{flavour}.values", our_rows, rows, 1e-5)
            for name, path in (("loaded", recorded), ("written and loaded", written)):
                loaded = load_ply(path, compatible).to_tensor()[0]
                yield close(f"{flavour}.{name}", loaded, a[f"loaded_{flavour}"], 1e-5)


def _split_ply(path: Path) -> tuple[bytes, Tensor]:
    """Header and the float32 values after it."""
    try:
        header, _, body = path.read_bytes().partition(b"end_header\n")
    except OSError as error:
        raise FixtureError(f"{path}: cannot be read ({error.strerror})") from error
    return header, torch.frombuffer(bytearray(body), dtype=torch.float32)
