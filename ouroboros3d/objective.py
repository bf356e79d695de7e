"""The joint training objective (Sec. 3.4 of the paper), one nn.Module from a batch to its losses.

1. Predict x0 with empty feedback. 2. Decode, reconstruct and render it: the noisy reconstruction at c_noise; also
reconstruct the clean views. 3. With some probability, predict again with the rendered maps as feedback.
The defaults of `ObjectiveConfig` are the release's; docs/training.md has each switch's value in paper and release.
Shapes: B batch, V views, C latent channels, images in [-1, 1].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ouroboros3d import diffusion
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.errors import ConfigError
from ouroboros3d.feedback import Feedback, choose_maps, feedback_maps, views_to_reconstruct
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.geometry import unproject
from ouroboros3d.interfaces import Reconstructor, Renderer, Rendering
from ouroboros3d.models.encoding_cache import EncodingCache
from ouroboros3d.models.multiview_unet import MultiViewUNet
from ouroboros3d.models.svd import SVDParts, time_ids
from ouroboros3d.tensors import Tensors
from ouroboros3d.timing import Stopwatch


@dataclass(frozen=True)
class Draws(Tensors):
    """Every random number of one training step, unit normals and uniforms in [0, 1), and the step itself."""

    vae_images: Tensor  # [B, V, C, h, w] posterior noise of the views
    latents: Tensor  # [B, V, C, h, w] diffusion noise
    condition_image: Tensor  # [B, 3, H, W]
    vae_condition: Tensor  # [B, C, h, w] posterior noise of the condition image
    condition_sigma: Tensor  # [B] uniform
    sigma: Tensor  # [B] uniform
    dropout: Tensor  # [B] uniform
    feedback: Tensor  # [] uniform, one coin for the whole global batch: all processes take the same branch
    step: int = 0  # optimiser steps done so far: LPIPS's warm-up follows it

    @classmethod
    def draw(
        cls, seed: int, step: int, samples: list[int], views: int, image_size: int, latent: tuple[int, int]
    ) -> Draws:
        """From (seed, global sample index) and (seed, step) alone, so that neither the number of processes nor a
        resume changes them. `latent` is (channels, size)."""
        channels, size = latent
        rows = []
        for sample in samples:
            g = torch.Generator().manual_seed(_mix(seed, 2 * sample))
            rows.append(
                (
                    torch.randn(views, channels, size, size, generator=g),
                    torch.randn(views, channels, size, size, generator=g),
                    torch.randn(3, image_size, image_size, generator=g),
                    torch.randn(channels, size, size, generator=g),
                    *torch.rand(3, generator=g).unbind(),
                )
            )
        coin = torch.rand((), generator=torch.Generator().manual_seed(_mix(seed, 2 * step + 1)))
        return cls(*(torch.stack(column) for column in zip(*rows, strict=True)), coin, step)


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}  # of train.mixed_precision


def _mix(seed: int, index: int) -> int:
    """A 63-bit seed that differs for every (seed, index)."""
    return (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9) % (2**63)


@dataclass(frozen=True)
class Inputs:
    """What both passes of a step share."""

    clean: Tensor  # [B, V, C, h, w] latents of the views
    noisy: Tensor  # [B, V, C, h, w] the same with noise of standard deviation sigma
    sigma: Tensor  # [B, 1, 1, 1, 1]
    c_noise: Tensor  # [B] ln sigma / 4
    context: Tensor  # [B, 1, D] embedding of the condition image, some dropped
    condition: Tensor  # [B, V, C, h, w] its latent, some dropped
    time_ids: Tensor  # [B, 3]


class Objective(nn.Module):
    """The losses of a batch. Only networks of which something is trained are submodules, so that nothing frozen is
    saved or wrapped; which these are, `requires_grad` says (training/setup.py). `clock` collects the seconds of the
    forward pass's parts; `record(name, tensor)` is told the intermediate tensors."""

    unet: MultiViewUNet
    lgm: Reconstructor
    svd: SVDParts
    collate = staticmethod(OrbitBatch.collate)

    def __init__(
        self,
        unet: MultiViewUNet,
        svd: SVDParts,
        lgm: Reconstructor,
        renderer: Renderer,
        config: Config,
        lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """`lpips` (models.lpips.make_lpips) is needed where the configuration gives it a weight."""
        super().__init__()
        networks = {"unet": unet, "lgm": lgm}
        self.trained = nn.ModuleDict(
            {name: n for name, n in networks.items() if any(p.requires_grad for p in n.parameters())}
        )
        self.__dict__ |= {"unet": unet, "lgm": lgm, "svd": svd}  # so that they are no submodules by themselves
        self.renderer = renderer
        self.model, self.config = config.model, config.objective
        shares, steps = config.objective.sigma_levels, config.sampler.steps
        if len(shares) > steps:
            raise ConfigError(f"objective.sigma_levels = {shares}: wants at most sampler.steps = {steps} shares")
        self.sampler_sigmas = diffusion.euler_schedule(config.sampler.scheduler, config.sampler.steps).sigmas.tolist()
        self.remember = EncodingCache(config.train.cache_encodings)
        self.random_background = config.data.background == "random"
        self._lpips = lpips
        if self.config.position_weight > 0 and lgm.grid is None:
            raise ConfigError("objective.position_weight: this reconstructor's Gaussians form no grid; must be 0")
        self._half = HALF.get(config.train.mixed_precision)
        self.clock = Stopwatch()
        self.record: Callable[[str, Tensor], None] = lambda name, tensor: None

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """For the frozen networks: accelerate wraps no autocast around DeepSpeed's and FSDP2's."""
        return contextlib.nullcontext() if self._half is None else torch.autocast(device.type, self._half)

    def draw(self, seed: int, step: int, samples: list[int], batch: OrbitBatch) -> Draws:
        """The step's random numbers, on the batch's device."""
        views, size = batch.images.shape[1], batch.images.shape[-1]
        latent = (self.model.vae.latent_channels, size // self.svd.downscale)
        return Draws.draw(seed, step, samples, views, size, latent).to(batch.images.device, non_blocking=True)

    def forward(self, batch: OrbitBatch, draws: Draws) -> dict[str, Tensor]:
        """Losses by name, "total" the one to minimise."""
        losses = self._joint(batch, draws) if self.config.diffusion else self._reconstruction(batch, draws.step)
        return losses | {"total": sum(losses.values())}

    def _joint(self, batch: OrbitBatch, draws: Draws) -> dict[str, Tensor]:
        config, clock, device = self.config, self.clock, batch.images.device
        with clock("encode", device):
            inputs = self._noised_inputs(batch, draws)
        needs_3d = config.reconstruction in ("predicted", "both")
        again = config.feedback_probability > 0 and bool(draws.feedback > 1 - config.feedback_probability)
        again = again and bool(self.unet.config.feedback)  # without adapters it would repeat the first
        replaced = again and config.second_loss == "replace"
        # A first pass whose loss is replaced and whose decoding carries no gradient needs none itself.
        needs_gradient = torch.is_grad_enabled() and not (replaced and not config.decode_gradient)
        with torch.set_grad_enabled(needs_gradient), clock("unet", device):
            v, x0 = self._predict(inputs, batch, None)
            self.record("model_pred_0", v)
        losses = {"diffusion": self._diffusion_loss(x0, inputs)}

        rendering = None
        if needs_3d or again:
            needs_gradient = torch.is_grad_enabled() and config.decode_gradient
            with torch.set_grad_enabled(needs_gradient), clock("decode", device), self._autocast(device):
                decoded = self.svd.decode(x0)
            self.record("decoded_x0", decoded)
            # Without a reconstruction loss the maps are data for the U-Net alone.
            with torch.set_grad_enabled(torch.is_grad_enabled() and config.reconstruction != "none"):
                known = views_to_reconstruct(decoded, batch.images[:, 0], self.model.conventions.input_view)
                gaussians = self._reconstruct(known, batch, inputs.c_noise)
                rendering = self._render(gaussians, batch)
            self.record("render_x1", rendering.rgb)
        if config.reconstruction != "none":
            losses |= self._reconstruction(batch, draws.step, (rendering, gaussians) if needs_3d else None)
        if again:
            seen = rendering.views(slice(batch.cameras.num_views))
            maps = feedback_maps(seen, batch.cameras, self.model.conventions.coordinates_map)
            self.record("position_map", maps["ccm"])
            if config.detach_feedback:
                maps = {name: m.detach() for name, m in maps.items()}
            torch.clear_autocast_cache()  # older torch keeps the first pass's weights there, without gradient
            with clock("unet", device):
                v, x0 = self._predict(inputs, batch, maps)
                self.record("model_pred_1", v)
            second = self._diffusion_loss(x0, inputs)
            losses["diffusion"] = second if replaced else losses["diffusion"] + second
        return losses

    @torch.no_grad()
    def _noised_inputs(self, batch: OrbitBatch, draws: Draws) -> Inputs:
        """Clean and noisy latents, and the conditions with dropout: everything both passes share."""
        config, conventions = self.config, self.model.conventions
        size, views = len(batch.images), batch.images.shape[1]
        mean, std = self.remember("vae", batch.images.flatten(0, 1), self.svd.moments).unbind(1)
        clean = (mean + std * draws.vae_images.flatten(0, 1)).float()
        clean = self.svd.scale(clean).unflatten(0, (size, views))

        image = batch.images[:, 0]
        condition_sigma = diffusion.lognormal_sigma(
            draws.condition_sigma, config.condition_sigma_mean, config.condition_sigma_std
        )
        noised = image + condition_sigma[:, None, None, None] * draws.condition_image
        with self._autocast(image.device):
            if conventions.clip_training_image == "noised":
                context = self.svd.embed_image(noised).float()
            else:
                context = self.remember("image encoder", image, self.svd.embed_image).float()
        latent = self.svd.encode(noised, draws.vae_condition).float()
        self.record("condition_latent", latent)
        if conventions.time_id == "release":  # every sample gets the first one's value (quirk 21)
            condition_sigma = condition_sigma[:1].expand(size)
        keep_context, keep_latent = diffusion.dropout_masks(draws.dropout, config.dropout)

        mixture = config.sigma_levels, config.sigma_level_std, config.sigma_mean, config.sigma_std
        sigma = diffusion.mixture_sigma(draws.sigma, self.sampler_sigmas, *mixture)[:, None, None, None, None]
        inputs = Inputs(
            clean=clean,
            noisy=clean + sigma * draws.latents,
            sigma=sigma,
            c_noise=diffusion.c_noise(sigma).flatten(),
            context=context * keep_context[:, None, None],
            condition=(latent * keep_latent[:, None, None, None])[:, None].expand_as(clean),
            time_ids=time_ids(self.model.multiview.micro_conditions, condition_sigma),
        )
        for name in ("clean", "c_noise", "context", "time_ids"):
            self.record(name, getattr(inputs, name))
        return inputs

    def _predict(self, inputs: Inputs, batch: OrbitBatch, maps: Feedback | None) -> tuple[Tensor, Tensor]:
        """(v, x0), [B, V, C, h, w]; without maps the adapters see zeros."""
        sample = torch.cat([diffusion.c_in(inputs.sigma) * inputs.noisy, inputs.condition], dim=2)
        self.record("unet_input", sample)
        size = self.model.image_size
        known = self.unet.config.feedback
        if maps is None:
            maps = dict.fromkeys(known, sample.new_zeros(*sample.shape[:2], 3, size, size))
        feedback = choose_maps(maps, known, known if self.config.feedback is None else self.config.feedback)
        rays = self.unet.encode_cameras(batch.cameras, sample.shape[-1])
        features = self.unet.encode_feedback(feedback)
        dtype = self.unet.unet.dtype  # DeepSpeed holds the weights in half precision
        given = sample.to(dtype), inputs.c_noise, inputs.context.to(dtype), inputs.time_ids
        v = self.unet(*given, rays, features).float()
        return v, diffusion.denoised(inputs.noisy, v, inputs.sigma)

    def _diffusion_loss(self, x0: Tensor, inputs: Inputs) -> Tensor:
        """lambda(sigma) |x0 - clean|^2, mean over everything (Eq. 5)."""
        return (diffusion.loss_weight(inputs.sigma) * (x0 - inputs.clean) ** 2).mean()

    def _reconstruct(self, images: Tensor, batch: OrbitBatch, c_noise: Tensor) -> Gaussians:
        with self.clock("reconstruct", images.device):
            return self.lgm(images, batch.cameras, c_noise)

    def _render(self, gaussians: Gaussians, batch: OrbitBatch) -> Rendering:
        """At the batch's cameras and, behind them, those of its extra views; on the images' background."""
        own = {"background": batch.background} if self.random_background else {}
        with self.clock("render", batch.images.device):
            return self.renderer(gaussians, batch.supervised.cameras, batch.images.shape[-1], **own)

    def _reconstruction(
        self, batch: OrbitBatch, step: int, predicted: tuple[Rendering, Gaussians] | None = None
    ) -> dict[str, Tensor]:
        """Image losses of the predicted reconstruction (if given) and of the clean one (if asked), averaged."""
        renderings = [] if predicted is None else [predicted]
        if self.config.reconstruction in ("clean", "both"):
            # c_noise 0, the release's integer time, means sigma = 1 on the ln / 4 scale (quirk 23).
            clean = self._reconstruct(batch.images, batch, batch.images.new_zeros(()))
            rendering = self._render(clean, batch)
            self.record("render_x0", rendering.rgb)
            renderings.append((rendering, clean))
        with self.clock("losses", batch.images.device):
            parts = [self._image_losses(r, g, batch, self._lpips_weight(step)) for r, g in renderings]
        return {name: torch.stack([p[name] for p in parts]).mean() for name in parts[0]}

    def _lpips_weight(self, step: int) -> float:
        """Rises linearly from 0 over the warm-up; at 0 LPIPS is not computed."""
        warmup = self.config.lpips_warmup_steps
        return self.config.lpips_weight * (min(1.0, step / warmup) if warmup else 1.0)

    def _image_losses(
        self, rendering: Rendering, gaussians: Gaussians, batch: OrbitBatch, lpips_weight: float
    ) -> dict[str, Tensor]:
        """L1 or MSE, LPIPS (both on [0, 1]), and the optional alpha and position terms."""
        config, truth = self.config, batch.supervised
        rgb, target = rendering.rgb.clamp(0, 1), truth.images * 0.5 + 0.5
        difference = F.l1_loss if config.image_loss == "l1" else F.mse_loss
        losses = {"reconstruction": difference(rgb, target)}
        if self._lpips is not None and lpips_weight > 0:
            losses["lpips"] = lpips_weight * self._lpips(rgb.flatten(0, 1), target.flatten(0, 1))
        if config.alpha_weight > 0:
            losses["alpha"] = config.alpha_weight * F.mse_loss(rendering.alpha, truth.alpha)
        if config.position_weight > 0:
            losses["position"] = config.position_weight * self._position_loss(gaussians, batch)
        return losses

    def _position_loss(self, gaussians: Gaussians, batch: OrbitBatch) -> Tensor:
        """L1 of each input pixel's Gaussian to the surface point it sees: a start for a reconstructor without
        public weights. Depth is resized (nearest) to the grid of Gaussians."""
        index, size = self.lgm.input_views(batch.images.shape[1]), self.lgm.grid
        depth = F.interpolate(batch.depth[:, index].flatten(0, 1), (size, size), mode="nearest")
        depth = depth.unflatten(0, (len(batch.images), len(index)))
        points = unproject(depth, batch.cameras.views(index)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        seen = depth.flatten(1)[..., None] > 0
        return ((gaussians.means - points).abs() * seen).sum() / (3 * seen.sum().clamp(min=1))
