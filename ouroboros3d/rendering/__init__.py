"""Differentiable rendering of 3D Gaussians: one function, three backends.

`cpu` (numba) and `gsplat` (CUDA) are for use, `dense` (float64 torch) is the oracle both are tested against.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering.rules import RULES, Rules

__all__ = ["BACKENDS", "RULES", "Rules", "render"]

BACKENDS = ("auto", "cpu", "gsplat", "dense")


def render(
    gaussians: Gaussians,
    cameras: Cameras,
    size: int,
    background: Sequence[float] | Tensor = (1.0, 1.0, 1.0),
    backend: str = "auto",
    rules: str = "exact",
    near: float = 0.2,
    far: float = math.inf,
) -> Rendering:
    """All views of a batch of scenes, `size` x `size` pixels, differentiable in every Gaussian parameter.

    A pixel is C = sum_i c_i alpha_i T_i + background T, T_i = prod_{j<i} (1 - alpha_j), over the Gaussians
    front to back (Kerbl et al. 2023, eq. 3); the rules hold the numbers that complete this.

    Args:
        gaussians: B scenes of N Gaussians; N may be 0.
        cameras: B x V cameras on the same device; no gradient flows to them.
        background: r, g, b behind the Gaussians, [3] for all scenes or [B, 3].
        backend: `auto` takes gsplat for tensors on CUDA and cpu otherwise. cpu and gsplat compute in float32
            whatever the input's dtype, dense in float64; the result has that dtype.
        rules: which kernel's clamps and extents to follow, see `rules.py`. gsplat only knows its own and
            refuses `release`.
        near, far: Gaussians with near < z < far in the camera are drawn (world units). The default near is
            the release's, whose kernel has it built in and ignores the near plane of its projection.

    Returns:
        rgb composited on the background, not clamped; depth = sum alpha T z, not divided by alpha; alpha.

    Raises:
        ValueError: shapes that disagree, unknown names, a backend that cannot render these tensors or
            rules, Gaussians that are not finite (checked on the CPU only; on CUDA it would wait for the
            device).
        ImportError: gsplat is asked for and cannot be imported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if rules not in RULES:
        raise ValueError(f"rules must be one of {', '.join(RULES)}, got {rules!r}")
    check_inputs(gaussians, cameras, size, near, far)
    device = gaussians.means.device
    if backend == "auto":
        backend = "gsplat" if device.type == "cuda" else "cpu"
    cameras = cameras.detach()
    if not isinstance(background, Tensor):  # numbers are filled in: a copy from the host would wait in every step
        background = torch.stack([torch.full((), float(channel), device=device) for channel in background])
    background = background.detach().to(device, torch.float32)
    if background.shape not in ((3,), (cameras.batch_size, 3)):
        raise ValueError(f"background must be [3] or [B, 3], got shape {tuple(background.shape)}")
    if background.ndim == 2:  # the backends know one colour; what is behind comes in by 1 - alpha
        black = render(gaussians, cameras, size, (0.0, 0.0, 0.0), backend, rules, near, far)
        colour = background[:, None, :, None, None].to(black.rgb.dtype)
        return Rendering(black.rgb + (1 - black.alpha) * colour, black.depth, black.alpha)

    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"the cpu renderer wants CPU tensors, got {device}")
    if backend == "gsplat" and device.type != "cuda":
        raise ValueError(f"gsplat renders CUDA tensors only, got {device}; backend='cpu' renders these")
    module = importlib.import_module(f"{__name__}.{'gsplat_backend' if backend == 'gsplat' else backend}")
    with torch.autocast(device.type, enabled=False):  # half precision would move the Gaussians by pixels
        return module.rasterize(gaussians, cameras, size, background, RULES[rules], float(near), float(far))


def check_inputs(gaussians: Gaussians, cameras: Cameras, size: int, near: float, far: float) -> None:
    """Raises ValueError for what would otherwise fail far from its cause."""
    if gaussians.means.ndim != 3:
        raise ValueError(f"Gaussians want means [B, N, 3], got {tuple(gaussians.means.shape)}")
    batch, count, _ = gaussians.means.shape
    wanted = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "rgb": (3,)}
    for name, last in wanted.items():
        value = getattr(gaussians, name)
        if value.shape != (batch, count, *last):
            raise ValueError(f"Gaussians.{name} must be {(batch, count, *last)}, got {tuple(value.shape)}")
        if value.device.type == "cpu" and not torch.isfinite(value).all():
            raise ValueError(f"Gaussians.{name} has values that are not finite")
    if batch == 0 or cameras.num_views == 0:
        raise ValueError(f"nothing to render: {batch} scenes, {cameras.num_views} views")
    if cameras.batch_size != batch:
        raise ValueError(f"{batch} scenes of Gaussians but cameras for {cameras.batch_size}")
    if cameras.c2w.device != gaussians.means.device or cameras.K.device != gaussians.means.device:
        raise ValueError(f"cameras on {cameras.c2w.device} and Gaussians on {gaussians.means.device}")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive number of pixels, got {size!r}")
    if not 0 < near < far:
        raise ValueError(f"planes must satisfy 0 < near < far, got near {near} and far {far}")
