"""The feedback: colour and coordinate maps of the Gaussians, for the next step (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.geometry import camera_points, to_world, unproject
from ouroboros3d.interfaces import Rendering

# The 3D-aware feedback maps c of the paper: name ("rgb", "ccm") -> [B, V, 3, H, W] in [0, 1].
Feedback = dict[str, Tensor]


def views_to_reconstruct(views: Tensor, image: Tensor, input_view: str) -> Tensor:
    """[B, V, 3, H, W] for the reconstructor, from the predicted views and the input image [B, 3, H', W'].

    `predicted` (the release) is the views as they are. `given` has the input image itself, resized to them, as view 0:
    that view is known, so the object keeps its colours and details.
    """
    if input_view == "predicted":
        return views
    known = F.interpolate(image.to(views), views.shape[-2:], mode="area")
    return torch.cat([known[:, None], views[:, 1:]], dim=1)


def feedback_maps(rendering: Rendering, cameras: Cameras, convention: str) -> Feedback:
    """Every map of MAPS by name, [B, V, 3, H, W] in [0, 1]."""
    return {name: make(rendering, cameras, convention) for name, make in MAPS.items()}


def choose_maps(maps: Feedback, known: Sequence[str], chosen: Sequence[str]) -> Feedback:
    """What a network with adapters for the `known` maps is given: the chosen ones, and zeros for the others."""
    return {name: maps[name] if name in chosen else torch.zeros_like(maps[name]) for name in known}


def coordinates_map(
    depth: Tensor, cameras: Cameras, convention: str = "release", alpha: Tensor | None = None
) -> Tensor:
    """Canonical coordinates map of the rendered depth (Sec. 3.3): [B, V, 1, H, W] -> [B, V, 3, H, W] in [0, 1].

    `depth` is accumulated along z and not divided by alpha; empty pixels (depth 0) become 0.5.
    `release` (quirk 7): pixel *indices* meet intrinsics in image widths, and the result is scaled by 0.001 around
    0.5, in the dtype of the pose. `textbook`: unprojection of depth / alpha where alpha > 0.5, with the cube
    [-1, 1]^3 mapped to [0, 1]^3; needs `alpha`.
    """
    if convention == "release":
        index = torch.arange(depth.shape[-1], device=depth.device, dtype=cameras.c2w.dtype)
        v, u = torch.meshgrid(index, index, indexing="ij")
        world, scale = to_world(camera_points(cameras, u, v), depth, cameras.c2w), 0.001
    elif convention == "textbook":
        if alpha is None:
            raise ValueError("the textbook coordinates map needs alpha to turn accumulated depth into depth")
        depth = depth / alpha.clamp(min=1e-6) * (alpha > 0.5)
        world, scale = unproject(depth, cameras), 0.5
    else:
        raise ValueError(f"coordinates map convention must be 'release' or 'textbook', got {convention!r}")
    return ((world * (depth > 0)) * scale + 0.5).clamp(0, 1).to(depth.dtype)


# How the maps named in config/schema.py are made: (rendering, cameras, convention) -> [B, V, 3, H, W] in [0, 1].
MAPS: dict[str, Callable[[Rendering, Cameras, str], Tensor]] = {
    "rgb": lambda rendering, cameras, convention: rendering.rgb.clamp(0, 1),
    "ccm": lambda rendering, cameras, convention: coordinates_map(
        rendering.depth, cameras, convention, rendering.alpha
    ),
}
