"""LGM: weights to Gaussians."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from ouroboros3d.cameras import Cameras
from tests.parity.fixtures import Case, Fixtures, close, pictures


def check_lgm(f: Fixtures) -> Iterator[Case]:
    """`LGM.forward_gaussians` at several noise levels and batches; then rendered (quirks 16 to 18)."""
    a, info, lgm = f.arrays("lgm"), f.scalars("lgm"), f.models.lgm
    for tag in (k.removesuffix(".gaussians") for k in a if k.endswith(".gaussians")):
        images, c2w, K = (a.get(f"{tag}.{name}", a[name]) for name in ("images", "c2w", "intrinsics"))
        if f"{tag}.view_ids" in a:
            index = a[f"{tag}.view_ids"]
            images, c2w, K = images[:, index], c2w[:, index], K[:, index]
        with torch.no_grad():
            gaussians = lgm(images, Cameras(c2w, K), a[f"{tag}.timestep"])
        yield close(f"{tag}.gaussians", gaussians.to_tensor(), a[f"{tag}.gaussians"], 1e-4)

    views = info["view_ids_of_forward"]
    cameras = Cameras(a["c2w"], a["intrinsics"])
    # In float64: depths magnify the rounding of float32 kernels, which differs between processors.
    with torch.no_grad():
        gaussians = copy.deepcopy(lgm).double()(a["images"], cameras, a["t_float_scalar.timestep"])
    rendering = f.render(gaussians, cameras.views(views), a["forward.images_pred"].shape[-1])
    yield from pictures("forward.images_pred", rendering.rgb.clamp(0, 1), a["forward.images_pred"])
    yield from pictures("forward.alphas_pred", rendering.alpha, a["forward.alphas_pred"])
    yield from pictures("forward.depths_pred", rendering.depth, a["forward.depths_pred"])
