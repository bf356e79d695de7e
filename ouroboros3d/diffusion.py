"""EDM preconditioning in SVD's v-prediction form, noise levels, guidance and conditioning dropout.

Everything is written in sigma, the standard deviation of the noise on the scaled latents; shapes broadcast.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from ouroboros3d.config.schema import SchedulerConfig


def c_in(sigma: Tensor) -> Tensor:
    """Input scaling 1 / sqrt(sigma^2 + 1) (EDM table 1, sigma_data = 1)."""
    return (sigma**2 + 1) ** -0.5


def c_skip(sigma: Tensor) -> Tensor:
    """Skip scaling 1 / (sigma^2 + 1)."""
    return 1 / (sigma**2 + 1)


def c_out(sigma: Tensor) -> Tensor:
    """Output scaling -sigma / sqrt(sigma^2 + 1): the network predicts v."""
    return -sigma * (sigma**2 + 1) ** -0.5


def c_noise(sigma: Tensor) -> Tensor:
    """The timestep both networks see, ln(sigma) / 4."""
    return 0.25 * sigma.log()


def denoised(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """x0 = c_skip x + c_out F, the predicted clean latents (EDM eq. 7)."""
    return c_skip(sigma) * x + c_out(sigma) * v


def loss_weight(sigma: Tensor) -> Tensor:
    """lambda(sigma) = (1 + sigma^2) / sigma^2 on the squared error of x0, which makes it 1 on v."""
    return (1 + sigma**2) / sigma**2


def lognormal_sigma(uniform: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    """sigma with ln sigma ~ N(mean, std^2), by inverse CDF from uniform draws in [0, 1)."""
    normal = torch.erfinv(2 * (uniform * (1 - 2e-7) + 1e-7) - 1) * 2**0.5
    return torch.exp(mean + std * normal)


def mixture_sigma(
    uniform: Tensor, levels: Sequence[float], shares: Sequence[float], level_std: float, mean: float, std: float
) -> Tensor:
    """sigma of a mixture, from one uniform draw in [0, 1) per sample: with probability `shares[i]`, ln sigma ~
    N(ln levels[i], level_std^2); otherwise ln sigma ~ N(mean, std^2). Without shares it is `lognormal_sigma`."""
    edges = torch.tensor([0.0, *itertools.accumulate(shares), 1.0], dtype=torch.float64, device=uniform.device)
    part = torch.bucketize(uniform.double(), edges[1:-1].contiguous(), right=True)
    low, high = edges[part], edges[part + 1]
    within = ((uniform - low) / (high - low)).clamp(0, 1).to(uniform.dtype)  # uniform again, inside its part
    means = torch.tensor([*(math.log(s) for s in levels[: len(shares)]), mean]).to(uniform)
    stds = torch.tensor([level_std] * len(shares) + [std]).to(uniform)
    return lognormal_sigma(within, means[part], stds[part])


def guidance_ramp(low: float, high: float, views: int, device: torch.device | None = None) -> Tensor:
    """[1, V, 1, 1, 1] guidance scale per frame, linear from the input view to the last."""
    return torch.linspace(low, high, views, device=device)[None, :, None, None, None]


def guided(v: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance of a batch [2B, ...] that holds the unconditional half first."""
    unconditional, conditional = v.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def dropout_masks(uniform: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Which samples keep (image embedding, image latent), two bool [B], from one uniform draw each.

    As in InstructPix2Pix: the embedding is dropped for u < 2p, the latent for p <= u < 3p, so both for p <= u < 2p.
    """
    keep_embedding = uniform >= 2 * rate
    keep_latent = (uniform < rate) | (uniform >= 3 * rate)
    return keep_embedding, keep_latent


def euler_schedule(config: SchedulerConfig, steps: int, device: torch.device | str = "cpu") -> EulerDiscreteScheduler:
    """SVD's sampler: Euler on Karras sigmas (EDM eq. 5) or a geometric series, continuous timesteps ln(sigma) / 4,
    v-prediction.

    One scheduler serves one sampling run: diffusers' keeps the step index inside.
    """
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=config.spacing == "karras",
        use_exponential_sigmas=config.spacing == "exponential",
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
    )
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps.to(device)  # the sigmas stay on the CPU, so that no step waits for them
    scheduler.set_begin_index(0)
    return scheduler
