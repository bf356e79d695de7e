"""Which way is up: from the canonical frame to those of viewers and other tools.

The canonical frame (cameras.py) is y-up for the input camera, so an object photographed from `elevation` degrees
above leans towards it. Every export first straightens it, by a turn of -elevation about x. What is up in the file
is then a further turn about x, so that both are one number of degrees.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ouroboros3d.errors import UserError
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.gaussians import Gaussians

# Up in the file -> degrees about x that bring y there. The front (+z, where the input camera stood) goes to +z,
# -z, -y and +y.
UPS = {"y": 0.0, "-y": 180.0, "z": 90.0, "-z": -90.0}
MIN_OPACITY = 0.005  # fainter Gaussians are left out, as the release does


class ExportError(UserError, ValueError):
    """An object that cannot be written in this format; the message is one line for the user."""


def turn_degrees(up: str, elevation: float) -> float:
    """Degrees about x from the canonical frame to a file in which `up` is up. Raises ExportError."""
    if up not in UPS:
        raise ExportError(f"up {up!r}: choose from {', '.join(UPS)}")
    return UPS[up] - elevation


def upright(object3d: Object3D, up: str) -> Gaussians:
    """What the writers store: the visible Gaussians in the frame in which `up` is up, unit quaternions, float32."""
    return unit_quaternions(visible(object3d.gaussians)).turned(turn_degrees(up, object3d.elevation))


def visible(gaussians: Gaussians) -> Gaussians:
    """The Gaussians of one scene that can be seen, on the CPU in float32. Raises ExportError for NaN or if none can."""
    if gaussians.means.shape[0] != 1:
        raise ValueError(f"an export holds one scene, got a batch of {gaussians.means.shape[0]}")
    scene = gaussians.detach().to(torch.float32).to("cpu")
    if not scene.to_tensor().isfinite().all():
        raise ExportError("the Gaussians hold NaN or infinity; no file can show them")
    keep = scene.opacities[0] >= MIN_OPACITY
    if not keep.any():
        raise ExportError(f"the object has no visible Gaussians: none is as opaque as {MIN_OPACITY}")
    return scene.map(lambda x: x[:, keep])


def unit_quaternions(gaussians: Gaussians, tolerance: float = 1e-4) -> Gaussians:
    """The same covariances by unit quaternions and scales, which is all that viewers know.

    Quaternions of length 1 are kept. The others, the release's own (quirk 17), do not stand for a rotation: for them
    axes and scales are those of the covariance, by an eigendecomposition in float64.
    """
    lengths = gaussians.quats.norm(dim=-1, keepdim=True)
    is_unit = (lengths - 1).abs() <= tolerance
    unit = gaussians.quats / lengths.clamp_min(1e-12)
    if is_unit.all():
        return replace(gaussians, quats=unit)
    variances, axes = torch.linalg.eigh(gaussians.to(torch.float64).covariances())
    axes = axes * torch.linalg.det(axes)[..., None, None]  # a reflection of all axes has the same covariance
    scales = variances.clamp_min(1e-16).sqrt().to(gaussians.scales.dtype)
    quats = rotation_to_quaternion(axes).to(gaussians.quats.dtype)
    return replace(
        gaussians,
        quats=torch.where(is_unit, unit, quats),
        scales=torch.where(is_unit, gaussians.scales, scales),
    )


def rotation_to_quaternion(rotation: Tensor) -> Tensor:
    """[..., 3, 3] rotations to [..., 4] unit quaternions (w, x, y, z), on the CPU."""
    from scipy.spatial.transform import Rotation

    quats = Rotation.from_matrix(rotation.reshape(-1, 3, 3).numpy()).as_quat()  # x, y, z, w
    return torch.from_numpy(quats).roll(1, dims=-1).reshape(*rotation.shape[:-2], 4).to(rotation)
