"""A training step: losses, intermediate tensors and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.models.weights import to_release_names
from ouroboros3d.objective import Draws, Objective
from tests.parity.fixtures import Arrays, Case, Fixtures, close, pictures, relative


def check_train_step(f: Fixtures) -> Iterator[Case]:
    """`training_step`: losses, intermediates and the gradient norm of every parameter (quirks 21 to 23)."""
    a = f.arrays("train_step")
    for run, numbers in f.scalars("train_step").items():
        yield from _check_training_run(f, a, run, numbers)


def _check_training_run(f: Fixtures, a: Arrays, run: str, numbers: dict[str, Any]) -> Iterator[Case]:
    models, kept = f.models, f.kept
    objective = Objective(models.unet, models.svd, models.lgm, f.render, f.config)
    cameras = Cameras(a["input.c2w"], a["input.intrinsics"])
    images = f.arrays("cameras")["dataset.diffusion_images"].expand(cameras.batch_size, -1, -1, -1, -1)
    batch = OrbitBatch(images, cameras, ["scene"] * len(images))
    draws = Draws(
        vae_images=a[f"{run}.draw.vae_images"].unflatten(0, images.shape[:2]),
        latents=a[f"{run}.draw.latents"],
        condition_image=a[f"{run}.draw.condition_image"],
        vae_condition=a[f"{run}.draw.vae_condition"],
        condition_sigma=a[f"{run}.draw.cond_sigma_uniform"].flatten(),
        sigma=a[f"{run}.draw.sigma_uniform"].flatten(),
        dropout=a[f"{run}.draw.dropout_uniform"].flatten(),
        feedback=a[f"{run}.draw.feedback_uniform"].flatten()[0],
    )
    calls = {"unet": 0, "recon": 0}

    def counter(name: str) -> Callable:
        def count(*_args) -> None:
            calls[name] += 1

        return count

    networks = {"mv_model": models.unet, "recon_model": models.lgm}
    hooks = [models.unet.register_forward_hook(counter("unet")), models.lgm.register_forward_hook(counter("recon"))]
    keep: dict[str, Tensor] = {}
    try:
        with torch.set_grad_enabled("gradient_norms" in numbers):
            objective.record = keep.__setitem__
            losses = objective(batch, draws)
    finally:
        for hook in hooks:
            hook.remove()
    for name, count in calls.items():
        yield Case(f"{run}.{name}_calls (differs)", float(count != numbers[f"{name}_calls"]), 0)

    # Feedback passes through rendered pixels, of which one next to 1/255 may flip.
    loose = 1e-3 if "model_pred_1" in keep else 1e-4
    target = images * 0.5 + 0.5
    ours = {
        "train_loss": losses["diffusion"],
        "recon_loss": losses["reconstruction"],
        "recon_loss0": F.l1_loss(keep["render_x0"].clamp(0, 1), target),
        "recon_loss1": F.l1_loss(keep["render_x1"].clamp(0, 1), target),
        "total": losses["total"],
    }
    for name, value in ours.items():
        yield relative(f"{run}.{name}", value, numbers[name], loose)

    scaling = f.config.model.vae.scaling_factor
    tensors = {
        "latents": (keep["clean"], 1e-4),
        "conditional_latents_scaled": (keep["condition_latent"] * scaling, 1e-4),
        "unet_input": (keep["unet_input"], 1e-4),
        "timesteps": (keep["c_noise"], 1e-5),
        "encoder_hidden_states": (keep["context"], 1e-4),
        "added_time_ids": (keep["time_ids"], 1e-5 * keep["time_ids"].abs().max().item()),
        "model_pred_0": (keep["model_pred_0"], 1e-4),
        "model_pred_1": (keep.get("model_pred_1"), 1e-3),
        "decoded_x0": (keep["decoded_x0"][:, kept], 1e-4),
        "total": (losses["total"], loose * abs(numbers["total"])),
    }
    for name, (value, tolerance) in tensors.items():
        if f"{run}.{name}" in a:
            yield close(f"{run}.{name}", value, a[f"{run}.{name}"], tolerance)
    for name in ("render_x1", "render_x0", "position_map"):
        if f"{run}.{name}" in a:
            # Up to three float32 networks come before: changing x0 by 1e-6 moves 0.1 % of the pixels by 1e-4.
            value = keep[name][:, kept].clamp(0, 1)
            yield from pictures(f"{run}.{name}", value, a[f"{run}.{name}"], most=1e-3, every=2e-2)

    if "gradient_norms" in numbers:
        parameters = [p for m in networks.values() for p in m.parameters()]
        gradients = iter(torch.autograd.grad(losses["total"], parameters, allow_unused=True))
        norms = {}
        for prefix, module in networks.items():
            own = {
                name: torch.zeros(()) if g is None else g.norm()
                for (name, _), g in zip(module.named_parameters(), gradients, strict=False)
            }
            own = to_release_names(own, f.config.model.multiview.adapter.res_blocks)
            norms |= {f"{prefix}.{name}": norm.item() for name, norm in own.items()}
        yield from _check_norms(run, norms, numbers["gradient_norms"])


def _check_norms(run: str, norms: dict[str, float], expected: dict[str, float]) -> Iterator[Case]:
    yield Case(f"{run}.gradient_norms (names that differ)", float(len(norms.keys() ^ expected.keys())), 0)
    # Below this is rounding: gradients that are zero in exact arithmetic, as of biases before a norm.
    rounding = 1e-5 * max(expected.values())
    errors = {name: abs(norms.get(name, math.inf) - e) / max(e, rounding) for name, e in expected.items()}
    worst = max(errors, key=errors.get)
    yield Case(f"{run}.gradient_norms (relative, {worst})", errors[worst], 0.02)
