"""Checks of a configuration beyond its types: bounds, and dimensions that fit each other.

Every failure is a ConfigError with the key, its value and what would be valid.
"""

from __future__ import annotations

import functools
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
    must = _Checker(config)
    _check_diffusion_networks(must, config.model)
    _check_reconstructor(must, config.model.lgm)
    _check_use(must, config)
    _check_objective(must, config)


class _Checker:
    """`must(ok, key, want)` refuses the value that a config has at the dotted `key`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, ok: bool, key: str, want: str) -> None:
        if not ok:
            raise _refusal(key, self.value(key), want)

    def value(self, key: str) -> Any:
        return functools.reduce(getattr, key.split("."), self.config)

    def be_subset(self, key: str, known: Sequence[str]) -> None:
        values = self.value(key) or []
        ok = set(values) <= set(known) and len(set(values)) == len(values)
        self(ok, key, f"must be a subset of {list(known)}, without repetition")


def _refusal(key: str, value: Any, want: str) -> ConfigError:
    return ConfigError(f"{key} = {value!r}: {want}")


def _check_values(node: Any, prefix: str = "") -> None:
    """Each value by itself, against the bounds of its field."""
    for field_ in fields(node):
        key, value = f"{prefix}{field_.name}", getattr(node, field_.name)
        if is_dataclass(value):
            _check_values(value, f"{key}.")
            continue
        bounds = dict(field_.metadata)
        length = bounds.pop("length", None)
        if length is not None and len(value) != length:
            raise _refusal(key, value, f"wants {length} numbers")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise _refusal(key, number, "must be a finite number")
            if number is not None and not all(BOUNDS[name][0](number, bound) for name, bound in bounds.items()):
                want = " and ".join(f"{BOUNDS[name][1]} {bound:g}" for name, bound in bounds.items())
                raise _refusal(key, number, f"must be {want}")


def _check_diffusion_networks(must: _Checker, model: ModelConfig) -> None:
    """U-Net, adapters, VAE and image encoder: what their layers and each other's shapes allow."""
    unet, vae, encoder, here = model.multiview.unet, model.vae, model.image_encoder, "model.multiview.unet"
    widths, heads = unet.block_out_channels, unet.num_attention_heads
    for name in ("down_block_types", "up_block_types", "num_attention_heads"):
        must(len(getattr(unet, name)) == len(widths), f"{here}.{name}", f"wants {len(widths)} entries, one a level")
    for direction, names in (("Down", unet.down_block_types), ("Up", unet.up_block_types)):
        known = [f"{kind}{direction}BlockSpatioTemporal" for kind in ("", "CrossAttn")]
        must(set(names) <= set(known), f"{here}.{direction.lower()}_block_types", f"must be of {', '.join(known)}")
    for part, groups in ((here, model.multiview.norm_groups), ("model.vae", vae.norm_groups)):
        key = f"{part}.block_out_channels"
        own = must.value(key)
        must(len(own) > 0 and all(w > 0 and w % 32 == 0 for w in own), key, "wants multiples of 32")
        must(all(w % min(groups, 32) == 0 for w in own), key, f"wants multiples of {groups} norm_groups")
    divides = all(w % h == 0 for w, h in zip(widths, heads, strict=True))
    must(divides, f"{here}.num_attention_heads", f"must divide block_out_channels = {widths}")
    even = unet.addition_time_embed_dim % 2 == 0
    must(even, f"{here}.addition_time_embed_dim", "must be even: sines and cosines")
    smallest = vae.downscale * 2 ** (len(widths) - 1)
    must(model.image_size % smallest == 0, "model.image_size", f"must be a multiple of {smallest}")
    must.be_subset("model.multiview.feedback", MAPS)
    heads, hidden = encoder.num_attention_heads, encoder.hidden_size
    divides = heads > 0 and hidden % heads == 0
    must(divides, "model.image_encoder.num_attention_heads", f"must divide hidden_size = {hidden}")
    fits = encoder.patch_size <= encoder.image_size
    must(fits, "model.image_encoder.patch_size", f"must be at most image_size = {encoder.image_size}")


def _check_reconstructor(must: _Checker, lgm: LGMConfig) -> None:
    """LGM: channels per group and head, and the sizes its levels pass on."""
    for side in ("down", "up"):
        key, widths = f"model.lgm.{side}_channels", getattr(lgm, f"{side}_channels")
        attention = getattr(lgm, f"{side}_attention")
        must(len(widths) > 0, key, "wants at least one level")
        per_level = len(attention) == len(widths)
        must(per_level, f"model.lgm.{side}_attention", f"wants {len(widths)} entries, one a level")
        attended = [w for w, a in zip(widths, attention, strict=True) if a]
        attended += [widths[-1]] if side == "down" and lgm.mid_attention else []
        ok = all(w > 0 and w % lgm.groups == 0 for w in widths) and all(w % lgm.heads == 0 for w in attended)
        want = f"wants multiples of groups = {lgm.groups}, and of heads = {lgm.heads} where there is attention"
        must(ok, key, want)
    down, up = len(lgm.down_channels), len(lgm.up_channels)
    must(up <= down, "model.lgm.up_channels", f"wants at most as many levels as down_channels, {down}")
    must(lgm.time_channels % 2 == 0, "model.lgm.time_channels", "must be even: sines and cosines")
    halvings = 2 ** (down - 1)
    ok = lgm.input_size > 0 and lgm.input_size % halvings == 0
    must(ok, "model.lgm.input_size", f"must be a multiple of {halvings}")


def _check_use(must: _Checker, config: Config) -> None:
    """Cameras, sampling and training, among themselves and with the model."""
    views, frames, wanted = config.cameras.num_views, config.cameras.orbit_frames, config.model.lgm.num_input_views
    must(0 < views <= frames, "cameras.num_views", f"must lie in 1 .. cameras.orbit_frames = {frames}")
    want = f"the reconstructor reads model.lgm.num_input_views = {wanted}"
    must(views >= wanted, "cameras.num_views", want)
    low, high = config.sampler.scheduler.sigma_min, config.sampler.scheduler.sigma_max
    must(low < high, "sampler.scheduler.sigma_min", f"must be less than sigma_max = {high}")
    for name in ("feedback_sigma", "guidance_sigma"):
        interval = getattr(config.sampler, name)
        ok = interval is None or (len(interval) == 2 and interval[0] <= interval[1])
        must(ok, f"sampler.{name}", "wants [lowest, highest] noise level")
    fed, taken = config.sampler.feedback != [], config.sampler.taken_steps
    first, end = max(config.sampler.feedback_from, 1), config.sampler.feedback_to  # step 0 has nothing before it
    want = f"nothing would be fed back in {taken} steps: must be less, or set sampler.feedback=[]"
    must(not fed or first < max(taken, 2), "sampler.feedback_from", want)
    want = f"nothing would be fed back from step {first} on: must be more, or set sampler.feedback=[]"
    must(not fed or end is None or end > first, "sampler.feedback_to", want)
    want = f"must be less than scheduler.sigma_max = {high}: nothing would be sampled"
    must(config.sampler.last_sigma < high, "sampler.last_sigma", want)
    must.be_subset("sampler.feedback", config.model.multiview.feedback)
    want = "must be false with sampler.compile: CUDA graphs read weights where they were recorded"
    must(not (config.sampler.offload and config.sampler.compile), "sampler.offload", want)
    factor = config.train.spike_factor
    must(factor == 0 or factor > 1, "train.spike_factor", "must be more than 1, or 0 for no watch")


def _check_objective(must: _Checker, config: Config) -> None:
    """Switches of the objective that contradict each other, or that would train nothing."""
    o, sampler, frames = config.objective, config.sampler, config.cameras.orbit_frames
    must.be_subset("objective.freeze", get_args(Part))
    renders, trains_unet = o.reconstruction != "none", any(part != "lgm" for part in o.trained)
    nothing = "nothing would be trained"
    must(o.diffusion or renders, "objective.diffusion", f"{nothing}: set objective.reconstruction too")
    want = "without objective.diffusion only clean views exist: must be clean"
    must(o.diffusion or o.reconstruction == "clean", "objective.reconstruction", want)
    must(len(o.trained) > 0, "objective.freeze", f"{nothing}: leave a part out")
    predicts = o.reconstruction in ("predicted", "both")
    want = "wants predicted views and a part of the U-Net to train: objective.reconstruction=predicted or both"
    must((predicts and trains_unet) or not o.decode_gradient, "objective.decode_gradient", want)
    want = "with lgm in objective.freeze must be none, or predicted with objective.decode_gradient=true"
    useful = not renders or (o.reconstruction == "predicted" and o.decode_gradient)
    must(useful or "lgm" not in o.freeze, "objective.reconstruction", want)
    needs_views = predicts or (o.feedback_probability > 0 and not o.detach_feedback)
    want = "all of the U-Net is frozen and no loss needs its views: set objective.diffusion=false"
    must(trains_unet or not o.diffusion or needs_views, "objective.freeze", want)

    # That there are no more of them than sampling steps is checked in training: sampling may take fewer steps.
    must(sum(o.sigma_levels) <= 1 + 1e-9, "objective.sigma_levels", "wants shares that add up to at most 1")
    must.be_subset("objective.feedback", config.model.multiview.feedback)
    want = "without feedback maps a second pass would repeat the first: must be 0"
    must(o.feedback != [] or o.feedback_probability == 0, "objective.feedback_probability", want)
    want = f"training feeds back objective.feedback = {o.feedback} alone: must be a subset of it"
    must(o.feedback is None or set(sampler.feedback) <= set(o.feedback), "sampler.feedback", want)

    views = config.cameras.num_views
    want = f"orbits have cameras.orbit_frames = {frames} views, of which num_views takes {views}"
    must(views + o.extra_views <= frames, "objective.extra_views", want)
    for key in ("objective.extra_views", "objective.lpips_warmup_steps"):
        must(must.value(key) == 0 or renders, key, "needs objective.reconstruction: nothing is rendered")
    want = "objective.lpips_weight is 0: set it, or no warm-up"
    must(o.lpips_warmup_steps == 0 or o.lpips_weight > 0, "objective.lpips_warmup_steps", want)
    must(o.position_weight == 0 or config.data.depth, "objective.position_weight", "needs depth: set data.depth=true")
