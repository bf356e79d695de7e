"""The renderer: pictures, gradients, the turntable."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.rendering import RULES, render
from ouroboros3d.rendering.dense import project, tile_boxes
from ouroboros3d.visualize import turntable_cameras
from tests.parity.fixtures import (
    KERNEL_NEAR,
    Arrays,
    Case,
    Fixtures,
    close,
    difference,
    pictures,
    projection_matrix,
    recorded_cameras,
    relative,
)


def check_render(f: Fixtures) -> Iterator[Case]:
    """The renderer, its gradient and the turntable (quirks 17 and 19)."""
    a = f.arrays("render")
    cameras, view_ids = recorded_cameras(a.under("cameras")), a["view_ids"]
    size = int(a["cameras.height"][0])
    unit, columns = (
        Gaussians.from_tensor(a[f"{kind}_quaternions.gaussians"]) for kind in ("unit", "column_normalised")
    )
    for tag, gaussians in (("unit_quaternions", unit), ("column_normalised_quaternions", columns)):
        rendering = f.render(gaussians, cameras.views(view_ids), size)
        values = {"image": rendering.rgb.clamp(0, 1), "alpha": rendering.alpha, "depth": rendering.depth}
        for name in sorted(a.under(tag).keys() & values.keys()):
            yield from pictures(f"{tag}.{name}", values[name], a[f"{tag}.{name}"])

    if "coloured_background.image" in a:
        smaller = replace(columns, scales=0.6 * columns.scales)  # scale_modifier
        rendering = render(smaller, cameras.views(view_ids), size, (0.2, 0.0, 0.7), rules="release")
        image = rendering.rgb.clamp(0, 1)
        yield from pictures("coloured_background.image", image, a["coloured_background.image"])

    for view in a.numbers(r"raw_view(\d+)\."):
        rendering = f.render(unit, cameras.views([view]), size)
        for name, value in (("color", rendering.rgb), ("depth", rendering.depth), ("alpha", rendering.alpha)):
            yield from pictures(f"raw_view{view}.{name}", value[0, 0], a[f"raw_view{view}.{name}"])
        radii = _radii(unit, cameras.views([view]), size)
        yield close(f"raw_view{view}.radii", radii, a[f"raw_view{view}.radii"], 0)

    yield from _check_render_gradient(f, a, cameras, size)
    yield from _check_video(f, a, columns)


def _check_video(f: Fixtures, a: Arrays, gaussians: Gaussians) -> Iterator[Case]:
    lgm = f.spec["lgm"]
    turntable = turntable_cameras(step=1.0, radius=lgm["cam_radius"], fov=lgm["fovy"])
    turntable = turntable.views(a["video.azimuths"])
    yield close("video.cam_view", turntable.w2c[0].transpose(-1, -2), a["video.cam_view"], 1e-6)
    projection = projection_matrix(turntable.K[0, 0], lgm["znear"], lgm["zfar"])
    # LGM's own entry; no pixel depends on it.
    projection[2, 2] = (lgm["zfar"] + lgm["znear"]) / (lgm["zfar"] - lgm["znear"])
    yield close("video.proj_matrix", projection, a["video.proj_matrix"], 1e-6)
    rendering = f.render(gaussians, turntable, f.spec["render_size"])
    yield from pictures("video.image", rendering.rgb.clamp(0, 1), a["video.image"])
    yield from pictures("video.alpha", rendering.alpha, a["video.alpha"])


def _check_render_gradient(f: Fixtures, a: Arrays, cameras: Cameras, size: int) -> Iterator[Case]:
    x = a["gradient.gaussians"].clone().requires_grad_()
    rendering = f.render(Gaussians.from_tensor(x), cameras.views([int(a["gradient.view_id"])]), size)
    # The image is the clamped one, as `GaussianRenderer.render` returns it.
    terms = {"image": rendering.rgb.clamp(0, 1), "alpha": rendering.alpha, "depth": rendering.depth}
    loss = sum((terms[name] * a[f"gradient.weight_{name}"]).sum() for name in terms)
    loss.backward()
    yield relative("gradient.loss", loss, a["gradient.loss"].item(), 1e-4)
    expected = a["gradient.d_gaussians"]
    yield Case(
        "gradient.d_gaussians (relative to its largest)",
        difference(x.grad, expected).max().item() / expected.abs().max().item(),
        1e-4,
    )


def _radii(gaussians: Gaussians, cameras: Cameras, size: int) -> Tensor:
    """[N] the kernel's radii in pixels: 3 sigma of the longer axis, 0 for what touches no tile."""
    rules, gaussians, cameras = RULES["release"], gaussians.to(torch.float64), cameras.to(torch.float64)
    splats = project(gaussians, cameras, size, rules, KERNEL_NEAR, math.inf)
    xx, xy, yy = splats.covariances[0, 0].unbind(-1)
    middle = 0.5 * (xx + yy)
    longest = middle + (middle**2 - (xx * yy - xy * xy)).clamp_min(0.1).sqrt()
    x0, x1, y0, y1 = tile_boxes(splats, gaussians.opacities, size, rules)[0, 0].unbind(-1)
    return (3 * longest.sqrt()).ceil() * (splats.visible[0, 0] & (x1 > x0) & (y1 > y0))
