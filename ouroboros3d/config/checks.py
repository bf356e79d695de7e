"""What a configuration must satisfy beyond its types: bounds, and dimensions that fit each other.

Every refusal is a ConfigError with the key's name, its value and what would be right.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from ouroboros3d.config.schema import MAPS, Config, LGMConfig, ModelConfig, Part
from ouroboros3d.errors import ConfigError

# What a bound of a field's metadata asks for, and in words.
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def check_config(config: Config) -> None:
    """Refuses values that cannot work, alone or together, each with the key, the value and what would be right."""
    _check_values(config)
    _check_diffusion_networks(config.model)
    _check_reconstructor(config.model.lgm)
    _check_use(config)
    _check_objective(config)


def _require(ok: bool, key: str, value: Any, want: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {value!r}: {want}")


def _check_values(node: Any, prefix: str = "") -> None:
    """Each value by itself, against the bounds of its field."""
    for field_ in fields(node):
        key, value = f"{prefix}{field_.name}", getattr(node, field_.name)
        if is_dataclass(value):
            _check_values(value, f"{key}.")
            continue
        bounds = dict(field_.metadata)
        length = bounds.pop("length", None)
        _require(length is None or len(value) == length, key, value, f"wants {length} numbers")
        want = " and ".join(f"{BOUNDS[name][1]} {bound:g}" for name, bound in bounds.items())
        for number in value if isinstance(value, list) else [value]:
            _require(not isinstance(number, float) or math.isfinite(number), key, number, "must be a finite number")
            ok = number is None or all(BOUNDS[name][0](number, bound) for name, bound in bounds.items())
            _require(ok, key, number, f"must be {want}")


def _check_diffusion_networks(model: ModelConfig) -> None:
    """U-Net, adapters, VAE and image encoder: what their layers and each other's shapes allow."""
    unet, vae, encoder = model.multiview.unet, model.vae, model.image_encoder
    levels = len(unet.block_out_channels)
    for name in ("down_block_types", "up_block_types", "num_attention_heads"):
        value = getattr(unet, name)
        _require(len(value) == levels, f"model.multiview.unet.{name}", value, f"wants {levels} entries, one a level")
    for direction, names in (("Down", unet.down_block_types), ("Up", unet.up_block_types)):
        known = [f"{kind}{direction}BlockSpatioTemporal" for kind in ("", "CrossAttn")]
        key = f"model.multiview.unet.{direction.lower()}_block_types"
        _require(set(names) <= set(known), key, names, f"must be of {', '.join(known)}")
    for key, widths, groups in (
        ("model.multiview.unet.block_out_channels", unet.block_out_channels, model.multiview.norm_groups),
        ("model.vae.block_out_channels", vae.block_out_channels, vae.norm_groups),
    ):
        _require(len(widths) > 0 and all(w > 0 and w % 32 == 0 for w in widths), key, widths, "wants multiples of 32")
        _require(all(w % min(groups, 32) == 0 for w in widths), key, widths, f"wants multiples of {groups} norm_groups")
    _require(
        all(w % h == 0 for w, h in zip(unet.block_out_channels, unet.num_attention_heads, strict=True)),
        "model.multiview.unet.num_attention_heads",
        unet.num_attention_heads,
        f"must divide block_out_channels = {unet.block_out_channels}",
    )
    _require(
        unet.addition_time_embed_dim % 2 == 0,
        "model.multiview.unet.addition_time_embed_dim",
        unet.addition_time_embed_dim,
        "must be even: sines and cosines",
    )
    smallest = vae.downscale * 2 ** (levels - 1)
    _require(
        model.image_size % smallest == 0, "model.image_size", model.image_size, f"must be a multiple of {smallest}"
    )
    _require_subset("model.multiview.feedback", model.multiview.feedback, MAPS)
    heads, hidden = encoder.num_attention_heads, encoder.hidden_size
    _require(
        heads > 0 and hidden % heads == 0,
        "model.image_encoder.num_attention_heads",
        heads,
        f"must divide hidden_size = {hidden}",
    )
    _require(
        encoder.patch_size <= encoder.image_size,
        "model.image_encoder.patch_size",
        encoder.patch_size,
        f"must be at most image_size = {encoder.image_size}",
    )


def _require_subset(key: str, values: list[str], known: Sequence[str]) -> None:
    want = f"must be a subset of {list(known)}, without repetition"
    _require(set(values) <= set(known) and len(set(values)) == len(values), key, values, want)


def _check_reconstructor(lgm: LGMConfig) -> None:
    """LGM: channels per group and head, and the sizes its levels pass on."""
    for side in ("down", "up"):
        widths, attention = getattr(lgm, f"{side}_channels"), getattr(lgm, f"{side}_attention")
        _require(len(widths) > 0, f"model.lgm.{side}_channels", widths, "wants at least one level")
        _require(
            len(attention) == len(widths),
            f"model.lgm.{side}_attention",
            attention,
            f"wants {len(widths)} entries, one a level",
        )
        attended = [w for w, a in zip(widths, attention, strict=True) if a]
        attended += [widths[-1]] if side == "down" and lgm.mid_attention else []
        _require(
            all(w > 0 and w % lgm.groups == 0 for w in widths) and all(w % lgm.heads == 0 for w in attended),
            f"model.lgm.{side}_channels",
            widths,
            f"wants multiples of groups = {lgm.groups}, and of heads = {lgm.heads} where there is attention",
        )
    _require(
        len(lgm.up_channels) <= len(lgm.down_channels),
        "model.lgm.up_channels",
        lgm.up_channels,
        f"wants at most as many levels as down_channels, {len(lgm.down_channels)}",
    )
    _require(
        lgm.time_channels % 2 == 0, "model.lgm.time_channels", lgm.time_channels, "must be even: sines and cosines"
    )
    halvings = 2 ** (len(lgm.down_channels) - 1)
    _require(
        lgm.input_size > 0 and lgm.input_size % halvings == 0,
        "model.lgm.input_size",
        lgm.input_size,
        f"must be a multiple of {halvings}",
    )


def _check_use(config: Config) -> None:
    """Cameras, sampling and training, among themselves and with the model."""
    cameras, sampler = config.cameras, config.sampler
    views, frames, wanted = cameras.num_views, cameras.orbit_frames, config.model.lgm.num_input_views
    _require(0 < views <= frames, "cameras.num_views", views, f"must lie in 1 .. cameras.orbit_frames = {frames}")
    want = f"the reconstructor reads model.lgm.num_input_views = {wanted}"
    _require(views >= wanted, "cameras.num_views", views, want)
    low, high = sampler.scheduler.sigma_min, sampler.scheduler.sigma_max
    _require(low < high, "sampler.scheduler.sigma_min", low, f"must be less than sigma_max = {high}")
    _require_subset("sampler.feedback", sampler.feedback, config.model.multiview.feedback)
    for name in ("feedback_sigma", "guidance_sigma"):
        interval = getattr(sampler, name)
        ok = interval is None or (len(interval) == 2 and interval[0] <= interval[1])
        _require(ok, f"sampler.{name}", interval, "wants [lowest, highest] noise level")
    want = f"must be less than scheduler.sigma_max = {high}: nothing would be sampled"
    _require(sampler.last_sigma < high, "sampler.last_sigma", sampler.last_sigma, want)
    factor = config.train.spike_factor
    _require(factor == 0 or factor > 1, "train.spike_factor", factor, "must be more than 1, or 0 for no watch")


def _check_objective(config: Config) -> None:
    """Switches of the objective that contradict each other, or that would train nothing."""
    objective = config.objective
    _require_subset("objective.freeze", objective.freeze, get_args(Part))
    trains_3d, frozen, trained = objective.reconstruction, objective.freeze, objective.trained
    trains_unet = any(part != "lgm" for part in trained)
    _require(
        objective.diffusion or trains_3d != "none",
        "objective.diffusion",
        False,
        "nothing would be trained: set objective.reconstruction too",
    )
    _require(
        objective.diffusion or trains_3d == "clean",
        "objective.reconstruction",
        trains_3d,
        "without objective.diffusion only clean views exist: must be clean",
    )
    _require(len(trained) > 0, "objective.freeze", frozen, "nothing would be trained: leave a part out")
    want = "wants predicted views and a part of the U-Net to train: objective.reconstruction=predicted or both"
    reaches_unet = trains_3d in ("predicted", "both") and trains_unet
    _require(reaches_unet or not objective.decode_gradient, "objective.decode_gradient", True, want)
    want = "with lgm in objective.freeze must be none, or predicted with objective.decode_gradient=true"
    useful = trains_3d == "none" or (trains_3d == "predicted" and objective.decode_gradient)
    _require(useful or "lgm" not in frozen, "objective.reconstruction", trains_3d, want)
    maps_train_lgm = objective.feedback_probability > 0 and not objective.detach_feedback
    _require(
        trains_unet or not objective.diffusion or trains_3d in ("predicted", "both") or maps_train_lgm,
        "objective.freeze",
        frozen,
        "all of the U-Net is frozen and no loss needs its views: set objective.diffusion=false",
    )

    levels = objective.sigma_levels
    _require(
        len(levels) <= config.sampler.steps and sum(levels) <= 1 + 1e-9,
        "objective.sigma_levels",
        levels,
        f"wants shares that add up to at most 1, for at most sampler.steps = {config.sampler.steps} levels",
    )
    known = config.model.multiview.feedback
    maps = known if objective.feedback is None else objective.feedback
    _require_subset("objective.feedback", maps, known)
    _require(
        objective.feedback != [] or objective.feedback_probability == 0,
        "objective.feedback_probability",
        objective.feedback_probability,
        "without feedback maps a second pass would repeat the first: must be 0",
    )
    _require(
        objective.feedback is None or set(config.sampler.feedback) <= set(maps),
        "sampler.feedback",
        config.sampler.feedback,
        f"training feeds back objective.feedback = {maps} alone: must be a subset of it",
    )

    views, frames = config.cameras.num_views, config.cameras.orbit_frames
    _require(
        views + objective.extra_views <= frames,
        "objective.extra_views",
        objective.extra_views,
        f"orbits have cameras.orbit_frames = {frames} views, of which num_views takes {views}",
    )
    for key, value in (
        ("objective.extra_views", objective.extra_views),
        ("objective.lpips_warmup_steps", objective.lpips_warmup_steps),
    ):
        _require(value == 0 or trains_3d != "none", key, value, "needs objective.reconstruction: nothing is rendered")
    _require(
        objective.lpips_warmup_steps == 0 or objective.lpips_weight > 0,
        "objective.lpips_warmup_steps",
        objective.lpips_warmup_steps,
        "objective.lpips_weight is 0: set it, or no warm-up",
    )
    _require(
        objective.position_weight == 0 or config.data.depth,
        "objective.position_weight",
        objective.position_weight,
        "needs depth: set data.depth=true",
    )
