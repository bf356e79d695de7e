"""The typed configuration: every dimension and every switch, with the release's values as defaults.

A YAML file lists what differs from these defaults. An unknown key, a wrong type, a value out of its bounds (`_number`)
or an impossible combination (checks.py) raises `ConfigError` with the key, its value and what would be valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ouroboros3d.camera_defaults import DISTANCE, FOV, TURNTABLE_DISTANCE, TURNTABLE_FOV

# Background colours, rgb in [0, 1]. "random" draws one per training example; elsewhere it is white.
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "grey": (0.5, 0.5, 0.5), "random": (1.0, 1.0, 1.0)}

ATTENTION_ROWS = 65_535  # that CUDA's attention kernels take at once, their grid's limit
MAPS = ["rgb", "ccm"]  # names of the feedback maps; feedback.py makes them
Part = Literal["unet", "adapters", "rays", "lgm"]  # what can be frozen by itself
Quirk = Literal["release", "textbook"]


def _number(default: Any, **bounds: float) -> Any:
    """A number with bounds: `ge`, `gt`, `le`, `lt`. None, where the type allows it, has none."""
    return field(default=default, metadata=bounds)


def _list(*values: Any, **bounds: float) -> Any:
    """A list with bounds on each element; `length` fixes how many there are."""
    return field(default_factory=lambda: list(values), metadata=bounds)


@dataclass
class UNetConfig:
    """diffusers' UNetSpatioTemporalConditionModel; the defaults are SVD's. What its dimensions share with the VAE and
    the image encoder is theirs (models/multiview_unet.py)."""

    sample_size: int = 64
    down_block_types: list[str] = _list(*["CrossAttnDownBlockSpatioTemporal"] * 3, "DownBlockSpatioTemporal")
    up_block_types: list[str] = _list("UpBlockSpatioTemporal", *["CrossAttnUpBlockSpatioTemporal"] * 3)
    block_out_channels: list[int] = _list(320, 640, 1280, 1280)
    addition_time_embed_dim: int = 256
    layers_per_block: int = _number(2, ge=1)
    transformer_layers_per_block: int = 1
    num_attention_heads: list[int] = _list(5, 10, 20, 20)
    num_frames: int = 14  # SVD's; only its own forward reads it


@dataclass
class AdapterConfig:
    """One feedback adapter; its widths are the U-Net's, its downscale the VAE's."""

    res_blocks: int = _number(3, ge=1)


@dataclass
class MultiViewConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    feedback: list[str] = _list("rgb", "ccm")  # adapters the network has, in the checkpoint's order
    ray_octaves: int = _number(6, ge=0)
    norm_groups: int = _number(32, ge=1)  # of the U-Net's GroupNorms; fewer where widths are small, see models/norms.py
    micro_conditions: list[float] = _list(6.0, 127.0, length=2)  # SVD's time ids: fps - 1 and motion bucket


@dataclass
class VAEConfig:
    """diffusers' AutoencoderKLTemporalDecoder; the defaults are SVD's."""

    block_out_channels: list[int] = _list(128, 256, 512, 512)
    layers_per_block: int = _number(2, ge=1)
    latent_channels: int = 4
    scaling_factor: float = _number(0.18215, gt=0)
    norm_groups: int = _number(32, ge=1)  # fewer where widths are small, see models/norms.py
    sample_size: int = 768
    force_upcast: bool = True

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass
class TinyDecoderConfig:
    """diffusers' AutoencoderTiny, to be trained; one that is loaded brings its own dimensions. Defaults are TAESD's."""

    channels: int = 64
    blocks: list[int] = _list(3, 3, 3, 1)  # per level, from the latents up; one level more than the VAE halves


@dataclass
class ImageEncoderConfig:
    """transformers' CLIPVisionModelWithProjection; the defaults are SVD's (ViT-H/14)."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = _number(14, ge=1)
    projection_dim: int = 1024
    hidden_act: Literal["gelu", "quick_gelu"] = "gelu"
    layer_norm_eps: float = 1e-5


@dataclass
class LGMConfig:
    """LGM's U-Net (Tang et al. 2024, "big") with Ouroboros3D's time embedding."""

    input_size: int = 256
    positions: Literal["absolute", "ray"] = "absolute"  # ray: offsets from the rays' points nearest the origin
    initial_scale: float = _number(0.0693, gt=0)  # of untrained Gaussians; LGM's is 0.1 softplus(0)
    smallest_scale: float = _number(0.0, ge=0)  # scales become sqrt(s^2 + this^2): no gaps between Gaussians close by
    # absolute: LGM's. chroma: brightness is the network's, hue and saturation are the input pixel's. residual: what the
    # network adds to the input pixel.
    colours: Literal["absolute", "chroma", "residual"] = "absolute"
    num_input_views: int = _number(4, ge=1)
    down_channels: list[int] = _list(64, 128, 256, 512, 1024, 1024)
    down_attention: list[bool] = _list(False, False, False, True, True, True)
    mid_attention: bool = True
    up_channels: list[int] = _list(1024, 1024, 512, 256, 128)
    up_attention: list[bool] = _list(True, True, True, False, False)
    layers_per_block: int = _number(2, ge=1)
    heads: int = _number(16, ge=1)
    groups: int = _number(32, ge=1)
    time_channels: int = 128
    time_embed_dim: int = 512
    noise_level: bool = True  # false: always told c_noise 0, plain LGM (for networks that were not trained jointly)
    lowest_noise_level: float | None = None  # bound of the c_noise it is told; null (the release): none

    @property
    def splat_size(self) -> int:
        """Gaussians per view: splat_size^2. What the levels leave of `input_size`."""
        return self.input_size // 2 ** (len(self.down_channels) - 1) * 2 ** (len(self.up_channels) - 1)


@dataclass
class ConventionsConfig:
    """The release's numerical quirks and their textbook variants (docs/faithfulness.md has a row for each)."""

    temporal_context: Quirk = "release"  # quirk 2
    rays: Quirk = "release"  # quirk 3
    coordinates_map: Quirk = "release"  # quirk 7
    view_selection: Literal["release", "even"] = "release"  # quirk 8
    input_view: Literal["predicted", "given"] = "predicted"  # what the reconstructor sees at the input's own camera
    condition_latent: Literal["mode", "sample"] = "mode"  # at inference: quirk 13
    decode_chunk: int = _number(14, ge=0)  # frames decoded together over the flattened batch; 0 = per sample: quirk 14
    rotation: Quirk = "release"  # quirk 17
    renderer: Literal["release", "gsplat", "exact"] = "release"  # the rasteriser's bounds and clamp
    time_id: Quirk = "release"  # the first sample's | each sample's, in training: quirk 21
    clip_training_image: Literal["noised", "clean"] = "noised"  # quirk 21

    @property
    def mix_samples(self) -> bool:
        """Whether sampling lets the samples of a batch influence each other."""
        return self.temporal_context == "release" or self.decode_chunk > 0


@dataclass
class PretrainedConfig:
    """Where the parts start from: a hub id or a folder, a file for LGM; null starts from random weights."""

    svd: str | None = None  # a diffusers SVD folder or hub id: unet (when training), vae, image_encoder
    variant: str | None = None  # of SVD's files, e.g. fp16; null takes the full ones, or fp16 where only those exist
    lgm: str | None = None  # LGM weights, .safetensors; only time-embedding keys may be missing
    vae: str | None = None  # a file of weights for the configured VAE
    image_encoder: str | None = None  # a file of weights for the configured image encoder
    unet: str | None = None  # mv_model_unet alone
    tiny_decoder: str | None = None  # an AutoencoderTiny, folder or hub id, for sampler.loop_decoder=tiny
    # A folder with mv_model_unet and recon_model (and vae, image_encoder). What it has counts before the files above.
    checkpoint: str | None = None


@dataclass
class ModelConfig:
    image_size: int = _number(512, ge=1)
    multiview: MultiViewConfig = field(default_factory=MultiViewConfig)
    # With model.pretrained.svd the VAE and the image encoder have the dimensions of its own config.json files.
    vae: VAEConfig = field(default_factory=VAEConfig)
    tiny_decoder: TinyDecoderConfig = field(default_factory=TinyDecoderConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    lgm: LGMConfig = field(default_factory=LGMConfig)
    conventions: ConventionsConfig = field(default_factory=ConventionsConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)

    def batch_size(self, samples: int) -> int:
        """How many of so many samples run together: one where the conventions would mix them, else as many as CUDA's
        attention takes rows: over the views a guided sample has two per latent pixel."""
        if self.conventions.mix_samples:
            return 1
        rows = 2 * (self.image_size // self.vae.downscale) ** 2
        return max(1, min(samples, ATTENTION_ROWS // rows))


@dataclass
class SchedulerConfig:
    sigma_min: float = _number(0.002, gt=0)
    sigma_max: float = 700.0
    spacing: Literal["karras", "exponential"] = "karras"  # exponential: even steps of ln sigma, so more low levels


@dataclass
class SamplerConfig:
    """The recursive loop (Alg. 1 of the paper). A preset sets some of these keys below what the YAML file sets itself:
    configs/presets/, docs/performance.md."""

    preset: Literal["exact", "fast", "draft"] = "exact"
    seed: int = _number(0, ge=0, lt=2**63)  # of the noise, for inference
    steps: int = _number(25, ge=1)
    step_share: float = _number(1.0, gt=0, le=1)  # of `steps` that are taken: 0.8 samples in 20 instead of 25
    guidance: list[float] = _list(1.0, 3.0, length=2)  # of the first and the last view
    feedback: list[str] = _list("rgb", "ccm")  # maps fed back; the others are zero
    feedback_from: int = _number(0, ge=0)  # first step that receives feedback (the paper's schedule table)
    feedback_to: int | None = _number(None, ge=0)  # first step that no longer does
    feedback_every: int = _number(1, ge=1)  # from the first on, only every n-th step receives feedback
    # whose maps are fed back: the object's own; as controls, the next object's of the batch or those of the true views
    feedback_of: Literal["own", "another", "truth"] = "own"
    feedback_sigma: list[float] | None = _number(None, ge=0)  # [low, high] noise levels that receive it; null: all
    guidance_sigma: list[float] | None = _number(None, ge=0)  # [low, high] noise levels that are guided; null: all
    last_sigma: float = _number(0.0, ge=0)  # the loop ends with the first step at or below it
    loop_decoder: Literal["full", "half", "tiny"] = "full"  # of views inside the loop; half: the resolution
    dtype: Literal["auto", "half", "float32", "bf16", "fp16"] = "auto"  # see devices.inference_dtype
    compile: bool = False  # torch.compile of U-Net and decoder, by CUDA graphs on CUDA
    noise_augmentation: float = _number(0.02, ge=0)  # noise on the condition image before the VAE
    offload: bool = False  # networks wait in the CPU's memory and move to the GPU while they work: for 8 GB cards
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    @property
    def taken_steps(self) -> int:
        """Noise levels of the schedule, at most: `last_sigma` may end the loop before."""
        return max(round(self.step_share * self.steps), 1)


@dataclass
class CamerasConfig:
    """The orbit of the generated views."""

    num_views: int = 8
    orbit_frames: int = 16  # views of a rendered orbit, evenly around; num_views of them are generated
    elevation: float = _number(0.0, gt=-90, lt=90)  # degrees, of the input view above the object's equator
    trained_elevations: list[float] = _list(-5.0, 30.0, length=2, gt=-90, lt=90)  # lowest, highest in training
    distance: float = _number(DISTANCE, gt=0)
    fov: float = _number(FOV, gt=0, lt=180)  # degrees


@dataclass
class TurntableConfig:
    """The video of the result: one turn around the object at the height of its equator."""

    size: int = _number(512, ge=2)  # pixels, whatever the size the networks work at
    step: float = _number(2.0, gt=0, le=360)  # degrees a frame
    radius: float = _number(TURNTABLE_DISTANCE, gt=0)  # of the camera from the origin
    fov: float = _number(TURNTABLE_FOV, gt=0, lt=180)  # degrees
    fps: int = _number(30, ge=1)


@dataclass
class DataConfig:
    # a folder of orbits, or of the shards that scripts/make_shards.py makes of one; or their address or pattern
    root: str = "data/orbits"
    train: str = "train.txt"  # list of ids, relative to root
    val: str = "val.txt"  # the same; no object of train
    background: Literal["white", "black", "grey", "random"] = "white"  # random: one per training example
    mirror: bool = False  # in training, mirror half of the orbits left to right
    # hue turns by up to this share of 180 degrees, brightness changes by up to 2^this
    color_jitter: float = _number(0.0, ge=0, le=1)
    cache: Literal["none", "memory", "disk"] = "none"  # where decoded views at image_size are kept
    cache_dir: str | None = None  # of cache=disk (null: <root>/.cache) and of remote data (null: ~/.cache/ouroboros3d)
    max_damaged: float = _number(0.01, ge=0, le=0.5)  # share of the training list that neighbours may replace
    workers: int = _number(4, ge=0)  # processes that load data, per training process
    depth: bool = False  # read depth.npz (for objective.position_weight)


@dataclass
class ObjectiveConfig:
    """The joint objective (Sec. 3.4). Defaults are the release's; where the paper differs the comment says so, and
    docs/training.md has the table. Modes of training:

    joint       the defaults: one optimiser over both networks
    separate    first the U-Net alone: reconstruction=none feedback_probability=0; then LGM alone: diffusion=false
                reconstruction=clean
    frozen      some parts of a joint run: freeze=[...]. reconstruction=none with feedback_probability > 0 trains the
                U-Net on maps of an LGM that stays as it is
    """

    diffusion: bool = True  # the diffusion loss; false: the U-Net is neither run nor trained
    reconstruction: Literal["none", "clean", "predicted", "both"] = "both"  # of which views; none: LGM is not trained
    freeze: list[Part] = _list()  # of unet (SVD's own weights), adapters, rays, lgm: kept as they are
    extra_views: int = _number(0, ge=0)  # further random views to compare renderings to; the paper: 4 (8 + 4)
    sigma_mean: float = 1.0  # ln sigma ~ N(mean, std^2)
    sigma_std: float = _number(1.6, ge=0)
    # Shares of the samples whose sigma lies around the sampler's own first, second, ... level; the rest is as above.
    sigma_levels: list[float] = _list(ge=0)
    sigma_level_std: float = _number(0.3, ge=0)  # of ln sigma around such a level
    condition_sigma_mean: float = -3.0  # likewise, of the noise on the condition image
    condition_sigma_std: float = _number(0.5, ge=0)
    dropout: float = _number(0.1, ge=0, le=1 / 3)  # rate of dropping the image embedding, the latent, and both, each
    feedback_probability: float = _number(0.5, ge=0, le=1)  # of a second pass that sees the rendered maps
    feedback: list[str] | None = None  # maps it sees, others are zero; null: all of model.multiview.feedback
    second_loss: Literal["replace", "add"] = "replace"  # what the loss of the second pass does to the first's
    detach_feedback: bool = False  # paper: true. Else the second loss also trains LGM, through the maps
    decode_gradient: bool = False  # paper: true. The reconstruction loss trains the U-Net too, through the decoder
    image_loss: Literal["l1", "mse"] = "l1"  # mse is the paper's draft's
    lpips_weight: float = _number(1.0, ge=0)
    lpips_network: Literal["alex", "vgg"] = "alex"  # for the loss and for scores; alex is the release's
    lpips_warmup_steps: int = _number(0, ge=0)  # steps over which the weight rises from 0; neither paper nor release
    # The next two count where something is reconstructed; `reconstruction: none` does not read them.
    alpha_weight: float = _number(0.0, ge=0)  # MSE of the rendered alpha, an extra of ours (LGM has it)
    position_weight: float = _number(0.0, ge=0)  # L1 of the Gaussians' positions to unprojected depth, an extra of ours

    @property
    def trained(self) -> list[str]:
        """The parts that are trained: those with a loss that are not frozen."""
        with_loss = ["unet", "adapters", "rays"] if self.diffusion else []
        with_loss += ["lgm"] if self.reconstruction != "none" else []
        return [part for part in with_loss if part not in self.freeze]

    @property
    def uses_lpips(self) -> bool:
        return self.lpips_weight > 0 and self.reconstruction != "none"


@dataclass
class TrainConfig:
    output_dir: str = "runs/train"  # one run per folder; the same command resumes it
    seed: int = _number(0, ge=0, lt=2**32)  # numpy takes no larger one
    steps: int = _number(40000, ge=1)  # optimiser steps
    batch_size: int = _number(4, ge=1)  # per process
    gradient_accumulation: int = _number(1, ge=1)  # batches per optimiser step
    learning_rate: float = _number(1e-5, gt=0)
    warmup_steps: int = _number(0, ge=0)  # steps over which the learning rate rises from 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; the last two end at 0
    optimizer: Literal["adamw", "adamw_fused", "adamw_8bit", "muon"] = "adamw"  # docs/training.md
    weight_decay: float = _number(0.01, ge=0)
    betas: list[float] = _list(0.9, 0.999, length=2, ge=0, lt=1)  # of AdamW
    clip_norm: float = _number(1.0, gt=0)  # largest norm of the gradient
    mixed_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    gradient_checkpointing: bool = False  # less memory, more time
    compile: bool = False  # torch.compile of the trained networks; without accumulation by CUDA graphs on CUDA
    freeze_unread: bool = False  # leave out what attention to one token never reads: no weight decay on it, and faster
    cache_encodings: float = _number(0.0, ge=0)  # GiB of the VAE's and image encoder's results kept per process
    tf32: bool = False  # float32 products and convolutions on CUDA may round to TF32; the release trains so
    ema_decay: float = _number(0.0, ge=0, lt=1)  # of the averaged weights, which are exported; 0 keeps none
    resume: str = "auto"  # auto | never | a checkpoint folder
    save_every: int = _number(1000, ge=1)  # steps between checkpoints
    keep: int = _number(2, ge=1)  # newest checkpoints that stay, beside the best
    validate_every: int = _number(1000, ge=1)  # steps
    validate_objects: int = _number(4, ge=1)  # spread evenly over data.val
    best_metric: list[str] = _list("render_psnr", "lgm_unseen_psnr")  # by the first that validation has; [] keeps none
    best_direction: Literal["max", "min"] = "max"
    spike_factor: float = 20.0  # stop when the loss exceeds this many times its recent median ...
    spike_steps: int = _number(3, ge=1)  # ... for so many steps running; a factor of 0 never stops
    log_every: int = _number(20, ge=1)  # steps
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    time_budget: str = ""  # e.g. "90m": save and stop after this long (a cosine ends then); empty is unlimited


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    cameras: CamerasConfig = field(default_factory=CamerasConfig)
    turntable: TurntableConfig = field(default_factory=TurntableConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
