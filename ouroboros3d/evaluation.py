"""Validation on fixed objects and seeds: pictures and metrics of the loop and of the reconstructor alone."""

from __future__ import annotations

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import Dataset

from ouroboros3d.build import Models, build_renderer, build_sampler
from ouroboros3d.config import Config
from ouroboros3d.metrics import psnr
from ouroboros3d.objective import OrbitBatch
from ouroboros3d.sampler import last_step
from ouroboros3d.visualize import labelled_grid


def first_batch(dataset: Dataset | list[dict], count: int) -> OrbitBatch:
    """`count` items spread evenly over the dataset."""
    count = min(count, len(dataset))
    return OrbitBatch.collate([dataset[i * len(dataset) // count] for i in range(count)])


class Validation:
    """`validation()` returns metrics and pictures by name.

    Of the reconstructor on true views: PSNR at the input views and at the unseen ones between them. Of the loop
    (where the diffusion model is trained): PSNR of the generated novel views and of the 3D renders there, full and
    foreground, and their gap, the paper's delta. View 0 shows the input and is left out.
    """

    def __init__(
        self,
        models: Models,
        config: Config,
        dataset: Dataset | list[dict],
        device: torch.device,
        objects: int | None = None,
    ) -> None:
        """`objects` of the dataset are looked at, by default `train.validate_objects`."""
        self.models, self.config, self.device = models, config, device
        self.batch = first_batch(dataset, objects or config.train.validate_objects).to(device)
        self.renderer = build_renderer(config)

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], dict[str, Image]]:
        values, pictures = {}, {}
        if self.config.objective.reconstruction != "none":
            scores, pictures["lgm"] = self._reconstructor()
            values |= scores
        if self.config.objective.diffusion:
            scores, pictures["loop"] = self._loop()
            values |= scores
        return values, pictures

    def repeat_baseline(self) -> dict[str, float]:
        """Scores of showing the input view for every novel one."""
        truth = self.batch.images * 0.5 + 0.5
        return self._scores("repeat", truth[:, :1].expand_as(truth), list(range(1, truth.shape[1])))

    def _reconstructor(self) -> tuple[dict[str, float], Image]:
        batch, lgm = self.batch, self.models.lgm
        gaussians = lgm(batch.images, batch.cameras, batch.images.new_zeros(()))
        rendered = self.renderer(gaussians, batch.cameras, batch.images.shape[-1]).rgb.clamp(0, 1)
        inputs = lgm.select(batch.images.shape[1])
        unseen = [v for v in range(batch.images.shape[1]) if v not in inputs]
        values = self._scores("lgm_input", rendered, inputs) | self._scores("lgm_unseen", rendered, unseen)
        return values, self._picture({"3D": rendered})

    def _loop(self) -> tuple[dict[str, float], Image]:
        batch = self.batch
        sampler = build_sampler(self.models, self.config)
        noise = sampler.draw_noise(list(range(len(batch.images))), batch.images.shape[1]).to(self.device)
        step = last_step(sampler(batch.images[:, 0], batch.cameras, noise))
        views, rendered = (step.views * 0.5 + 0.5).clamp(0, 1), step.rendering.rgb.clamp(0, 1)
        novel = list(range(1, views.shape[1]))
        values = self._scores("views", views, novel) | self._scores("render", rendered, novel)
        values["delta_psnr"] = abs(values["views_psnr"] - values["render_psnr"])
        return values, self._picture({"views": views, "3D": rendered})

    def _scores(self, name: str, images: Tensor, index: list[int]) -> dict[str, float]:
        """Means over objects of the chosen views, [B, V, 3, H, W] in [0, 1]."""
        truth = (self.batch.images * 0.5 + 0.5)[:, index]
        scores = {f"{name}_psnr": psnr(images[:, index], truth)}
        if self.batch.alpha is not None:
            scores[f"{name}_psnr_foreground"] = psnr(images[:, index], truth, self.batch.alpha[:, index] > 0.5)
        return {key: value.mean().item() for key, value in scores.items()}

    def _picture(self, made: dict[str, Tensor]) -> Image:
        """Truth and what was made, [B, V, 3, H, W] in [0, 1] by name, of every validation object below each other."""
        kinds = {"truth": self.batch.images * 0.5 + 0.5, **made}
        objects, views = self.batch.images.shape[:2]
        rows = [(name, list(images[i])) for i in range(objects) for name, images in kinds.items()]
        return labelled_grid(rows, [f"view {v}" for v in range(views)], cell=min(self.batch.images.shape[-1], 128))
