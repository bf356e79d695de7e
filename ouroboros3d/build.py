"""The composition root: from a Config to networks, renderer, sampler and objective."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderKLTemporalDecoder, AutoencoderTiny, UNetSpatioTemporalConditionModel
from torch import nn
from transformers import CLIPVisionModelWithProjection

from ouroboros3d.cameras import Cameras, frame_indices, orbit
from ouroboros3d.config.loading import save_model_config
from ouroboros3d.config.schema import BACKGROUNDS, Config, ModelConfig, PretrainedConfig
from ouroboros3d.diffusion import euler_schedule
from ouroboros3d.errors import ConfigError, one_line
from ouroboros3d.files import check_writable_dir, locate
from ouroboros3d.interfaces import Reconstructor, Renderer
from ouroboros3d.models.lgm import LGM
from ouroboros3d.models.multiview_unet import MultiViewUNet, make_unet
from ouroboros3d.models.offload import offload as offload_networks
from ouroboros3d.models.precision import cast_weights
from ouroboros3d.models.svd import SVDParts, make_image_encoder, make_vae
from ouroboros3d.models.weights import (
    CheckpointError,
    find_checkpoint,
    find_weights,
    fit_state,
    load_checkpoint,
    load_lgm,
    load_unet,
    read_state,
    save_checkpoint,
    save_diffusers,
)
from ouroboros3d.rendering import render
from ouroboros3d.rendering.gsplat_backend import load_kernels
from ouroboros3d.sampler import Sampler

FROZEN = {
    "vae": (make_vae, AutoencoderKLTemporalDecoder),
    "image_encoder": (make_image_encoder, CLIPVisionModelWithProjection),
}


@dataclass
class Models:
    """The networks of one model; `svd` is frozen."""

    unet: MultiViewUNet
    lgm: Reconstructor
    svd: SVDParts

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What is counted, trained or frozen by itself; `objective.freeze` has the first four names."""
        unet = self.unet
        return {
            "unet": unet.unet,
            "adapters": unet.cond_encoder,
            "rays": nn.ModuleList([*unet.down_plucker, unet.mid_plucker, *unet.up_plucker]),
            "lgm": self.lgm,
            "vae": self.svd.vae,
            "image_encoder": self.svd.image_encoder,
        }

    @property
    def device(self) -> torch.device:
        return next(self.lgm.parameters()).device

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None, offload: bool = False) -> Models:
        """Moves and, for inference, casts the networks; training keeps float32 weights under autocast. With `offload`
        a network moves to the device while it works, and waits on the CPU."""
        if dtype is not None:
            cast_weights(self.unet, dtype)
            self.lgm.to_inference_dtype(dtype)
            self.svd.to_inference_dtype(dtype)
        if offload:
            offload_networks((self.unet, self.lgm, self.svd.vae, self.svd.image_encoder), torch.device(device))
            if self.svd.tiny_decoder is not None:  # small enough to stay
                self.svd.tiny_decoder.to(device)
            self.svd._buffers |= {name: buffer.to(device) for name, buffer in self.svd._buffers.items()}
            return self
        for module in (self.unet, self.lgm, self.svd):
            remove_hook_from_module(module, recurse=True)  # of an offload before
            module.to(device)
        return self

    def eval(self) -> Models:
        for module in (self.unet, self.lgm, self.svd):
            module.eval()
        return self


def build_models(config: ModelConfig) -> Models:
    """Networks of the configured dimensions with the configured weights (`model.pretrained`), on the CPU.

    SVD's and LGM's public weights come first, a checkpoint last. What is loaded whole is built without memory, which
    at full size saves half a minute and a second copy. Raises CheckpointError.
    """
    pretrained = find_pretrained(config.pretrained)
    has_checkpoint = pretrained.checkpoint is not None
    if has_checkpoint:
        checkpoint = find_checkpoint(pretrained.checkpoint)
    with _without_memory(has_checkpoint or pretrained.svd is not None or pretrained.unet is not None):
        inner = make_unet(config)
    unet = MultiViewUNet(config, inner)  # its adapters may be missing in a checkpoint, and then start as they are
    with _without_memory(has_checkpoint):
        lgm = build_reconstructor(config)
    frozen = {}
    for part, (make, cls) in FROZEN.items():
        beside = has_checkpoint and find_weights(checkpoint, part) is not None
        own = None if beside else getattr(pretrained, part)  # a checkpoint's own part counts
        if pretrained.svd is not None:
            frozen[part] = from_pretrained(cls, part, pretrained.svd, pretrained.variant)
        else:
            with _without_memory(beside or own is not None):
                frozen[part] = make(getattr(config, part))
        if own is not None:
            fit_state(frozen[part], read_state(own), own)
    if pretrained.svd is not None and not has_checkpoint:
        trained = from_pretrained(UNetSpatioTemporalConditionModel, "unet", pretrained.svd, pretrained.variant)
        fit_state(unet.unet, trained.state_dict(), f"{pretrained.svd}/unet")
    if pretrained.unet is not None and not has_checkpoint:
        load_unet(pretrained.unet, unet)
    if pretrained.lgm is not None and not has_checkpoint:
        load_lgm(pretrained.lgm, lgm)
    svd = SVDParts(**frozen, decode_chunk=config.conventions.decode_chunk, tiny_decoder=_tiny_decoder(pretrained))
    models = Models(unet, lgm, svd)
    if has_checkpoint:
        load_checkpoint(checkpoint, models)
        for part in FROZEN if pretrained.svd is None else ():
            if getattr(pretrained, part) is None and find_weights(checkpoint, part) is None:
                raise CheckpointError(
                    f"{pretrained.checkpoint}: has no {part}.safetensors, and nothing else names one; set "
                    f"model.pretrained.svd or model.pretrained.{part}"
                )
    return models.eval()


def _without_memory(really: bool) -> contextlib.AbstractContextManager:
    """Parameters made inside have shapes alone; buffers, which weights files lack, are as always."""
    return init_empty_weights(include_buffers=False) if really else contextlib.nullcontext()


def build_reconstructor(config: ModelConfig) -> Reconstructor:
    """With random weights. Another one takes LGM's place here (docs/extending.md)."""
    return LGM(config.lgm, config.conventions.rotation)


def find_pretrained(pretrained: PretrainedConfig) -> PretrainedConfig:
    """With the relative paths that are not in the working directory looked up in the repository."""
    paths = {k: path if path is None else str(locate(path)) for k, path in vars(pretrained).items()}
    return PretrainedConfig(**paths | {"variant": pretrained.variant})


def _tiny_decoder(pretrained: PretrainedConfig) -> AutoencoderTiny | None:
    """The one that is named, else the checkpoint folder's, if it has one."""
    source = pretrained.tiny_decoder
    if source is None and pretrained.checkpoint is not None:
        beside = Path(pretrained.checkpoint) / "tiny_decoder"
        source = str(beside) if beside.is_dir() else None
    return None if source is None else from_pretrained(AutoencoderTiny, None, source, key="tiny_decoder")


def from_pretrained(cls: type, part: str | None, source: str, variant: str | None = None, key: str = "svd"):
    """One part of an SVD folder or hub id, or all of a folder or id that `model.pretrained.<key>` names, in float32:
    from the files of this variant or, where there are none, from the full ones or those in fp16. Raises
    CheckpointError with the way out."""
    try:
        try:
            return cls.from_pretrained(source, subfolder=part, variant=variant).float()
        except (OSError, ValueError):  # what the libraries raise when files of that name are missing
            with contextlib.suppress(OSError, ValueError):
                return cls.from_pretrained(source, subfolder=part, variant=None if variant else "fp16").float()
            raise
    except Exception as error:  # the hub's, safetensors' and the library's own errors have no common base
        reason = one_line(error)
        if Path(source).exists():
            reason = f"cannot load '{part or key}' from this folder: {reason}"
        elif source.startswith(("/", ".", "~")) or source.count("/") != 1:
            reason = "no such folder, and not a hub id such as stabilityai/stable-video-diffusion-img2vid"
        else:
            reason = f"cannot fetch '{part or key}' (is there a connection? a downloaded folder works too): {reason}"
        raise CheckpointError(f"model.pretrained.{key}={source}: {reason}") from error


def save_models(
    folder: str | Path, models: Models, config: Config, layout: str, frozen: bool, dtype: torch.dtype | None = None
) -> None:
    """Writes the networks in the layout of "diffusers" or "release", the latter's with or without the `frozen` parts,
    and config.yaml. Raises OutputError."""
    folder = check_writable_dir(folder)
    if layout == "release":
        save_checkpoint(folder, models, dtype=dtype, frozen=frozen)
    else:
        save_diffusers(folder, models, euler_schedule(config.sampler.scheduler, config.sampler.steps), dtype)
    save_model_config(config, folder / "config.yaml")


def build_renderer(config: Config) -> Renderer:
    """The renderer with the configured rules and background; gsplat on CUDA, numba on a CPU."""
    background = BACKGROUNDS[config.data.background]
    return functools.partial(render, background=background, rules=config.model.conventions.renderer)


def check_renderer(config: Config, device: torch.device) -> None:
    """Refuses a renderer that cannot run on the device, before minutes of loading; on CUDA compiles gsplat's kernels
    if they are not. Raises ConfigError or RendererError."""
    if device.type != "cuda":
        return
    if config.model.conventions.renderer == "release":
        raise ConfigError(
            "model.conventions.renderer = 'release': on CUDA gsplat renders, which cannot follow it; set it "
            "to gsplat, or use --device cpu"
        )
    load_kernels()


def build_sampler(models: Models, config: Config) -> Sampler:
    """The loop of the configuration; with `sampler.compile` U-Net and decoder compile when first called."""
    if config.sampler.compile:
        for network in (models.unet, models.svd.vae.decoder):
            network.compile(mode="reduce-overhead", dynamic=False)
    return Sampler(models.unet, models.svd, models.lgm, build_renderer(config), config.model, config.sampler)


def build_cameras(config: Config) -> Cameras:
    """The orbit that is generated, [1, V]: the configured views of an evenly spaced one."""
    c = config.cameras
    indices = frame_indices(c.orbit_frames, c.num_views, config.model.conventions.view_selection)
    azimuths = [360.0 * i / c.orbit_frames for i in indices]
    return orbit(azimuths, c.elevation, c.distance, c.fov)
