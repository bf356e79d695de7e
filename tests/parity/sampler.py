"""The loop: stage by stage on recorded inputs, and running free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ouroboros3d import diffusion
from ouroboros3d.cameras import Cameras
from ouroboros3d.config.schema import Config
from ouroboros3d.feedback import Feedback, coordinates_map, feedback_maps
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.sampler import Noise, Sampler
from tests.parity.fixtures import Arrays, Case, Fixtures, close, difference, pictures, relative


def check_sampler(f: Fixtures) -> Iterator[Case]:
    """`generate_images` of inference.py, stage by stage on recorded inputs, then free (quirks 10 to 15)."""
    a = f.arrays("sampler")
    cameras = Cameras(a["input.c2w"], a["input.intrinsics"])
    image = resize_condition(a["input.condition_image"], f.config.model.image_size)
    yield close("pieces.condition_resized", image, a["pieces.condition_resized"], 1e-6)
    yield from _check_stages(f, a, cameras, a["pieces.condition_resized"])
    noise = Noise(a["noise.condition_image"], a["noise.initial_latents"])
    yield from _check_free_run(f, "free", a, image, cameras, noise, f.config)


def resize_condition(image: Tensor, size: int) -> Tensor:
    """The release's resize of a condition image [B, 3, H, W] that does not come at the model's size, bilinear
    without antialiasing. Our front end delivers the right size, so only this check needs it."""
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False)


@torch.no_grad()
def _check_stages(f: Fixtures, a: Arrays, cameras: Cameras, image: Tensor) -> Iterator[Case]:
    """Every stage of every step, fed what the release's stage was fed."""
    models, config, kept = f.models, f.config, f.kept
    unet, batch = models.unet, cameras.batch_size
    latent_size = a["noise.initial_latents"].shape[-1]
    yield close("pieces.clip_embedding", models.svd.embed_image(image), a["pieces.clip_embedding"], 1e-4)
    noised = image + config.sampler.noise_augmentation * a["noise.condition_image"]
    yield close("pieces.condition_latent", models.svd.encode(noised), a["pieces.condition_latent"], 1e-4)

    schedule = diffusion.euler_schedule(config.sampler.scheduler, len(a["timesteps"]))
    for name in ("sigmas", "timesteps"):
        expected = a[name]
        scale = expected.abs().clamp(min=1e-6)
        yield close(f"{name} (relative)", getattr(schedule, name) / scale, expected / scale, 1e-6)
    yield relative("init_noise_sigma", schedule.init_noise_sigma, a["init_noise_sigma"].item(), 1e-6)

    rays = unet.encode_cameras(cameras, latent_size).repeat(2)
    scale = diffusion.guidance_ramp(*config.sampler.guidance, cameras.num_views)
    condition = a["steps.unet_input"][0, :, :, config.model.vae.latent_channels :]
    x = a["noise.initial_latents"] * schedule.init_noise_sigma
    size = config.model.image_size
    maps: Feedback = {name: torch.zeros(batch, cameras.num_views, 3, size, size) for name in unet.config.feedback}
    results: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        results.setdefault(name, []).append(value)

    for i, t in enumerate(schedule.timesteps):
        keep("timestep", t)
        keep("unet_input", torch.cat([schedule.scale_model_input(x, t).repeat(2, 1, 1, 1, 1), condition], dim=2))
        features = unet.encode_feedback(maps).repeat(2)
        given = (a["steps.unet_input"][i], a["steps.timestep"][i], a["encoder_hidden_states"], a["added_time_ids"])
        keep("unet_output", unet(*given, rays, features))
        keep("cfg_prediction", diffusion.guided(a["steps.unet_output"][i], scale))
        step = schedule.step(a["steps.cfg_prediction"][i], t, x)
        keep("pred_x0_latent", step.pred_original_sample)
        keep("prev_sample", step.prev_sample)
        decoded = models.svd.decode(a["steps.pred_x0_latent"][i])
        keep("decoded_x0", decoded[:, kept])
        keep("gaussians", models.lgm(decoded, cameras, a["steps.timestep"][i]).to_tensor())
        rendering = f.render(Gaussians.from_tensor(a["steps.gaussians"][i]), cameras, size)
        maps = feedback_maps(rendering, cameras, config.model.conventions.coordinates_map)
        maps = {name: maps[name] for name in unet.config.feedback}
        keep("render_rgb", rendering.rgb.clamp(0, 1)[:, kept])
        keep("render_depth", rendering.depth[:, kept])
        keep("position_map", coordinates_map(a["steps.render_depth"][i], cameras.views(kept)))
        x = a["steps.prev_sample"][i]

    for name, values in results.items():
        actual, expected = torch.stack(values), a[f"steps.{name}"]
        if name.startswith("render_"):
            yield from pictures(f"stage.{name}", actual, expected)
            continue
        # x starts at sigma_max times a unit normal, where float32 itself is coarser than 1e-4.
        unit = max(1.0, expected.abs().max().item()) if name == "prev_sample" else 1.0
        tolerance = {"gaussians": 2e-4, "position_map": 1e-6}.get(name, 1e-4)
        yield close(f"stage.{name}", actual, expected, tolerance * unit)


def _check_free_run(
    f: Fixtures, tag: str, recorded: dict[str, Tensor], image: Tensor, cameras: Cameras, noise: Noise, config: Config
) -> Iterator[Case]:
    """One whole run. Tolerance per array and step: ten times the recorded effect of scaling the noise by
    1 + 1e-6, at least 1e-4. Of an array's steps the one nearest to its tolerance is reported."""
    models, kept, sensitivity = f.models, f.kept, f.scalars("sensitivity")
    sampler = Sampler(models.unet, models.svd, models.lgm, f.render, config.model, config.sampler)
    calls: list[tuple] = []

    def note_call(_module, args: tuple, output: Tensor) -> None:
        calls.append((*args, output))

    hook = models.unet.register_forward_hook(note_call)
    try:
        steps = list(sampler(image, cameras, noise))
    finally:
        hook.remove()
    arrays = {
        "timestep": [c[1] for c in calls],
        "unet_input": [c[0] for c in calls],
        "unet_output": [c[-1] for c in calls],
        "cfg_prediction": [s.v for s in steps],
        "pred_x0_latent": [s.x0 for s in steps],
        "prev_sample": [s.latents for s in steps],
        "decoded_x0": [s.views[:, kept] for s in steps],
        "gaussians": [s.gaussians.to_tensor() for s in steps],
        "render_rgb": [s.feedback["rgb"][:, kept] for s in steps],
        "render_depth": [s.rendering.depth[:, kept] for s in steps],
        "position_map": [s.feedback["ccm"][:, kept] for s in steps],
    }
    for name, values in arrays.items():
        if f"steps.{name}" not in recorded:
            continue
        bound = sensitivity[f"steps.{name}"]
        cases = []
        for i, (value, expected) in enumerate(zip(values, recorded[f"steps.{name}"], strict=True)):
            per_step = bound["max_per_step"]
            tolerance = max(1e-4, 10 * (per_step[i] if i < len(per_step) else bound["max"]))
            cases.append(close(f"{tag}.{name} (step {i})", value, expected, tolerance))
        yield max(cases, key=lambda case: case.error / case.tolerance)
    for name, value in (("encoder_hidden_states", calls[0][2]), ("added_time_ids", calls[0][3])):
        if name in recorded:
            yield close(f"{tag}.{name}", value, recorded[name], 1e-4)

    finals = {
        "final_images": (steps[-1].views * 0.5 + 0.5).clamp(0, 1),
        "final_render": steps[-1].feedback["rgb"],
        "final_gaussians": steps[-1].gaussians.to_tensor(),
    }
    for name, value in finals.items():
        if name not in recorded:
            continue
        expected, bound = recorded[name], sensitivity[name]
        if value.ndim == 5 and expected.shape[1] != value.shape[1]:
            value = value[:, kept]
        least = {"final_images": (2e-3, 2e-4)}.get(name, (1e-4, 1e-4))
        yield close(f"{tag}.{name}", value, expected, max(10 * bound["max"], least[0]))
        mean = difference(value, expected).mean().item()
        yield Case(f"{tag}.{name} (mean)", mean, max(10 * bound["mean"], least[1]))


def check_sampler_system(f: Fixtures) -> Iterator[Case]:
    """`_generate_images` of the training system: the condition latent is a posterior sample (quirk 13), and
    feedback may skip steps or lack a map."""
    a = f.arrays("sampler_system")
    cameras = Cameras(a["input.c2w"], a["input.intrinsics"])
    image = f.arrays("cameras")["dataset.condition_image"].expand(cameras.batch_size, -1, -1, -1)
    noise = Noise(a["noise.condition_image"], a["noise.initial_latents"], a["noise.vae_condition"])
    sampler = replace(f.config.sampler, steps=len(a["steps.timestep"]))
    variants = {"": {}, "rgb_only": {"feedback": ["rgb"]}} | {
        f"every{n}": {"feedback_every": n} for n in a.numbers(r"every(\d+)\.")
    }
    for tag, changes in variants.items():
        recorded = a.under(tag) if tag else a
        if recorded:
            config = replace(f.config, sampler=replace(sampler, **changes))
            yield from _check_free_run(f, tag or "free", recorded, image, cameras, noise, config)
