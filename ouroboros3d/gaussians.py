"""3D Gaussians: the type, its covariances and the .ply format of 3D Gaussian Splatting.

Shapes: B batch, N Gaussians.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from plyfile import PlyData, PlyElement, PlyParseError
from torch import Tensor

from ouroboros3d.errors import UserError
from ouroboros3d.files import atomic_path
from ouroboros3d.tensors import Tensors

SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))
PLY_PROPERTIES = (
    *("x", "y", "z"),
    *("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacity",
    *("scale_0", "scale_1", "scale_2"),
    *("rot_0", "rot_1", "rot_2", "rot_3"),
)
MAX_GAUSSIANS = 1 << 22  # that a .ply may hold: 0.5 GB in memory
TURN_COMMENT = "ouroboros3d: turned {turn!r} degrees about x from the canonical frame; elevation {elevation!r}"
_TURN = re.compile(r"ouroboros3d: turned (\S+) degrees about x from the canonical frame; elevation (\S+)")


class PlyError(UserError, ValueError):
    """A .ply that does not hold Gaussians. The message is one line: the file, what is wrong, what would be right."""


@dataclass(frozen=True)
class Gaussians(Tensors):
    """N Gaussians for each of B scenes, all values after activation."""

    means: Tensor  # [B, N, 3] world positions
    quats: Tensor  # [B, N, 4] (w, x, y, z), used as they are: see `covariances`
    scales: Tensor  # [B, N, 3] standard deviations along the Gaussian's axes, world units
    opacities: Tensor  # [B, N] in [0, 1]
    rgb: Tensor  # [B, N, 3] in [0, 1]

    @classmethod
    def from_tensor(cls, x: Tensor) -> Gaussians:
        """[B, N, 14] in LGM's order: position 3, opacity 1, scale 3, quaternion 4, rgb 3."""
        if x.ndim != 3 or x.shape[-1] != 14:
            raise ValueError(f"Gaussians want [B, N, 14], got {tuple(x.shape)}")
        means, opacities, scales, quats, rgb = x.split([3, 1, 3, 4, 3], dim=-1)
        return cls(means, quats, scales, opacities[..., 0], rgb)

    def to_tensor(self) -> Tensor:
        """[B, N, 14], the inverse of `from_tensor`."""
        return torch.cat([self.means, self.opacities[..., None], self.scales, self.quats, self.rgb], dim=-1)

    def scene(self, index: int) -> Gaussians:
        """One scene of the batch, B = 1, float32."""
        return Gaussians.from_tensor(self.to_tensor()[index : index + 1].float())

    def covariances(self) -> Tensor:
        """[B, N, 3, 3] R S S^T R^T (3DGS eq. 6) with R the polynomial of the *raw* quaternion.

        For a unit quaternion R is its rotation. The release's Gaussians are not unit (docs/faithfulness.md, quirk
        17) and its kernel does not normalise either, so normalising here would change every one of them.
        """
        w, x, y, z = self.quats.unbind(-1)
        rows = [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ]
        rotation = torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
        half = rotation * self.scales[..., None, :]
        return (half[..., :, None, :] * half[..., None, :, :]).sum(-1)  # no matrix product: TF32 would round it

    def turned(self, degrees: float) -> Gaussians:
        """The scene turned about the x axis, y towards z. Only right for unit quaternions, see `covariances`."""
        angle = math.radians(degrees)
        cos, sin, half_cos, half_sin = math.cos(angle), math.sin(angle), math.cos(angle / 2), math.sin(angle / 2)
        x, y, z = self.means.unbind(-1)
        means = torch.stack([x, cos * y - sin * z, sin * y + cos * z], dim=-1)
        w, i, j, k = self.quats.unbind(-1)
        quats = [half_cos * w - half_sin * i, half_cos * i + half_sin * w]
        quats += [half_cos * j - half_sin * k, half_cos * k + half_sin * j]
        return replace(self, means=means, quats=torch.stack(quats, dim=-1))


def save_ply(
    path: str | Path,
    gaussians: Gaussians,
    compatible: bool = True,
    min_opacity: float = 0.005,
    comments: Sequence[str] = (),
) -> None:
    """Writes one scene (B = 1) as a 3DGS .ply, atomically; Gaussians fainter than `min_opacity` are dropped.

    `compatible` stores what viewers expect, the values before activation: logit opacity, log scale and
    (rgb - 0.5) / SH_C0. Without it the activated values are stored as they are. Release: parity quirk 20.
    """
    if gaussians.means.shape[0] != 1:
        raise ValueError(f"a .ply holds one scene, got a batch of {gaussians.means.shape[0]}")
    scene = gaussians.to(torch.float32).detach().to("cpu")
    keep = scene.opacities[0] >= min_opacity
    means, quats, scales = scene.means[0][keep], scene.quats[0][keep], scene.scales[0][keep]
    opacity, rgb = scene.opacities[0][keep, None], scene.rgb[0][keep]
    if compatible:
        opacity = torch.log(opacity / (1 - opacity + 1e-8) + 1e-8)  # logit, guarded as the release does
        scales = torch.log(scales + 1e-8)
        rgb = (rgb - 0.5) / SH_C0
    rows = torch.cat([means, rgb, opacity, scales, quats], dim=-1).numpy()
    vertices = np.empty(len(rows), dtype=[(name, "<f4") for name in PLY_PROPERTIES])
    for i, name in enumerate(PLY_PROPERTIES):
        vertices[name] = rows[:, i]
    ply = PlyData([PlyElement.describe(vertices, "vertex")], text=False, byte_order="<", comments=list(comments))
    with atomic_path(path) as temporary:
        ply.write(str(temporary))


def load_ply(path: str | Path, compatible: bool = True) -> Gaussians:
    """Reads a 3DGS .ply (B = 1), what `save_ply` wrote or another tool; higher harmonics are left out.

    A file that was turned for viewers comes back to the canonical frame. Raises PlyError.
    """
    turn, _ = ply_frame(path) or (0.0, 0.0)
    try:
        vertex = PlyData.read(str(path))["vertex"]
        columns = [np.asarray(vertex[name], dtype=np.float32) for name in PLY_PROPERTIES]
    except (PlyParseError, KeyError, ValueError) as error:
        raise PlyError(f"{path} is not a 3D Gaussian .ply with {', '.join(PLY_PROPERTIES)}: {error}") from error
    rows = torch.from_numpy(np.stack(columns, axis=-1))
    if broken := int((~rows.isfinite()).any(dim=-1).sum()):
        raise PlyError(f"{path}: {broken} of its {len(rows)} Gaussians hold NaN or infinity; write the file again")
    means, rgb, opacity, scales, quats = rows.split([3, 3, 1, 3, 4], dim=-1)
    if compatible:
        opacity, scales, rgb = opacity.sigmoid(), scales.exp(), SH_C0 * rgb + 0.5
    gaussians = Gaussians(means[None], quats[None], scales[None], opacity[None, :, 0], rgb[None])
    return gaussians.turned(-turn) if turn else gaussians


def turn_comment(turn: float, elevation: float) -> str:
    """By which `load_ply` finds back to the canonical frame from a file that was turned for viewers."""
    return TURN_COMMENT.format(turn=float(turn), elevation=float(elevation))


def ply_frame(path: str | Path) -> tuple[float, float] | None:
    """(turn, elevation) in degrees that the comment of a .ply names, None if it has none: the file is the canonical
    frame turned about x, and the input camera looked down from this elevation. Raises PlyError."""
    header = _ply_header(path)
    count = re.search(r"^element vertex (\d+)", header, re.MULTILINE)
    if count is not None and int(count[1]) > MAX_GAUSSIANS:
        raise PlyError(f"{path}: holds {int(count[1]):,} Gaussians; at most {MAX_GAUSSIANS:,} are read")
    found = _TURN.search(header)
    try:
        return (float(found[1]), float(found[2])) if found else None
    except ValueError as error:
        raise PlyError(f"{path}: its comment {found[0]!r} is damaged: {error}") from error


def _ply_header(path: str | Path, longest: int = 1 << 16) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(longest).partition(b"end_header")[0].decode("ascii", errors="replace").replace("\r", "")
    except OSError as error:
        raise PlyError(f"{path}: cannot be read: {error.strerror}") from error
