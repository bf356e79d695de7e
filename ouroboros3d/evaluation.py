"""Validation on fixed objects and seeds: pictures and metrics of the loop and of the reconstructor alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ouroboros3d.build import Models, build_renderer, build_sampler
from ouroboros3d.config import Config
from ouroboros3d.metrics import psnr
from ouroboros3d.objective import OrbitBatch
from ouroboros3d.sampler import last_step
from ouroboros3d.visualize import comparison_grid, save_image


def first_batch(dataset: Dataset, count: int) -> OrbitBatch:
    """`count` items spread evenly over the dataset."""
    count = min(count, len(dataset))
    return OrbitBatch.collate([dataset[i * len(dataset) // count] for i in range(count)])


class Validation:
    """`validation(step, folder)` writes `validation/<step>_*.png` and returns metrics.

    Of the reconstructor on true views: PSNR at the input views and at the unseen ones between them. Of the loop
    (where the diffusion model is trained): PSNR of the generated novel views and of the 3D renders there, full and
    foreground, and their gap, the paper's delta. View 0 shows the input and is left out.
    """

    def __init__(self, models: Models, config: Config, dataset: Dataset, device: torch.device) -> None:
        self.models, self.config, self.device = models, config, device
        self.batch = first_batch(dataset, config.train.validate_objects).to(device)
        self.renderer = build_renderer(config)

    @torch.no_grad()
    def __call__(self, step: int, folder: Path) -> dict[str, float]:
        folder = Path(folder) / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        values = {}
        if self.config.objective.reconstruction != "none":
            values |= self._reconstructor(folder / f"{step:07d}_lgm.png")
        if self.config.objective.diffusion:
            values |= self._loop(folder / f"{step:07d}_loop.png")
        return values

    def _reconstructor(self, path: Path) -> dict[str, float]:
        batch, lgm = self.batch, self.models.lgm
        gaussians = lgm(batch.images, batch.cameras, batch.images.new_zeros(()))
        rendered = self.renderer(gaussians, batch.cameras, batch.images.shape[-1]).rgb.clamp(0, 1)
        inputs = lgm.select(batch.images.shape[1])
        unseen = [v for v in range(batch.images.shape[1]) if v not in inputs]
        self._picture(path, None, rendered)
        return self._scores("lgm_input", rendered, inputs) | self._scores("lgm_unseen", rendered, unseen)

    def _loop(self, path: Path) -> dict[str, float]:
        batch = self.batch
        sampler = build_sampler(self.models, self.config)
        noise = sampler.draw_noise(list(range(len(batch.images))), batch.images.shape[1]).to(self.device)
        step = last_step(sampler(batch.images[:, 0], batch.cameras, noise))
        views, rendered = (step.views * 0.5 + 0.5).clamp(0, 1), step.rendering.rgb.clamp(0, 1)
        self._picture(path, views, rendered)
        novel = list(range(1, views.shape[1]))
        values = self._scores("views", views, novel) | self._scores("render", rendered, novel)
        return values | {"delta_psnr": abs(values["views_psnr"] - values["render_psnr"])}

    def _scores(self, name: str, images: Tensor, index: list[int]) -> dict[str, float]:
        """Means over objects of the chosen views, [B, V, 3, H, W] in [0, 1]."""
        truth = (self.batch.images * 0.5 + 0.5)[:, index]
        scores = {f"{name}_psnr": psnr(images[:, index], truth)}
        if self.batch.alpha is not None:
            scores[f"{name}_psnr_foreground"] = psnr(images[:, index], truth, self.batch.alpha[:, index] > 0.5)
        return {key: value.mean().item() for key, value in scores.items()}

    def _picture(self, path: Path, views: Tensor | None, rendered: Tensor) -> None:
        """Truth, views and 3D of every validation object below each other."""
        from PIL import Image

        truth = self.batch.images * 0.5 + 0.5
        grids = [
            comparison_grid(truth[i], truth[i] if views is None else views[i], rendered[i], cell=64)
            for i in range(len(truth))
        ]
        picture = Image.new("RGB", (max(g.width for g in grids), sum(g.height for g in grids)), "white")
        top = 0
        for grid in grids:
            picture.paste(grid, (0, top))
            top += grid.height
        save_image(path, picture)
