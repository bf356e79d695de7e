"""The multi-view diffusion U-Net: SVD's own, with camera rays and feedback features added to its blocks (Sec. 3).

Shapes: B batch, V views, C latent channels (2C in: noisy and condition), h = w latent pixels.
"""

from __future__ import annotations

import torch
from diffusers import UNetSpatioTemporalConditionModel
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ouroboros3d.cameras import Cameras
from ouroboros3d.config.loading import as_kwargs
from ouroboros3d.config.schema import ModelConfig
from ouroboros3d.feedback import Feedback
from ouroboros3d.geometry import embedded_rays
from ouroboros3d.models.conditioning import RayEncoder, Residuals, feedback_encoder, sum_features
from ouroboros3d.models.norms import set_norm_groups
from ouroboros3d.models.one_key import use_one_key_attention


class MultiViewUNet(nn.Module):
    """Predicts v for V views at once. Parameter names are the release's, but for the adapters' (see weights.py).

    `encode_cameras` and `encode_feedback` make the two kinds of residuals, `forward` adds them.
    """

    def __init__(self, model: ModelConfig, unet: UNetSpatioTemporalConditionModel | None = None) -> None:
        """`unet`: SVD's own from `make_unet`, perhaps without memory for weights that will be loaded."""
        super().__init__()
        config, conventions = model.multiview, model.conventions
        self.config, self.conventions = config, conventions
        self.unet = make_unet(model) if unet is None else unet
        use_one_key_attention(self.unet)
        widths = list(config.unet.block_out_channels)
        rays = 6 * (2 * config.ray_octaves + 1)
        self.cond_encoder = nn.ModuleList(
            feedback_encoder(widths, config.adapter.res_blocks, model.vae.downscale) for _ in config.feedback
        )
        # Each encoder's width is that of the feature map entering its block.
        self.down_plucker = nn.ModuleList(RayEncoder(rays, c) for c in [widths[0], *widths[:-1]])
        self.mid_plucker = RayEncoder(rays, widths[-1])
        self.up_plucker = nn.ModuleList(RayEncoder(rays, c) for c in [widths[-1], *reversed(widths[1:])])
        self._context_order = ReleaseContextOrder()
        if conventions.temporal_context == "release":
            for name, block in self.unet.named_modules():
                if name.rpartition(".")[0].endswith("temporal_transformer_blocks"):
                    block.register_forward_pre_hook(self._context_order, with_kwargs=True)

    @apply_forward_hook
    def encode_cameras(self, cameras: Cameras, size: int) -> Residuals:
        """Ray features of every block for latents of `size` pixels; once per sampling run.

        The rays are embedded anew at each block's resolution (parity quirk 4).
        """
        sizes = [size]
        for _ in self.unet.down_blocks[1:]:
            sizes.append((sizes[-1] + 1) // 2)  # what a stride-2 convolution with padding 1 leaves
        dtype = self.mid_plucker.embed[0].weight.dtype
        rays = {
            s: embedded_rays(cameras, s, self.config.ray_octaves, self.conventions.rays).to(dtype) for s in set(sizes)
        }
        return Residuals(
            down=[encoder(rays[s]) for encoder, s in zip(self.down_plucker, sizes, strict=True)],
            mid=self.mid_plucker(rays[sizes[-1]]),
            up=[encoder(rays[s]) for encoder, s in zip(self.up_plucker, reversed(sizes), strict=True)],
        )

    @apply_forward_hook
    def encode_feedback(self, feedback: Feedback | None) -> Residuals:
        """Adapter features of the maps [B, V, 3, H, W] in [0, 1]; once per step. `None` adds nothing at all.

        All-zero maps are "no feedback yet" and are not the same as `None`: the adapters' biases act (quirk 6).
        """
        levels = len(self.unet.down_blocks)
        if feedback is None or not self.config.feedback:
            return Residuals([None] * levels, None, [])
        if set(feedback) != set(self.config.feedback):
            raise ValueError(f"the model takes feedback maps {self.config.feedback}, got {sorted(feedback)}")
        dtype = self.cond_encoder[0].conv_in.weight.dtype
        features = sum_features(
            [
                encoder(feedback[name].flatten(0, 1).to(dtype))
                for name, encoder in zip(self.config.feedback, self.cond_encoder, strict=True)
            ]
        )
        return Residuals([*features[:-1], None], features[-1], [])

    def forward(
        self,
        sample: Tensor,
        c_noise: Tensor,
        context: Tensor,
        time_ids: Tensor,
        rays: Residuals,
        feedback: Residuals,
        conditional_half: bool = False,
    ) -> Tensor:
        """v-prediction [B, V, C, h, w].

        sample [B, V, C, h, w]: c_in * x and the condition latent on channels. c_noise: scalar or [B].
        context [B, 1, D]: the image embedding. time_ids [B, 3]: fps - 1, motion bucket, noise augmentation.
        Rays are added to what enters each block, skip connections included; feedback inside the down blocks, before
        their downsampler, and after the mid block (quirks 4 and 5).
        `conditional_half`: the batch is the second half of a guidance pair whose first is left out; the release's
        context order (quirk 2) is still that of the pair.
        """
        unet = self.unet
        self._context_order.conditional_half = conditional_half
        batch, views = sample.shape[:2]
        emb = self._embed_time(c_noise.expand(batch), time_ids, sample.dtype).repeat_interleave(views, dim=0)
        context = context.repeat_interleave(views, dim=0)
        indicator = torch.zeros(batch, views, dtype=sample.dtype, device=sample.device)
        x = unet.conv_in(sample.flatten(0, 1))

        skips = []
        for block, ray, feature in zip(unet.down_blocks, rays.down, feedback.down, strict=True):
            x = _add(x, ray)
            skips.append(x)
            attentions = getattr(block, "attentions", [None] * len(block.resnets))
            last = len(block.resnets) - 1
            for i, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
                x = _resnet(block, resnet, x, emb, indicator)
                if attention is not None:
                    x = attention(x, context, indicator, return_dict=False)[0]
                # The skip of the last layer is stored before the feature is added.
                if i < last or block.downsamplers:
                    skips.append(x)
            x = _add(x, feature)
            for downsampler in block.downsamplers or ():
                x = downsampler(x)

        x = _add(x, rays.mid)
        skips.append(x)  # the last down block's output, rays included
        x = unet.mid_block(x, emb, encoder_hidden_states=context, image_only_indicator=indicator)
        x = _add(x, feedback.mid)

        for block, ray in zip(unet.up_blocks, rays.up, strict=True):
            x = _add(x, ray)
            own, skips = tuple(skips[-len(block.resnets) :]), skips[: -len(block.resnets)]
            attended = {"encoder_hidden_states": context} if hasattr(block, "attentions") else {}
            size = skips[-1].shape[-2:] if skips else None  # odd sizes do not come back by doubling
            x = block(x, own, emb, image_only_indicator=indicator, upsample_size=size, **attended)

        x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return x.unflatten(0, (batch, views))

    def _embed_time(self, c_noise: Tensor, time_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, 4 c0]: the noise level and SVD's three micro-conditions."""
        unet = self.unet
        emb = unet.time_embedding(unet.time_proj(c_noise).to(dtype))
        ids = unet.add_time_proj(time_ids.flatten()).unflatten(0, time_ids.shape).flatten(1)
        return emb + unet.add_embedding(ids.to(emb.dtype))


def make_unet(model: ModelConfig) -> UNetSpatioTemporalConditionModel:
    """SVD's U-Net with random weights, between the VAE's latents and the image encoder's embedding."""
    config, latent = model.multiview.unet, model.vae.latent_channels
    unet = UNetSpatioTemporalConditionModel(
        in_channels=2 * latent,  # the noisy latents and the condition's
        out_channels=latent,
        cross_attention_dim=model.image_encoder.projection_dim,
        projection_class_embeddings_input_dim=3 * config.addition_time_embed_dim,  # one per time id
        **as_kwargs(config),
    )
    set_norm_groups(unet, model.multiview.norm_groups)
    return unet


def _add(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def _resnet(block: nn.Module, resnet: nn.Module, x: Tensor, emb: Tensor, indicator: Tensor) -> Tensor:
    if block.gradient_checkpointing and torch.is_grad_enabled():
        return block._gradient_checkpointing_func(resnet, x, emb, indicator)
    return resnet(x, emb, image_only_indicator=indicator)


class ReleaseContextOrder:
    """Quirk 2: a hook that hands a temporal transformer block its context in the order of diffusers 0.25.

    Rows of the hidden states are (sample, position). Here each row gets its own sample's context; diffusers 0.25,
    with which the release was trained, repeated it as (position, sample), so row r sees sample r mod B.
    """

    conditional_half = False  # the rows are the second half of a pair; the contexts of the first are zeros

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden, context = args[0], kwargs["encoder_hidden_states"]
        rows, batch = len(context), hidden.shape[0] // kwargs["num_frames"]
        contexts = context.unflatten(0, (batch, -1))[:, 0]
        if self.conditional_half:
            contexts = torch.cat([torch.zeros_like(contexts), contexts])
        ordered = contexts.repeat(rows // batch, 1, 1)
        return args, kwargs | {"encoder_hidden_states": ordered[-rows:]}
