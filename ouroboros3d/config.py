"""The typed configuration: every dimension and every switch, with the release's values as defaults.

A YAML file names what differs from these defaults. An unknown key, a wrong type or an impossible combination
raises `ConfigError` with the key's name, its value and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ouroboros3d.errors import UserError

MAPS = ("rgb", "ccm")  # the feedback maps there are


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


def _list(*values):
    return field(default_factory=lambda: list(values))


@dataclass
class UNetConfig:
    """diffusers' UNetSpatioTemporalConditionModel; the defaults are SVD's."""

    sample_size: int = 64
    in_channels: int = 8
    out_channels: int = 4
    down_block_types: list[str] = _list(*["CrossAttnDownBlockSpatioTemporal"] * 3, "DownBlockSpatioTemporal")
    up_block_types: list[str] = _list("UpBlockSpatioTemporal", *["CrossAttnUpBlockSpatioTemporal"] * 3)
    block_out_channels: list[int] = _list(320, 640, 1280, 1280)
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 768
    layers_per_block: int = 2
    cross_attention_dim: int = 1024
    transformer_layers_per_block: int = 1
    num_attention_heads: list[int] = _list(5, 10, 20, 20)
    num_frames: int = 14  # SVD's; only its own forward reads it


@dataclass
class AdapterConfig:
    """One feedback adapter; its widths are the U-Net's."""

    res_blocks: int = 3
    downscale: int = 8  # PixelUnshuffle factor: must equal the VAE's


@dataclass
class MultiViewConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    feedback: list[str] = _list("rgb", "ccm")  # adapters the network has, in the checkpoint's order
    ray_octaves: int = 6
    norm_groups: int = 32  # of the U-Net's GroupNorms; fewer where widths are small, see models/norms.py
    micro_conditions: list[float] = _list(6.0, 127.0)  # SVD's time ids: fps - 1 and motion bucket


@dataclass
class VAEConfig:
    """diffusers' AutoencoderKLTemporalDecoder; the defaults are SVD's."""

    block_out_channels: list[int] = _list(128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    scaling_factor: float = 0.18215
    norm_groups: int = 32  # fewer where widths are small, see models/norms.py
    sample_size: int = 768
    force_upcast: bool = True


@dataclass
class ImageEncoderConfig:
    """transformers' CLIPVisionModelWithProjection; the defaults are SVD's (ViT-H/14)."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5


@dataclass
class LGMConfig:
    """LGM's U-Net (Tang et al. 2024, "big") with Ouroboros3D's time embedding."""

    input_size: int = 256
    splat_size: int = 128  # Gaussians per view: splat_size^2
    positions: str = "absolute"  # absolute (LGM's) | ray: offsets from the rays' points nearest the origin
    initial_scale: float = 0.0693  # of untrained Gaussians; LGM's is 0.1 softplus(0)
    num_input_views: int = 4
    down_channels: list[int] = _list(64, 128, 256, 512, 1024, 1024)
    down_attention: list[bool] = _list(False, False, False, True, True, True)
    mid_attention: bool = True
    up_channels: list[int] = _list(1024, 1024, 512, 256, 128)
    up_attention: list[bool] = _list(True, True, True, False, False)
    layers_per_block: int = 2
    heads: int = 16
    groups: int = 32
    time_channels: int = 128
    time_embed_dim: int = 512


@dataclass
class ConventionsConfig:
    """The release's numerical quirks and their textbook variants (docs/faithfulness.md has a row for each)."""

    temporal_context: str = "release"  # release | textbook: quirk 2
    rays: str = "release"  # release | textbook: quirk 3
    coordinates_map: str = "release"  # release | textbook: quirk 7
    view_selection: str = "release"  # release | even: quirk 8
    condition_latent: str = "mode"  # mode | sample, at inference: quirk 13
    decode_chunk: int = 14  # frames decoded together over the flattened batch; 0 = per sample: quirk 14
    rotation: str = "release"  # release | textbook: quirk 17
    renderer: str = "release"  # release | gsplat | exact: the rasteriser's bounds and clamp
    time_id: str = "release"  # release (first sample's) | textbook (each sample's), in training: quirk 21
    clip_training_image: str = "noised"  # noised | clean: quirk 21


@dataclass
class PretrainedConfig:
    """Where the parts start from: a hub id or a folder, a file for LGM; null starts from random weights."""

    svd: str | None = None  # a diffusers SVD folder or hub id: unet (when training), vae, image_encoder
    lgm: str | None = None  # LGM weights, .safetensors; only time-embedding keys may be missing
    vae: str | None = None  # a file of weights for the configured VAE
    image_encoder: str | None = None  # a file of weights for the configured image encoder
    unet: str | None = None  # mv_model_unet alone
    checkpoint: str | None = None  # a folder with mv_model_unet and recon_model (and vae, image_encoder)


@dataclass
class ModelConfig:
    image_size: int = 512
    multiview: MultiViewConfig = field(default_factory=MultiViewConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    lgm: LGMConfig = field(default_factory=LGMConfig)
    conventions: ConventionsConfig = field(default_factory=ConventionsConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)


@dataclass
class SchedulerConfig:
    sigma_min: float = 0.002
    sigma_max: float = 700.0


@dataclass
class SamplerConfig:
    """The recursive loop (Alg. 1 of the paper)."""

    seed: int = 0  # of the noise, for inference
    steps: int = 25
    guidance: list[float] = _list(1.0, 3.0)  # of the first and the last view
    feedback: list[str] = _list("rgb", "ccm")  # maps fed back; the others are zero
    feedback_from: int = 0  # first step that receives feedback (the paper's schedule table)
    feedback_to: int | None = None  # first step that no longer does
    feedback_every: int = 1  # feed back after every n-th step only
    noise_augmentation: float = 0.02  # noise on the condition image before the VAE
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass
class CamerasConfig:
    """The orbit of the generated views."""

    num_views: int = 8
    orbit_frames: int = 16
    elevation: float = 0.0  # degrees, of the input view above the object's equator
    distance: float = 1.7417
    fov: float = 39.598  # degrees


@dataclass
class TurntableConfig:
    """The video of the result: one turn around the object at the height of its equator."""

    size: int = 512  # pixels, whatever the size the networks work at
    step: float = 2.0  # degrees a frame
    radius: float = 1.5
    fov: float = 49.1  # degrees
    fps: int = 30


@dataclass
class DataConfig:
    root: str = "data/orbits"
    train: str = "train.txt"
    val: str = "val.txt"
    background: str = "white"  # white | black | grey
    mirror: bool = False
    color_jitter: float = 0.0
    cache: str = "none"  # none | memory: decoded views at image_size
    workers: int = 4
    depth: bool = False  # read depth.npz (for objective.position_weight)


@dataclass
class ObjectiveConfig:
    """The joint objective (Sec. 3.4; METHOD section 5). Defaults are the release's."""

    diffusion: bool = True  # train the multi-view U-Net
    reconstruction: str = "both"  # none | clean | predicted | both: which views the reconstructor is trained on
    sigma_mean: float = 1.0  # ln sigma ~ N(mean, std^2)
    sigma_std: float = 1.6
    condition_sigma_mean: float = -3.0
    condition_sigma_std: float = 0.5
    dropout: float = 0.1
    feedback_probability: float = 0.5
    second_loss: str = "replace"  # replace | add: what the loss of the second pass does to the first's
    detach_feedback: bool = False  # the paper detaches the maps
    decode_gradient: bool = False  # the paper lets reconstruction reach the U-Net through the decoder
    image_loss: str = "l1"  # l1 | mse
    lpips_weight: float = 1.0
    alpha_weight: float = 0.0  # MSE of the rendered alpha, an extra of ours (LGM has it)
    position_weight: float = 0.0  # L1 of the Gaussians' positions to unprojected depth, an extra of ours


@dataclass
class TrainConfig:
    output_dir: str = "runs/train"
    seed: int = 0
    steps: int = 40000
    batch_size: int = 4  # per process
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | cosine
    weight_decay: float = 0.01
    betas: list[float] = _list(0.9, 0.999)
    clip_norm: float = 1.0
    mixed_precision: str = "fp32"  # fp32 | fp16 | bf16
    gradient_checkpointing: bool = False
    ema_decay: float = 0.0  # 0 keeps none
    resume: str = "auto"  # auto | never | a checkpoint folder
    save_every: int = 1000
    keep: int = 2
    validate_every: int = 1000
    validate_objects: int = 4
    log_every: int = 20
    tracker: str = "tensorboard"  # tensorboard | wandb | none
    time_budget: str = ""  # e.g. "90m": save and stop after this long; empty is unlimited


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    cameras: CamerasConfig = field(default_factory=CamerasConfig)
    turntable: TurntableConfig = field(default_factory=TurntableConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


CHOICES = {
    "model.conventions.temporal_context": ("release", "textbook"),
    "model.conventions.rays": ("release", "textbook"),
    "model.conventions.coordinates_map": ("release", "textbook"),
    "model.conventions.view_selection": ("release", "even"),
    "model.conventions.condition_latent": ("mode", "sample"),
    "model.conventions.rotation": ("release", "textbook"),
    "model.conventions.renderer": ("release", "gsplat", "exact"),
    "model.conventions.time_id": ("release", "textbook"),
    "model.conventions.clip_training_image": ("noised", "clean"),
    "model.lgm.positions": ("absolute", "ray"),
    "model.image_encoder.hidden_act": ("gelu", "quick_gelu"),
    "data.background": ("white", "black", "grey"),
    "data.cache": ("none", "memory"),
    "objective.reconstruction": ("none", "clean", "predicted", "both"),
    "objective.second_loss": ("replace", "add"),
    "objective.image_loss": ("l1", "mse"),
    "train.schedule": ("constant", "cosine"),
    "train.mixed_precision": ("fp32", "fp16", "bf16"),
    "train.tracker": ("tensorboard", "wandb", "none"),
}


_INF = math.inf
# Inclusive bounds of numbers. Whatever is not listed here or checked below may take any finite value.
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            *("model.image_size", "model.multiview.unet.layers_per_block", "model.multiview.adapter.res_blocks"),
            *("model.multiview.norm_groups", "model.vae.norm_groups", "model.vae.layers_per_block"),
            *("model.image_encoder.patch_size", "model.lgm.num_input_views", "model.lgm.layers_per_block"),
            *("model.lgm.heads", "model.lgm.groups", "sampler.steps", "sampler.feedback_every", "turntable.fps"),
            *("train.steps", "train.batch_size", "train.gradient_accumulation", "train.save_every", "train.keep"),
            *("train.log_every", "train.validate_every", "train.validate_objects"),
        ),
        (1, _INF),
    ),
    **dict.fromkeys(
        (
            *("model.multiview.ray_octaves", "model.conventions.decode_chunk", "sampler.feedback_from"),
            *("sampler.feedback_to", "sampler.noise_augmentation", "data.workers", "objective.sigma_std"),
            *("objective.condition_sigma_std", "objective.lpips_weight", "objective.alpha_weight"),
            *("objective.position_weight", "train.warmup_steps", "train.weight_decay"),
        ),
        (0, _INF),
    ),
    "sampler.seed": (0, 2**63 - 1),
    "train.seed": (0, 2**63 - 1),
    "turntable.size": (2, _INF),
    "data.color_jitter": (0, 1),
    "objective.dropout": (0, 1 / 3),
    "objective.feedback_probability": (0, 1),
}
POSITIVE = (
    *("model.vae.scaling_factor", "sampler.scheduler.sigma_min", "cameras.distance", "turntable.radius"),
    *("turntable.step", "train.learning_rate", "train.clip_norm", "model.lgm.initial_scale"),
)


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides; checked. A file may name another as `base:`,
    relative to itself. Raises ConfigError."""
    config = OmegaConf.structured(Config)
    for source, layer in [*_layers(path), *((text, _parse_override(text)) for text in overrides)]:
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_explain(error)}") from error
    try:
        config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{path}: {_explain(error)}") from error
    check_config(config)
    return config


def config_from_dict(values: dict[str, Any]) -> Config:
    """A checked Config from nested dictionaries. Raises ConfigError."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    check_config(config)
    return config


def as_kwargs(config: Any) -> dict[str, Any]:
    """A config dataclass as plain keyword arguments."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def save_config(config: Config, path: str | Path) -> None:
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check_config(config: Config) -> None:
    """Refuses values that cannot work, alone or together, each with the key, the value and what would be right."""
    _check_values(config)
    _check_diffusion_networks(config.model)
    _check_reconstructor(config.model.lgm)
    _check_use(config)


def _require(ok: bool, key: str, value: Any, want: str) -> None:
    if not ok:
        raise ConfigError(f"{key} = {value!r}: {want}")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) of a config; each element of a list with the list's key."""
    for field_ in fields(node):
        key, value = f"{prefix}{field_.name}", getattr(node, field_.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        else:
            yield from ((key, v) for v in (value if isinstance(value, list) else [value]))


def _check_values(config: Config) -> None:
    """Each value by itself."""
    for key, value in _leaves(config):
        if isinstance(value, float):
            _require(math.isfinite(value), key, value, "must be a finite number")
        if key in CHOICES:
            _require(value in CHOICES[key], key, value, f"must be one of {', '.join(CHOICES[key])}")
        if key in POSITIVE:
            _require(value > 0, key, value, "must be positive")
        if key in BOUNDS and value is not None:
            low, high = BOUNDS[key]
            want = f"must be at least {low}" if high == _INF else f"must lie in {low} .. {high:.4g}"
            _require(low <= value <= high, key, value, want)


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
        unet.in_channels == 2 * vae.latent_channels and unet.out_channels == vae.latent_channels,
        "model.multiview.unet.in_channels, out_channels",
        (unet.in_channels, unet.out_channels),
        f"must be twice and once model.vae.latent_channels = {vae.latent_channels}",
    )
    _require(
        unet.cross_attention_dim == encoder.projection_dim,
        "model.multiview.unet.cross_attention_dim",
        unet.cross_attention_dim,
        f"must equal model.image_encoder.projection_dim = {encoder.projection_dim}",
    )
    _require(
        unet.projection_class_embeddings_input_dim == 3 * unet.addition_time_embed_dim,
        "model.multiview.unet.projection_class_embeddings_input_dim",
        unet.projection_class_embeddings_input_dim,
        f"must be 3 * addition_time_embed_dim = {3 * unet.addition_time_embed_dim}",
    )
    _require(
        unet.addition_time_embed_dim % 2 == 0,
        "model.multiview.unet.addition_time_embed_dim",
        unet.addition_time_embed_dim,
        "must be even: sines and cosines",
    )
    _require(
        len(model.multiview.micro_conditions) == 2,
        "model.multiview.micro_conditions",
        model.multiview.micro_conditions,
        "wants two numbers, fps - 1 and the motion bucket",
    )
    factor = 2 ** (len(vae.block_out_channels) - 1)
    _require(
        model.multiview.adapter.downscale == factor,
        "model.multiview.adapter.downscale",
        model.multiview.adapter.downscale,
        f"must equal the VAE's downscale, {factor}",
    )
    smallest = factor * 2 ** (levels - 1)
    _require(
        model.image_size % smallest == 0, "model.image_size", model.image_size, f"must be a multiple of {smallest}"
    )
    _require_maps("model.multiview.feedback", model.multiview.feedback, MAPS)
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


def _require_maps(key: str, maps: list[str], known: Sequence[str]) -> None:
    want = f"must be a subset of {list(known)}, without repetition"
    _require(set(maps) <= set(known) and len(set(maps)) == len(maps), key, maps, want)


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
    splat = lgm.input_size // halvings * 2 ** (len(lgm.up_channels) - 1)
    _require(lgm.splat_size == splat, "model.lgm.splat_size", lgm.splat_size, f"the levels and input_size give {splat}")


def _check_use(config: Config) -> None:
    """Cameras, sampling and training, among themselves and with the model."""
    cameras, sampler, turntable, objective = config.cameras, config.sampler, config.turntable, config.objective
    views, frames, wanted = cameras.num_views, cameras.orbit_frames, config.model.lgm.num_input_views
    _require(0 < views <= frames, "cameras.num_views", views, f"must lie in 1 .. cameras.orbit_frames = {frames}")
    want = f"the reconstructor reads model.lgm.num_input_views = {wanted}"
    _require(views >= wanted, "cameras.num_views", views, want)
    for key, fov in (("cameras.fov", cameras.fov), ("turntable.fov", turntable.fov)):
        _require(0 < fov < 180, key, fov, "must lie between 0 and 180 degrees")
    _require(
        abs(cameras.elevation) < 90,
        "cameras.elevation",
        cameras.elevation,
        "must lie strictly between -90 and 90 degrees",
    )
    _require(turntable.step <= 360, "turntable.step", turntable.step, "must lie in (0, 360] degrees")
    _require(len(sampler.guidance) == 2, "sampler.guidance", sampler.guidance, "wants [first view, last view]")
    low, high = sampler.scheduler.sigma_min, sampler.scheduler.sigma_max
    _require(low < high, "sampler.scheduler.sigma_min", low, f"must be less than sigma_max = {high}")
    _require_maps("sampler.feedback", sampler.feedback, config.model.multiview.feedback)
    trains_3d = objective.reconstruction
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
    _require(
        objective.position_weight == 0 or config.data.depth,
        "objective.position_weight",
        objective.position_weight,
        "needs depth: set data.depth=true",
    )
    betas = config.train.betas
    _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "train.betas", betas, "wants two numbers in [0, 1)")
    _require(0 <= config.train.ema_decay < 1, "train.ema_decay", config.train.ema_decay, "must lie in [0, 1)")


def _layers(path: str | Path | None) -> list[tuple[Path, DictConfig]]:
    """The YAML files to merge and what they hold, base first."""
    layers: list[tuple[Path, DictConfig]] = []
    while path is not None:
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file")
        try:
            layer = OmegaConf.load(path)
        except Exception as error:  # yaml's own errors have no common useful base
            raise ConfigError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from error
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{path}: not a YAML mapping of keys to values")
        base = layer.pop("base", None)
        layers.insert(0, (path, layer))
        if len(layers) > 8:
            raise ConfigError(f"{path}: more than 8 files deep in `base:`, probably a circle")
        path = path.parent / base if base is not None else None
    return layers


def _parse_override(text: str) -> DictConfig:
    """`key=value`, the value in YAML."""
    if "=" not in text:
        raise ConfigError(f"override {text!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # yaml's own errors have no common useful base
        raise ConfigError(f"{text}: not of the form key=value: {' '.join(str(error).split())}") from error


def _explain(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    return (f"config key {key}: " if key else "") + str(error).splitlines()[0]
