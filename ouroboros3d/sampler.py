"""The recursive loop of Ouroboros3D (Sec. 3.3, Alg. 1), written once.

    c = 0
    for sigma_i in schedule:
        F     = unet(c_in x; image, cameras, c)       guided
        x0    = c_skip x + c_out F
        views = vae.decode(x0)
        gauss = lgm(views, c_noise);  rgb, ccm = render(gauss)
        c     = (rgb, ccm)                            what the next step sees
        x     = euler(x, x0)

Inference, validation, evaluation and the figures all use this generator. Shapes: B batch, V views, C latent channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ouroboros3d import diffusion
from ouroboros3d.cameras import Cameras
from ouroboros3d.config.schema import ModelConfig, SamplerConfig
from ouroboros3d.errors import ConfigError, UserError
from ouroboros3d.feedback import Feedback, choose_maps, feedback_maps, views_to_reconstruct
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Reconstructor, Renderer, Rendering
from ouroboros3d.models.conditioning import Residuals
from ouroboros3d.models.multiview_unet import MultiViewUNet
from ouroboros3d.models.svd import SVDParts, time_ids
from ouroboros3d.tensors import Tensors
from ouroboros3d.timing import Stopwatch


@dataclass(frozen=True)
class Noise(Tensors):
    """Unit normal draws of one sampling run."""

    image: Tensor  # [B, 3, H, W] added to the condition image
    latents: Tensor  # [B, V, C, h, w] the start
    posterior: Tensor | None = None  # [B, C, h, w] to sample the condition latent; None takes its mode

    @classmethod
    def draw(cls, seeds: list[int], views: int, image_size: int, latent: tuple[int, int], posterior: bool) -> Noise:
        """One generator per sample, so that a batch equals its single items; `latent` is (channels, size)."""
        channels, size = latent
        draws = []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            draws.append(
                (
                    torch.randn(3, image_size, image_size, generator=g),
                    torch.randn(views, channels, size, size, generator=g),
                    torch.randn(channels, size, size, generator=g),
                )
            )
        image, latents, post = (torch.stack(x) for x in zip(*draws, strict=True))
        return cls(image, latents, post if posterior else None)


@dataclass(frozen=True)
class SamplerStep:
    """What one step predicted. The last step's `gaussians` and `views` are the result."""

    index: int
    total: int
    sigma: float
    latents: Tensor  # [B, V, C, h, w] x after the step
    x0: Tensor  # [B, V, C, h, w] predicted clean latents
    views: Tensor  # [B, V, 3, H, W] decoded x0, about [-1, 1], not clamped; smaller inside a loop that decodes so
    gaussians: Gaussians
    rendering: Rendering  # at all V cameras
    feedback: Feedback  # rgb and ccm, [B, V, 3, H, W] in [0, 1]
    v: Tensor = field(repr=False)  # [B, V, C, h, w] the guided prediction

    def pictures(self, index: int) -> dict[str, Tensor]:
        """What the step shows of one object, [V, 3, H, W] in [0, 1]: "views", and the maps "rgb" and "ccm" for the
        next step."""
        views = (self.views[index] * 0.5 + 0.5).clamp(0, 1)
        return {"views": views} | {name: maps[index] for name, maps in self.feedback.items()}


@dataclass(frozen=True)
class StepPlan:
    """What one step of the loop does; known before the first."""

    sigma: float
    guided: bool  # the U-Net sees the batch twice, unconditionally first
    fed: bool  # it sees the maps of the step before, not zeros
    made: bool  # the step is decoded, reconstructed and rendered

    @property
    def halves(self) -> int:
        return 2 if self.guided else 1


def plan_steps(config: SamplerConfig, sigmas: list[float], every_step: bool = True) -> list[StepPlan]:
    """One plan per step for falling noise levels, with or without the final 0. Without `every_step` only what feeds
    the next step, and the last, is made."""
    sigmas = sigmas[: config.taken_steps]
    end = next((i for i, sigma in enumerate(sigmas) if sigma <= config.last_sigma), len(sigmas) - 1)
    sigmas = sigmas[: end + 1]

    def fed(step: int) -> bool:
        """The paper's feedback-schedule table, thinned out."""
        first = max(config.feedback_from, 1)
        if step > end or step < first or (step - first) % config.feedback_every:
            return False
        before_end = config.feedback_to is None or step < config.feedback_to
        return bool(config.feedback) and before_end and _within(sigmas[step], config.feedback_sigma)

    # A guidance of 1 throughout is the conditional prediction itself.
    guides = any(weight != 1.0 for weight in config.guidance)
    return [
        StepPlan(
            sigma,
            guided=guides and _within(sigma, config.guidance_sigma),
            fed=fed(i),
            made=every_step or i == end or fed(i + 1),
        )
        for i, sigma in enumerate(sigmas)
    ]


def _within(sigma: float, interval: list[float] | None) -> bool:
    return interval is None or interval[0] <= sigma <= interval[1]


@dataclass(frozen=True)
class _Condition:
    """The U-Net's constant inputs for one or two guidance halves of a batch, R = B or 2B rows."""

    context: Tensor  # [R, 1, D] image embedding
    latent: Tensor  # [R, V, C, h, w] condition latent
    time_ids: Tensor  # [R, 3]
    rays: Residuals


class NumericalError(UserError, RuntimeError):
    """NaN or infinity inside the loop."""


class Sampler:
    """Runs the loop for a batch of images; `clock` collects the seconds of its parts."""

    def __init__(
        self,
        unet: MultiViewUNet,
        svd: SVDParts,
        reconstructor: Reconstructor,
        renderer: Renderer,
        model: ModelConfig,
        config: SamplerConfig,
    ) -> None:
        self.unet, self.svd, self.reconstructor, self.renderer = unet, svd, reconstructor, renderer
        self.model, self.config = model, config
        self.clock = Stopwatch()
        if config.loop_decoder == "tiny" and svd.tiny_decoder is None:
            raise ConfigError(
                "sampler.loop_decoder = 'tiny': there is no tiny decoder in the checkpoint; name one by "
                "model.pretrained.tiny_decoder, or set full or half"
            )

    def draw_noise(self, seeds: list[int], views: int) -> Noise:
        """This model's noise for one seed per sample."""
        size = self.model.image_size
        latent = (self.model.vae.latent_channels, size // self.svd.downscale)
        return Noise.draw(seeds, views, size, latent, self.model.conventions.condition_latent == "sample")

    @torch.no_grad()
    def __call__(
        self, image: Tensor, cameras: Cameras, noise: Noise, every_step: bool = True, truth: Feedback | None = None
    ) -> Iterator[SamplerStep]:
        """image [B, 3, H, W] in [-1, 1] at `model.image_size`, cameras of B scenes with V views. `truth`: the maps that
        `feedback_of = truth` feeds back instead of the loop's own.

        Without `every_step`, steps that feed nothing to the next one are neither decoded nor yielded; the last always
        is. Its result is the same.
        Raises ValueError for shapes that do not fit and NumericalError naming the first step and part with NaN: on a
        CPU at once, on a GPU before the last step is yielded.
        """
        self._check(image, cameras, noise, truth)
        clock, config = self.clock, self.config
        device, dtype = image.device, self.unet.unet.dtype
        compiled = self.unet._compiled_call_impl is not None  # by sampler.compile, or for training
        views, size = cameras.num_views, image.shape[-1]

        # Everything that does not change over the steps: conditions, camera rays, guidance.
        with clock("condition", device):
            scheduler = diffusion.euler_schedule(config.scheduler, config.taken_steps, device)
            plans = plan_steps(config, scheduler.sigmas.tolist(), every_step)
            scale = diffusion.guidance_ramp(*config.guidance, views, device)
            conditions = self._conditions(image, cameras, noise, {plan.halves for plan in plans})
            lgm_rays = self.reconstructor.encode_cameras(cameras)
        x = noise.latents * scheduler.init_noise_sigma
        blank = torch.zeros(len(image), views, 3, size, size, device=device)
        empty: Feedback = {name: blank for name in self.unet.config.feedback}
        empty_features = None  # constant: computed once however many steps go without feedback
        feedback: Feedback = empty
        finite = FiniteWatch()

        for i, (plan, t) in enumerate(zip(plans, scheduler.timesteps, strict=False)):
            last = i == len(plans) - 1
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            with clock("unet", device):
                if plan.fed:
                    features = self.unet.encode_feedback(feedback)
                else:
                    if empty_features is None:
                        empty_features = self.unet.encode_feedback(empty)
                    features = empty_features
                given, features = conditions[plan.halves], features.repeat(plan.halves)
                scaled = scheduler.scale_model_input(x, t).repeat(plan.halves, 1, 1, 1, 1)
                sample = torch.cat([scaled, given.latent], dim=2).to(dtype)
                inputs = sample, t, given.context, given.time_ids, given.rays, features
                v = self.unet(*inputs, conditional_half=not plan.guided).float()
                v = diffusion.guided(v, scale) if plan.guided else v.clone()  # its memory may be a CUDA graph's
                step = scheduler.step(v, t, x)
                x, x0 = step.prev_sample, step.pred_original_sample
                finite(x0, i, "latents")
            if not plan.made:
                continue
            with clock("decode", device):
                decoded = self.svd.decode(x0) if last else self.svd.decode_in_loop(x0, config.loop_decoder)
                finite(decoded, i, "decoded views")
            with clock("reconstruct", device):
                known = views_to_reconstruct(decoded, image, self.model.conventions.input_view)
                gaussians = self.reconstructor(known, cameras, t, lgm_rays)
                finite(gaussians.to_tensor(), i, "Gaussians")
            if compiled:  # the caller may keep what lies in a CUDA graph's memory
                decoded, gaussians = decoded.clone(), gaussians.map(torch.clone)
            with clock("render", device):
                rendering = self.renderer(gaussians, cameras, size)
                maps = feedback_maps(rendering, cameras, self.model.conventions.coordinates_map)
            fed = maps
            if config.feedback_of == "another":
                fed = {name: m.roll(1, 0) for name, m in maps.items()}
            elif config.feedback_of == "truth":
                fed = truth
            feedback = choose_maps(fed, self.unet.config.feedback, config.feedback)
            if last:
                finite.look()
            yield SamplerStep(i, len(plans), plan.sigma, x, x0, decoded, gaussians, rendering, maps, v)

    def _conditions(self, image: Tensor, cameras: Cameras, noise: Noise, halves: set[int]) -> dict[int, _Condition]:
        """What the U-Net is given in every step, by the number of guidance halves it sees; with two halves the
        unconditional one comes first and has zeros for embedding and latent (quirk 11)."""
        embedding = self.svd.embed_image(image).float()
        latent = self.svd.encode(image + self.config.noise_augmentation * noise.image, noise.posterior).float()
        latent = latent[:, None].expand(-1, cameras.num_views, -1, -1, -1)
        rays = self.unet.encode_cameras(cameras, noise.latents.shape[-1])
        augmentation = torch.full((len(image),), self.config.noise_augmentation, device=image.device)
        ids = time_ids(self.unet.config.micro_conditions, augmentation)

        def condition(times: int) -> _Condition:
            context, condition = (torch.cat([torch.zeros_like(c)] * (times - 1) + [c]) for c in (embedding, latent))
            return _Condition(context.to(self.unet.unet.dtype), condition, ids.repeat(times, 1), rays.repeat(times))

        return {times: condition(times) for times in halves}

    def _check(self, image: Tensor, cameras: Cameras, noise: Noise, truth: Feedback | None) -> None:
        size, batch = self.model.image_size, cameras.batch_size
        if image.shape != (batch, 3, size, size):
            raise ValueError(f"image must be [{batch}, 3, {size}, {size}], got {list(image.shape)}")
        if noise.latents.shape[:2] != (batch, cameras.num_views):
            raise ValueError(
                f"noise is for {tuple(noise.latents.shape[:2])} (samples, views), "
                f"cameras for {(batch, cameras.num_views)}"
            )
        if self.config.feedback_of == "another" and batch < 2:
            raise ValueError("sampler.feedback_of = another: a batch of one has no other object")
        if self.config.feedback_of == "truth" and truth is None:
            raise ConfigError("sampler.feedback_of = 'truth': only evaluation knows the true views; set own")


def last_step(steps: Iterator[SamplerStep], each: Callable[[SamplerStep], None] | None = None) -> SamplerStep:
    """Runs the loop to its end, calling `each` with every step."""
    step = None
    for step in steps:
        if each is not None:
            each(step)
    assert step is not None, "a sampler has at least one step"
    return step


class FiniteWatch:
    """Notes where NaN and infinity appear. A GPU is asked once, by `look`: it need not wait in every step."""

    def __init__(self) -> None:
        self._finite: list[Tensor] = []
        self._where: list[str] = []

    def __call__(self, x: Tensor, step: int, what: str) -> None:
        self._finite.append(torch.isfinite(x).all())
        self._where.append(f"{what} of step {step}")
        if x.device.type == "cpu":
            self.look()

    def look(self) -> None:
        """Raises NumericalError naming the first step and part that was not finite."""
        finite = torch.stack(self._finite).tolist()
        if not all(finite):
            raise NumericalError(
                f"NaN or infinity in the {self._where[finite.index(False)]}: the weights are damaged, do not match "
                "the config, or overflow the precision (try --dtype bf16 instead of fp16, or float32)"
            )


def noise_seed(seed: int, name: str) -> int:
    """Of an object's sampling noise: follows from the seed and the orbit's own name alone, so that neither the batch
    nor the list nor the number of processes changes what an object is sampled from."""
    return zlib.crc32(f"{seed} {Path(name).name}".encode())
