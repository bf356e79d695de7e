"""Gaussians for splat viewers: .ply, .compressed.ply, .splat and .spz.

.ply, .compressed.ply and .splat have no specified frame; the common viewers take y as down. .spz is right, up, back
by its specification, as our canonical frame is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ouroboros3d.export.frames import turn_degrees, upright
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.files import atomic_path, write_whole
from ouroboros3d.gaussians import SH_C0, Gaussians, save_ply, turn_comment

if TYPE_CHECKING:
    import gsply

# 32 bytes per Gaussian (antimatter15/splat): quaternion components in [-1, 1] as 128 + 128 q.
SPLAT = np.dtype([("mean", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("quat", "u1", 4)])


def write_ply(object3d: Object3D, path: Path, up: str = "-y", raw: bool = False) -> None:
    """The .ply of 3DGS, turned so that viewers show it upright; a comment in the header names the turn.

    `raw` writes the release's file: its frame, its quaternions and no comment.
    """
    if raw:
        save_ply(path, object3d.gaussians)
        return
    comment = turn_comment(turn_degrees(up, object3d.elevation), object3d.elevation)
    save_ply(path, upright(object3d, up), comments=[comment])


def write_splat(object3d: Object3D, path: Path, up: str = "-y") -> None:
    """antimatter15's .splat, the most visible Gaussians first, since viewers show a file while it loads."""
    g = upright(object3d, up)
    rgba = np.concatenate([g.rgb[0].numpy(), g.opacities[0, :, None].numpy()], axis=1)
    rows = np.empty(len(rgba), SPLAT)
    rows["mean"], rows["scale"] = g.means[0].numpy(), g.scales[0].numpy()
    rows["rgba"] = np.rint(rgba * 255).clip(0, 255)
    rows["quat"] = np.rint(g.quats[0].numpy() * 128 + 128).clip(0, 255)
    importance = g.scales[0].prod(dim=-1) * g.opacities[0]
    write_whole(path, rows[importance.argsort(descending=True, stable=True).numpy()].tobytes())


def write_spz(object3d: Object3D, path: Path, up: str = "y") -> None:
    """Niantic's .spz, version 3."""
    import gsply

    with atomic_path(path) as temporary:
        gsply.write_spz(temporary, _gsply_data(upright(object3d, up)))


def write_compressed_ply(object3d: Object3D, path: Path, up: str = "-y") -> None:
    """PlayCanvas's compressed .ply, 16 bytes per Gaussian."""
    import gsply

    write_whole(path, gsply.compress_to_bytes(_gsply_data(upright(object3d, up))))


def _gsply_data(g: Gaussians) -> gsply.GSData:
    """Values before activation, as in a .ply."""
    import gsply

    values = (g.means, g.scales.clamp_min(1e-8).log(), g.quats, g.opacities.logit(1e-5), (g.rgb - 0.5) / SH_C0)
    return gsply.GSData.from_arrays(*(np.ascontiguousarray(v[0].numpy()) for v in values), format="ply")
