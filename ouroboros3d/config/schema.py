"""The typed configuration: every dimension and every switch, with the release's values as defaults.

A YAML file names what differs from these defaults. An unknown key, a wrong type or an impossible combination
raises `ConfigError` with the key's name, its value and what would be right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Of the pictures, in [0, 1]; "random" draws one per training example, and is white where one colour must do.
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "grey": (0.5, 0.5, 0.5), "random": (1.0, 1.0, 1.0)}


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
    noise_level: bool = True  # false: always told c_noise 0, plain LGM (for networks that were not trained jointly)


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
    feedback_of: str = "own"  # own | another: a control, each object is fed the maps of the next in its batch
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
    root: str = "data/orbits"  # a folder of orbits, or of the shards that scripts/make_shards.py makes of one
    train: str = "train.txt"
    val: str = "val.txt"
    background: str = "white"  # white | black | grey | random: a colour a training example (elsewhere white)
    mirror: bool = False
    color_jitter: float = 0.0
    cache: str = "none"  # none | memory | disk: decoded views at image_size
    cache_dir: str | None = None  # for the disk's; null is <root>/.cache
    max_damaged: float = 0.01  # share of the training list that may be replaced by neighbours before the run stops
    workers: int = 4
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
    reconstruction: str = "both"  # none | clean | predicted | both: of which views. none: LGM is not trained
    freeze: list[str] = _list()  # of unet (SVD's own weights), adapters, rays, lgm: kept as they are
    extra_views: int = 0  # further random views that renderings are compared to; the paper says 4 (8 + 4)
    sigma_mean: float = 1.0  # ln sigma ~ N(mean, std^2)
    sigma_std: float = 1.6
    condition_sigma_mean: float = -3.0
    condition_sigma_std: float = 0.5
    dropout: float = 0.1
    feedback_probability: float = 0.5  # of a second pass that sees the rendered maps
    feedback: list[str] | None = None  # maps it sees, the others are zero; null: all of model.multiview.feedback
    second_loss: str = "replace"  # replace | add: what the loss of the second pass does to the first's
    detach_feedback: bool = False  # paper: true. Else the second loss also trains LGM, through the maps
    decode_gradient: bool = False  # paper: true. The reconstruction loss trains the U-Net too, through the decoder
    image_loss: str = "l1"  # l1 | mse (the paper's draft)
    lpips_weight: float = 1.0
    lpips_warmup_steps: int = 0  # optimiser steps over which the weight rises from 0; neither paper nor release
    alpha_weight: float = 0.0  # MSE of the rendered alpha, an extra of ours (LGM has it)
    position_weight: float = 0.0  # L1 of the Gaussians' positions to unprojected depth, an extra of ours

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
    output_dir: str = "runs/train"
    seed: int = 0
    steps: int = 40000
    batch_size: int = 4  # per process
    gradient_accumulation: int = 1
    learning_rate: float = 1e-5
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | linear | cosine: what follows the warm-up, the last two down to 0
    optimizer: str = "adamw"  # adamw | adamw_fused | adamw_8bit (bitsandbytes, CUDA)
    weight_decay: float = 0.01
    betas: list[float] = _list(0.9, 0.999)
    clip_norm: float = 1.0
    mixed_precision: str = "fp32"  # fp32 | fp16 | bf16
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the trained networks
    ema_decay: float = 0.0  # 0 keeps none
    resume: str = "auto"  # auto | never | a checkpoint folder
    save_every: int = 1000
    keep: int = 2  # newest checkpoints that stay, beside the best
    validate_every: int = 1000
    validate_objects: int = 4
    best_metric: list[str] = _list("render_psnr", "lgm_unseen_psnr")  # by the first that validation has; [] keeps none
    best_direction: str = "max"  # max | min
    spike_factor: float = 20.0  # stop when the loss exceeds this many times its recent median ...
    spike_steps: int = 3  # ... for so many steps running; a factor of 0 never stops
    log_every: int = 20
    tracker: str = "tensorboard"  # tensorboard | wandb | none
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
