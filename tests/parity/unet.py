"""The multi-view U-Net: rays, adapters, whole forwards."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ouroboros3d.cameras import Cameras
from tests.parity.fixtures import Case, Fixtures, close


def check_mv_unet(f: Fixtures) -> Iterator[Case]:
    """`MVModel.forward` and a feedback adapter alone (quirks 2 to 6)."""
    a, info, unet = f.arrays("mv_unet"), f.scalars("mv_unet"), f.models.unet
    for tag in (k.removesuffix(".output") for k in a if k.endswith(".output")):
        sample = a[f"{tag}.sample"]
        cameras = Cameras(a[f"{tag}.extrinsics"], a[f"{tag}.intrinsics"])
        maps = None
        if info[tag]["uses_cond"]:
            maps = {name: a[f"{tag}.cond_{name}_u8"].float() / 255 for name in unet.config.feedback}
        with torch.no_grad():
            output = unet(
                sample,
                a[f"{tag}.timestep"],
                a[f"{tag}.encoder_hidden_states"],
                a[f"{tag}.added_time_ids"],
                unet.encode_cameras(cameras, sample.shape[-1]),
                unet.encode_feedback(maps),
            )
        yield close(tag, output, a[f"{tag}.output"], 1e-4)
    for index in a.numbers(r"adapter(\d+)\."):
        with torch.no_grad():
            features = unet.cond_encoder[index](a[f"adapter{index}.cond"].flatten(0, 1))
        for level, feature in enumerate(features):
            name = f"adapter{index}.feature{level}"
            yield close(name, feature, a[name], 1e-4)
