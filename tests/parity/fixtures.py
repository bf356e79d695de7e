"""Recorded tensors and how ours are compared with them.

A folder of fixtures holds tiny random weights and what the release computes with them; its README describes each
array. Whatever may differ between such folders (dimensions, steps, views, draws) is read from its files. "Quirk n" is
the README's numbering, as in docs/faithfulness.md.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ouroboros3d import diffusion
from ouroboros3d.build import Models
from ouroboros3d.cameras import Cameras, intrinsics_from_fov
from ouroboros3d.config.loading import config_from_dict
from ouroboros3d.config.schema import MAPS, Config
from ouroboros3d.errors import UserError, one_line
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.models.lgm import LGM
from ouroboros3d.models.multiview_unet import MultiViewUNet
from ouroboros3d.models.svd import SVDParts, make_image_encoder, make_vae
from ouroboros3d.models.weights import CheckpointError, fit_state, from_release_names
from ouroboros3d.rendering import render

NEAR, FAR = 0.01, 100.0  # planes of the renderer's projection matrix (quirk 9); its kernel ignores them
KERNEL_NEAR = 0.2
LGM_KEYS = (
    *("input_size", "splat_size", "down_channels", "down_attention", "mid_attention"),
    *("up_channels", "up_attention"),
)


class FixtureError(UserError, ValueError):
    """The folder is not one of fixtures; the message is one line."""


@dataclass(frozen=True)
class Case:
    """One comparison. `error` is the largest absolute one unless the name says otherwise."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Arrays(dict):
    """Named arrays of one file, float16 as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FixtureError(f"{path}: cannot be read ({one_line(error)})") from error
        super().__init__({k: v.float() if v.dtype == torch.float16 else v for k, v in arrays.items()})

    def __missing__(self, name: str) -> Tensor:
        raise FixtureError(f"{self.path}: has no array {name}")

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays below `prefix.`, by the rest of their names."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.items() if k.startswith(f"{prefix}.")}

    def numbers(self, pattern: str) -> list[int]:
        """The distinct numbers matched by the group of a regex over the names, e.g. the sizes of a case."""
        return sorted({int(m[1]) for k in self if (m := re.match(pattern, k))})


class Fixtures:
    """A folder of fixtures, its files and the networks they are for, loaded as they are needed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FixtureError(f"{folder}: no such folder of fixtures")
        self.spec = self.scalars("config")
        try:
            self.config = config_of(self.spec)
        except (KeyError, TypeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else error
            raise FixtureError(f"{self.folder / 'config.json'}: {what}") from error

    @functools.lru_cache(maxsize=4)  # noqa: B019 - as long as the process, like the object itself
    def arrays(self, name: str) -> Arrays:
        return Arrays(self.folder / f"{name}.safetensors")

    def scalars(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            reason = one_line(error)
            raise FixtureError(f"{path}: cannot be read ({reason})") from error

    @functools.cached_property
    def models(self) -> Models:
        config = self.config.model
        unet = MultiViewUNet(config)
        # The release fixes these two widths in its code, so that config.json has no entry for them.
        time_embed_dim, time_channels = self.arrays("weights_recon_model")["unet.time_embed.0.weight"].shape
        widths = {"time_embed_dim": time_embed_dim, "time_channels": time_channels}
        lgm = LGM(replace(config.lgm, **widths), config.conventions.rotation)
        processor = self.spec["image_processor"]
        svd = SVDParts(
            make_vae(config.vae),
            make_image_encoder(config.image_encoder),
            config.conventions.decode_chunk,
            processor["image_mean"],
            processor["image_std"],
        )
        parts = {"mv_model_unet": unet, "recon_model": lgm, "vae": svd.vae, "image_encoder": svd.image_encoder}
        for name, module in parts.items():
            weights = self.arrays(f"weights_{name}")
            if module is unet:
                weights = from_release_names(weights, config.multiview.adapter.res_blocks)
            try:
                fit_state(module, weights, self.folder / f"weights_{name}", may_miss="position_ids")
            except CheckpointError as error:
                raise FixtureError(str(error)) from error
        return Models(unet, lgm, svd).eval()

    @property
    def kept(self) -> list[int]:
        """The views whose image-space arrays are stored."""
        return self.spec["kept_views"]

    def render(self, gaussians: Gaussians, cameras: Cameras, size: int) -> Rendering:
        return render(gaussians, cameras, size, rules="release")


def config_of(spec: dict[str, Any]) -> Config:
    """config.json in our terms. Raises ValueError for what this implementation has no setting for."""
    unet, vae, encoder, adapter = spec["unet"], spec["vae"], spec["image_encoder"], spec["adapter"]
    lgm, scheduler = spec["lgm"], spec["scheduler"]
    *micro_conditions, noise_augmentation = spec["added_time_ids"]
    config = config_from_dict(
        {
            "model": {
                "image_size": spec["image_size"],
                "multiview": {
                    "unet": unet,
                    "adapter": {"res_blocks": adapter["nums_rb"]},
                    "feedback": list(MAPS[: spec["num_adapters"]]),
                    "ray_octaves": (spec["plucker_input_dim"] // 6 - 1) // 2,
                    "micro_conditions": micro_conditions,
                },
                "vae": _without(vae, "down_block_types", "in_channels", "out_channels"),
                "image_encoder": _without(encoder, "num_channels"),
                "lgm": {key: lgm[key] for key in LGM_KEYS} | {"num_input_views": spec["lgm_num_frames"]},
            },
            "sampler": {
                "steps": spec["num_inference_steps"],
                "guidance": spec["guidance"],
                "feedback": list(MAPS[: spec["num_adapters"]]),
                "noise_augmentation": noise_augmentation,
                "scheduler": {key: scheduler[key] for key in ("sigma_min", "sigma_max")},
            },
            "cameras": {"num_views": spec["num_frames"], "orbit_frames": max(16, spec["num_frames"])},
            "objective": {"lpips_weight": 0.0},  # LPIPS is replaced by 0 in the recorded runs
        }
    )
    widths = unet["block_out_channels"]
    ours = diffusion.euler_schedule(config.sampler.scheduler, 1).config
    derived = {
        "adapter.channels": (adapter["channels"], widths),
        "adapter.cin": (adapter["cin"], 3 * config.model.vae.downscale**2),
        "plucker_input_dim": (spec["plucker_input_dim"], 6 * (2 * config.model.multiview.ray_octaves + 1)),
        "plucker_widths.down": (spec["plucker_widths"]["down"], [widths[0], *widths[:-1]]),
        "plucker_widths.mid": (spec["plucker_widths"]["mid"], widths[-1]),
        "plucker_widths.up": (spec["plucker_widths"]["up"], [widths[-1], *reversed(widths[1:])]),
        "vae.in_channels": (vae["in_channels"], 3),
        "image_encoder.num_channels": (encoder["num_channels"], 3),
    } | {f"scheduler.{key}": (value, ours[key]) for key, value in scheduler.items() if key in ours}
    for key, (value, want) in derived.items():
        if value != want:
            raise ValueError(f"{key} = {value}: this implementation has {want}")
    return config


def _without(values: dict, *keys: str) -> dict:
    return {k: v for k, v in values.items() if k not in keys}


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> Case:
    """Largest absolute difference."""
    return Case(name, difference(actual, expected).max().item() if expected.numel() else 0.0, tolerance)


def pictures(name: str, actual: Tensor, expected: Tensor, most: float = 1e-4, every: float = 5e-3) -> Iterator[Case]:
    """[..., C, H, W]: tolerance `most` for 99.9 % of the pixels, `every` for all: next to 1/255 a
    contribution may flip."""
    per_pixel = difference(actual, expected)
    if per_pixel.ndim >= 3:
        per_pixel = per_pixel.amax(-3)
    quantile = per_pixel.flatten().kthvalue(math.ceil(0.999 * per_pixel.numel())).values.item()
    yield Case(f"{name} (99.9 %)", quantile, most)
    yield Case(f"{name} (all)", per_pixel.max().item(), every)


def relative(name: str, actual: Tensor | float, expected: float, tolerance: float) -> Case:
    error = abs(float(torch.as_tensor(actual).detach()) - expected)
    return Case(f"{name} (relative)", error / max(abs(expected), 1e-12), tolerance)


def difference(actual: Tensor, expected: Tensor) -> Tensor:
    if actual.shape != expected.shape:  # a wrong shape is a wrong result
        return torch.full((1,), math.inf)
    return (actual.detach().double() - expected.double()).abs().nan_to_num(math.inf, math.inf)


def recorded_cameras(arrays: dict[str, Tensor]) -> Cameras:
    """[1, V] cameras from the fields of the release's renderer cameras."""
    c2w = torch.linalg.inv(arrays["world_to_camera"].double().transpose(-1, -2))
    K = intrinsics_from_fov(torch.rad2deg(arrays["fov_x"].double()))
    K[..., 1, 1] = 0.5 / torch.tan(arrays["fov_y"] / 2)
    return Cameras(c2w.float()[None], K[None])


def projection_matrix(K: Tensor, near: float, far: float) -> Tensor:
    """[..., 4, 4] the renderer's projection of centred intrinsics, transposed for row vectors."""
    out = K.new_zeros(*K.shape[:-2], 4, 4)
    out[..., 0, 0], out[..., 1, 1] = 2 * K[..., 0, 0], 2 * K[..., 1, 1]
    out[..., 2, 2], out[..., 3, 2] = far / (far - near), -far * near / (far - near)
    out[..., 2, 3] = 1
    return out
