"""The Python interface: one model on one device, pictures in, 3D objects out.

    pipe = Ouroboros3DPipeline.from_pretrained("checkpoints/small")
    output = pipe("testset/armchair.webp", elevation=20, seed=0)
    output[0].save("chair.ply")

It drives the one sampler of sampler.py. Shapes: B pictures, V views, H = W pixels.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ouroboros3d.build import (
    Models,
    build_cameras,
    build_models,
    build_renderer,
    build_sampler,
    check_renderer,
    save_models,
)
from ouroboros3d.cameras import Cameras
from ouroboros3d.config.checks import check_config
from ouroboros3d.config.loading import as_override, load_config
from ouroboros3d.config.schema import BACKGROUNDS, Config
from ouroboros3d.devices import DTYPE_NAMES, gpu_memory, inference_dtype, pick_device
from ouroboros3d.errors import ConfigError
from ouroboros3d.export.object3d import Object3D, Step3D, step3d
from ouroboros3d.export.output import Ouroboros3DOutput
from ouroboros3d.files import config_beside, locate
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.inference.candidates import SHARE, Candidate, candidates, elevation_grid, score, step_at
from ouroboros3d.inference.photo import load_condition_image
from ouroboros3d.interfaces import Renderer, Rendering
from ouroboros3d.models.weights import find_checkpoint
from ouroboros3d.needs import announce, is_large
from ouroboros3d.sampler import SamplerStep

log = logging.getLogger(__name__)

DTYPES = dict(zip(DTYPE_NAMES, (torch.float32, torch.bfloat16, torch.float16), strict=True))
RELEASE = ("model.pretrained.svd=stabilityai/stable-video-diffusion-img2vid", "model.conventions.renderer=gsplat")

Picture = str | Path | Image.Image | np.ndarray | Tensor
Callback = Callable[["Ouroboros3DPipeline", int, float, dict[str, Any]], Any]


class Ouroboros3DPipeline:
    """One model on one device. `from_pretrained` makes it, calling it makes objects of pictures."""

    def __init__(self, models: Models, config: Config, device: str | torch.device = "cpu") -> None:
        """`models` with their weights, which move to `device`. Raises DeviceError, ConfigError."""
        self.config, self.models = config, models
        self.sampler = build_sampler(models, config)
        self.progress_bar_config: dict[str, Any] = {}
        self.to(device)

    # ------------------------------------------------------------ loading and saving

    @classmethod
    def from_config(
        cls, config: Config, device: str | torch.device | None = None, torch_dtype: torch.dtype | str | None = None
    ) -> Ouroboros3DPipeline:
        """The configured model with the weights of `model.pretrained.checkpoint`.

        `device` None is the machine's best; `torch_dtype` None is what `sampler.dtype` says.
        Raises DeviceError, ConfigError, CheckpointError.
        """
        device = pick_device(device)
        dtype = DTYPES.get(torch_dtype, torch_dtype) if isinstance(torch_dtype, str) else torch_dtype
        if dtype is None:
            dtype = inference_dtype(config.sampler.dtype, device)
        if not isinstance(dtype, torch.dtype):
            raise ConfigError(f"torch_dtype = {torch_dtype!r}: must be a torch.dtype or one of {', '.join(DTYPES)}")
        if config.model.pretrained.checkpoint is None:
            raise ConfigError("model.pretrained.checkpoint is not set: name a checkpoint folder with --ckpt")
        check_renderer(config, device)
        if is_large(config) and device.type != "mps":
            print(announce(config, device, dtype), file=sys.stderr)
        return cls(build_models(config.model).to("cpu", dtype), config, device)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        config: Config | str | Path | None = None,
        overrides: Sequence[str] = (),
    ) -> Ouroboros3DPipeline:
        """A model from a folder or hub id: one that `save_pretrained` wrote (either layout, such as
        checkpoints/small), a run of train.py, or the release's `mv_model_unet.pth` and `recon_model.pth`.

        The dimensions come from `config` (a Config or a YAML file), else from the folder's config.yaml, else they are
        the release's, whose VAE and image encoder are SVD's: `overrides=["model.pretrained.svd=FOLDER"]` names a local
        copy, as any `key=value` of the configuration. `torch_dtype` and `device` as in `from_config`, the same errors.
        """
        pick_device(device)  # before anything is fetched
        local = locate(Path(source).expanduser())
        folder = find_checkpoint(local if local.exists() else source)
        if isinstance(config, Config):
            if overrides:
                raise ConfigError(
                    "overrides: a Config object takes none; set its values, or name a YAML file as config"
                )
            config = copy.deepcopy(config)
            config.model.pretrained.checkpoint = str(folder)
        else:
            key = "model.pretrained.checkpoint"
            if any(text.startswith(f"{key}=") for text in overrides):
                raise ConfigError(f"{key}: from_pretrained's first argument names it; leave it out of the overrides")
            path = config if config is not None else config_beside(local) or config_beside(folder)
            layers = [*(RELEASE if path is None else ()), *overrides, as_override(key, folder)]
            config = load_config(path, layers)
        return cls.from_config(config, device, torch_dtype)

    def save_pretrained(self, folder: str | Path, layout: str = "diffusers") -> None:
        """Writes what `from_pretrained` reads: the networks and config.yaml.

        `layout` "diffusers" makes a folder per part and model_index.json, "release" the release's two files with vae
        and image_encoder beside them. Raises OutputError.
        """
        if layout not in ("diffusers", "release"):
            raise ValueError(f"layout must be 'diffusers' or 'release', got {layout!r}")
        save_models(folder, self.models, self.config, layout, frozen=True)

    # ------------------------------------------------------------ where it runs

    def to(self, *where: str | torch.device | torch.dtype) -> Ouroboros3DPipeline:
        """Moves to a device, casts to a dtype, or both. Raises DeviceError, ConfigError."""
        dtypes = [w for w in where if isinstance(w, torch.dtype)]
        for device in (w for w in where if not isinstance(w, torch.dtype)):
            self.device = pick_device(device)
            check_renderer(self.config, self.device)
        with gpu_memory():
            offload = self.config.sampler.offload and self.device.type != "cpu"
            self.models.to(self.device, dtypes[-1] if dtypes else None, offload)
        renderer = build_renderer(self.config)
        self.sampler.renderer = _on_cpu(renderer) if self.device.type == "mps" else renderer
        return self

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> Ouroboros3DPipeline:
        """As `sampler.offload=true`: a network waits in the CPU's memory and moves to `device` (None is the machine's
        best) while it works. Raises DeviceError, ConfigError."""
        self.config = replace(self.config, sampler=replace(self.config.sampler, offload=True))
        return self.to(pick_device(device))

    @property
    def dtype(self) -> torch.dtype:
        return self.models.unet.unet.dtype

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bar of the steps, e.g. disable=True."""
        self.progress_bar_config = options

    # ------------------------------------------------------------ generating

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | Sequence[Picture],
        num_inference_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        elevation: float | Sequence[float] | str | None = None,
        *,
        num_candidates: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        remove_background: bool | str = True,
        border: float = 0.2,
        output_type: str = "pil",
        return_history: bool = False,
        callback_on_step_end: Callback | None = None,
    ) -> Ouroboros3DOutput:
        """One object per picture. What is None has the configuration's value.

        image: a file, a PIL image or an array [H, W], [H, W, 3] or [H, W, 4] (uint8, or float in [0, 1]),
            or what `prepare_image` returned; or a list of these.
        num_inference_steps: steps of the loop.
        guidance_scale: of the first and the last view; a number g means [1, g].
        elevation: degrees from which the camera looks down on the object, one for all or one per picture; "auto" tries
            four of the range that the model was trained on, as candidates.
        num_candidates: samples from so many seeds, from `seed` on, of which the best is finished, see
            `inference.candidates`; the object is the one that its own seed, in `output[i].seed`, gives alone.
        seed: of the noise, one for all or one per picture; a picture's result does not depend on the others.
        generator: draws the seeds instead, one after the other (a list: each its picture's).
        remove_background: True, False or "white"; border: see `inference.photo.load_condition_image`.
        output_type: "pil" or "pt", see Ouroboros3DOutput.
        return_history: keep every step, as the recursion player shows it (on the CPU, at most 256 pixels).
        callback_on_step_end: called as f(pipe, index, sigma, {"step": SamplerStep}) after each step of each batch;
            an exception in it ends the loop.

        Raises ValueError for arguments that do not fit, ImageError, ConfigError, NumericalError, DeviceError.
        """
        images = _as_list(image)
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be 'pil' or 'pt', got {output_type!r}")
        seeds = self._seeds(seed, generator, len(images))
        auto, given = elevation == "auto", None if elevation == "auto" else elevation
        elevations = _per_picture("elevation", given, self.config.cameras.elevation, len(images))
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        config = self.configured(num_inference_steps, guidance_scale, elevations)
        pictures = [self.prepare_image(picture, remove_background, border) for picture in images]
        best: list[Candidate] = []
        if auto or num_candidates > 1:
            starts = zip(pictures, seeds, elevations, strict=True)
            best = [self.choose(p, s, "auto" if auto else e, num_candidates, config) for p, s, e in starts]
            seeds, elevations = [c.seed for c in best], [c.elevation for c in best]
        self._warn_of(elevations)
        every_step = return_history or callback_on_step_end is not None
        finished = [c.result for c in best if c.result is not None]
        if finished and not every_step:
            return Ouroboros3DOutput(finished, output_type)
        objects: list[Object3D] = []
        size = self.batch_size(len(images))
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            batch, cameras = torch.stack(pictures[part]), self.cameras(elevations[part])
            history: list[list[Step3D]] = [[] for _ in batch]
            for step in self._with_bar(self.steps(batch, seeds[part], cameras, config, every_step), config):
                if return_history:
                    for i, steps in enumerate(history):
                        steps.append(step3d(step, i))
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step.index, step.sigma, {"step": step})
            objects += [
                self.object3d(step, i, cameras, batch[i], elevations[start + i], tuple(history[i]), seeds[start + i])
                for i in range(len(batch))
            ]
        return Ouroboros3DOutput(objects, output_type)

    @torch.no_grad()
    def choose(
        self,
        picture: Tensor,
        seed: int,
        elevation: float | str,
        count: int,
        config: Config | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> Candidate:
        """The best of `count` seeds, from `seed` on, at the elevation or ("auto") at each of four.

        All run the first steps of the loop, in one batch where the conventions allow it, and are scored there without
        the truth. `picture` as `prepare_image` returns it. What `after_step` raises ends the choice.
        """
        config = config or self.config
        auto = elevation == "auto"
        grid = elevation_grid(*config.cameras.trained_elevations) if auto else [float(elevation)]
        stop, found = math.ceil(SHARE * config.sampler.taken_steps), []
        starts = candidates(seed, grid, count)
        size = self.batch_size(len(starts))
        for part in (starts[i : i + size] for i in range(0, len(starts), size)):
            images = picture.expand(len(part), -1, -1, -1)
            cameras = self.cameras([c.elevation for c in part])
            steps = self.steps(images, [c.seed for c in part], cameras, config)
            if after_step is not None:
                steps = _called_after(steps, after_step)
            step = step_at(steps, stop)
            for i, (c, s) in enumerate(zip(part, score(step, images).tolist(), strict=True)):
                ended = step.index == step.total - 1
                result = self.object3d(step, i, cameras, picture, c.elevation, (), c.seed) if ended else None
                found.append(replace(c, score=s, result=result))
        return max(found, key=lambda c: c.score)

    def steps(
        self,
        images: Tensor,
        seeds: Sequence[int],
        cameras: Cameras | None = None,
        config: Config | None = None,
        every_step: bool = True,
    ) -> Iterator[SamplerStep]:
        """The steps of the loop for images [B, 3, H, W] in [-1, 1] at `model.image_size`, as they come.

        `cameras` [B, V] and `config` are the pipeline's unless given. Raises NumericalError, DeviceError.
        """
        sampler = copy.copy(self.sampler)
        sampler.config = (config or self.config).sampler
        cameras = (cameras or self.cameras([self.config.cameras.elevation] * len(images))).to(self.device)
        noise = sampler.draw_noise(list(seeds), cameras.num_views).to(self.device)
        with gpu_memory():
            yield from sampler(images.to(self.device), cameras, noise, every_step)

    def prepare_image(self, picture: Picture, remove_background: bool | str = True, border: float = 0.2) -> Tensor:
        """[3, H, W] in [-1, 1]: what the networks see of a picture. Raises ImageError."""
        size, background = self.config.model.image_size, BACKGROUNDS[self.config.data.background]
        if not isinstance(picture, Tensor):
            return load_condition_image(picture, size, remove_background, border, background).tensor
        if picture.shape != (3, size, size):
            raise ValueError(f"a tensor must be [3, {size}, {size}] in [-1, 1], got {list(picture.shape)}")
        return picture.float()

    def cameras(self, elevations: Sequence[float]) -> Cameras:
        """[B, V] the generated orbits of inputs seen from these elevations (degrees)."""
        orbits = [
            build_cameras(replace(self.config, cameras=replace(self.config.cameras, elevation=float(e))))
            for e in elevations
        ]
        return Cameras(torch.cat([o.c2w for o in orbits]), torch.cat([o.K for o in orbits])).to(self.device)

    def batch_size(self, pictures: int) -> int:
        """How many of so many pictures run together."""
        return self.config.model.batch_size(pictures)

    def object3d(
        self,
        step: SamplerStep,
        index: int,
        cameras: Cameras,
        image: Tensor,
        elevation: float,
        history: tuple[Step3D, ...] = (),
        seed: int = 0,
    ) -> Object3D:
        """Object `index` of the batch as the step left it; `image` [3, H, W] in [-1, 1]."""
        return Object3D(
            gaussians=step.gaussians.scene(index),
            elevation=elevation,
            seed=seed,
            cameras=cameras.scenes([index]),
            views=_pictures(step.views[index] * 0.5 + 0.5),
            renders=_pictures(step.rendering.rgb[index]),
            image=_pictures(image * 0.5 + 0.5),
            history=history,
            renderer=self.sampler.renderer,
            turntable=self.config.turntable,
        )

    # ------------------------------------------------------------ arguments

    def configured(
        self, steps: int | None, guidance: float | Sequence[float] | None, elevations: Sequence[float]
    ) -> Config:
        """The configuration with these values, checked. Raises ConfigError."""
        sampler = self.config.sampler
        if steps is not None:
            sampler = replace(sampler, steps=steps)
        if guidance is not None:
            pair = [1.0, guidance] if isinstance(guidance, (int, float)) else list(guidance)
            sampler = replace(sampler, guidance=[float(g) for g in pair])
        config = replace(self.config, sampler=sampler)
        for elevation in elevations:
            check_config(replace(config, cameras=replace(config.cameras, elevation=float(elevation))))
        return config

    def _seeds(self, seed: int | Sequence[int] | None, generator: Any, count: int) -> list[int]:
        if generator is None:
            return [int(s) for s in _per_picture("seed", seed, self.config.sampler.seed, count)]
        if seed is not None:
            raise ValueError("give a seed or a generator, not both")
        generators = _per_picture("generator", generator, None, count)
        return [int(torch.randint(2**63 - 1, (), generator=g, device=g.device)) for g in generators]

    def _warn_of(self, elevations: Sequence[float]) -> None:
        low, high = self.config.cameras.trained_elevations
        outside = sorted({e for e in elevations if not low <= e <= high})
        if outside:
            said = ", ".join(f"{e:g}" for e in outside)
            log.warning("elevation %s: the model was trained on %g to %g degrees; expect worse", said, low, high)

    def _with_bar(self, steps: Iterator[SamplerStep], config: Config) -> Iterator[SamplerStep]:
        with tqdm(
            **{"total": config.sampler.taken_steps, "unit": "step", "file": sys.stderr} | self.progress_bar_config
        ) as bar:
            for step in steps:
                bar.set_postfix_str(f"sigma {step.sigma:.3g}", refresh=False)
                bar.total = step.total  # fewer with sampler.last_sigma
                bar.update(step.index + 1 - bar.n)
                yield step


def _on_cpu(renderer: Renderer) -> Renderer:
    """The renderer for tensors of a device that it does not know: renders on the CPU and moves the result back."""

    def render(gaussians: Gaussians, cameras: Cameras, size: int, **options: Any) -> Rendering:
        return renderer(gaussians.to("cpu"), cameras.to("cpu"), size, **options).to(gaussians.means.device)

    return render


def _as_list(image: Picture | Sequence[Picture]) -> list[Picture]:
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise ValueError("there is no picture: the list is empty")
    return images


def _per_picture(name: str, value: Any, default: Any, count: int) -> list[Any]:
    value = default if value is None else value
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{count} pictures, but {len(values)} of {name}; give one for all or one for each")
    return values


def _called_after(steps: Iterator[SamplerStep], call: Callable[[], None]) -> Iterator[SamplerStep]:
    for step in steps:
        call()
        yield step


def _pictures(x: Tensor) -> Tensor:
    return x.detach().float().clamp(0, 1).cpu()
