"""SVD's frozen parts: the VAE with its temporal decoder and the CLIP image encoder (Sec. 3.1).

Shapes: B batch, V views, C latent channels; images in [-1, 1]; latents h = H / 8 at full size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder, AutoencoderTiny
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import (
    _resize_with_antialiasing,
)
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from ouroboros3d.config.loading import as_kwargs
from ouroboros3d.config.schema import ImageEncoderConfig, TinyDecoderConfig, VAEConfig
from ouroboros3d.models.norms import set_norm_groups
from ouroboros3d.models.precision import cast_weights, without_autocast

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class SVDParts(nn.Module):
    """Encodes and decodes pictures, embeds the condition image. Never trained with the rest.

    The encoder never runs in half precision where the VAE says `force_upcast`, as SVD's does: it would overflow.
    """

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        image_encoder: CLIPVisionModelWithProjection,
        decode_chunk: int = 14,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        tiny_decoder: AutoencoderTiny | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.image_encoder, self.decode_chunk = vae, image_encoder, decode_chunk
        self.tiny_decoder = tiny_decoder  # a stand-in for the VAE's decoder inside the loop
        for name, value in (("mean", image_mean), ("std", image_std)):
            self.register_buffer(f"_{name}", torch.tensor(value)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> SVDParts:
        return super().train(False)

    @property
    def downscale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def to_inference_dtype(self, dtype: torch.dtype) -> SVDParts:
        """Casts the weights, but not those of an encoder that `force_upcast` keeps in float32."""
        full = self.vae.config.force_upcast
        cast_weights(self, dtype, keep=(self.vae.encoder, self.vae.quant_conv) if full else ())
        return self

    def embed_image(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] -> CLIP image embedding [B, 1, D], by an antialiased bicubic resize (quirk 12; no clamp)."""
        size = self.image_encoder.config.image_size
        image = _resize_with_antialiasing(image.float(), (size, size)) * 0.5 + 0.5
        image = (image - self._mean) / self._std
        return self.image_encoder(image.to(self.image_encoder.dtype)).image_embeds[:, None]

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> unscaled latents [B, C, h, w]: the posterior's mode, or a sample of it with the unit
        normal `noise` (quirk 13)."""
        mean, std = self.moments(images).unbind(1)
        return mean if noise is None else mean + std * noise

    def moments(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> mean and standard deviation of the posterior, [B, 2, C, h, w], unscaled."""
        with without_autocast(images.device) if self.vae.config.force_upcast else contextlib.nullcontext():
            posterior = self.vae.encode(images.to(self.vae.encoder.conv_in.weight.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def scale(self, latents: Tensor) -> Tensor:
        """Latents as the diffusion model sees them. The condition latent is *not* scaled (quirk 12)."""
        return latents * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, V, C, h, w] -> images [B, V, 3, H, W], about [-1, 1], not clamped.

        The decoder mixes neighbouring frames. The release decodes 14 at a time over the flattened batch, which
        mixes samples when B > 1 (quirk 14); `decode_chunk = 0` decodes sample by sample.
        """
        batch, views = latents.shape[:2]
        dtype = self.vae.decoder.conv_in.weight.dtype  # the encoder's may differ, see `to_inference_dtype`
        flat = (latents / self.vae.config.scaling_factor).flatten(0, 1).to(dtype)
        if self.decode_chunk == 0:  # the decoder knows samples of `num_frames` frames, so one call serves all
            decoded = self.vae.decode(flat, num_frames=views).sample
        else:
            decoded = torch.cat(
                [self.vae.decode(chunk, num_frames=len(chunk)).sample for chunk in flat.split(self.decode_chunk)]
            )
        return decoded.unflatten(0, (batch, views)).float()

    def decode_in_loop(self, latents: Tensor, decoder: str) -> Tensor:
        """Like `decode`, for views that only the feedback sees: by the "full" decoder; by the same one at "half" the
        resolution, [B, V, 3, H/2, W/2]; or by the "tiny" one, which knows single frames."""
        if decoder == "half":
            flat = F.interpolate(latents.flatten(0, 1), scale_factor=0.5, mode="area")
            return self.decode(flat.unflatten(0, latents.shape[:2]))
        if decoder == "tiny":
            decoded = self.tiny_decoder.decode(latents.flatten(0, 1).to(self.tiny_decoder.dtype)).sample
            return decoded.unflatten(0, latents.shape[:2]).float()
        return self.decode(latents)


def time_ids(micro_conditions: Sequence[float], noise_augmentation: Tensor) -> Tensor:
    """(fps - 1, motion bucket) and the noise on each condition image [B] -> [B, 3]."""
    fixed = noise_augmentation.new_tensor(micro_conditions).expand(len(noise_augmentation), 2)
    return torch.cat([fixed, noise_augmentation[:, None]], dim=-1)


def make_vae(config: VAEConfig) -> AutoencoderKLTemporalDecoder:
    """A VAE of these dimensions with random weights."""
    levels = len(config.block_out_channels)
    kwargs = as_kwargs(config)
    groups = kwargs.pop("norm_groups")
    vae = AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * levels, **kwargs)
    set_norm_groups(vae, groups)
    return vae


def make_image_encoder(config: ImageEncoderConfig) -> CLIPVisionModelWithProjection:
    """An image encoder of these dimensions with random weights."""
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**as_kwargs(config)))


def make_tiny_decoder(config: TinyDecoderConfig, latent_channels: int) -> AutoencoderTiny:
    """A tiny decoder of these dimensions with random weights; of its encoder, which is not used, there is a stub."""
    levels = len(config.blocks)
    return AutoencoderTiny(
        latent_channels=latent_channels,
        encoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(0,) * levels,
        decoder_block_out_channels=(config.channels,) * levels,
        num_decoder_blocks=tuple(config.blocks),
    )
