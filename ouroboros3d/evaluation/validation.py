"""What a training run looks at on the way: a few fixed objects, from fixed noise.

Shapes: B objects, V views. Pictures are compared on [0, 1].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ouroboros3d.build import Models
from ouroboros3d.cameras import Cameras
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.evaluation.bootstrap import spread_evenly
from ouroboros3d.evaluation.metrics import SOLID
from ouroboros3d.evaluation.scorer import Scorer
from ouroboros3d.feedback import feedback_maps
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.visualize import turntable, views_table

TURN = 10.0  # degrees a frame of the turntables
Pictures = dict[str, Image.Image | list[np.ndarray]]  # a list is a video's frames, uint8 [H, W, 3]


def first_batch(dataset: Dataset | list[dict], count: int) -> OrbitBatch:
    """`count` items spread evenly over the dataset."""
    return OrbitBatch.collate([dataset[i] for i in spread_evenly(range(len(dataset)), count)])


class Validation:
    """`validation()` returns metrics and, by name, pictures and videos.

    Of the reconstructor on true views: scores at the input views and at the unseen ones between them. Of the loop
    (where the diffusion model is trained): scores of the generated novel views and of the 3D renders there, and the
    gap of their PSNR, the paper's delta. View 0 shows the input and is left out. A picture of each has truth, views,
    3D renders and coordinates maps; a turntable of each shows all objects beside each other.
    """

    def __init__(
        self,
        models: Models,
        config: Config,
        dataset: Dataset | list[dict],
        objects: int | None = None,
    ) -> None:
        """`objects` of the dataset are looked at, by default `train.validate_objects`."""
        self.models, self.config = models, config
        self.batch = first_batch(dataset, objects or config.train.validate_objects)
        self.scorer = Scorer(models, config)

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], Pictures]:
        self.batch = self.batch.to(self.models.device)
        values, pictures = {}, {}
        parts = {"lgm": self._reconstructor} if self.config.objective.reconstruction != "none" else {}
        parts |= {"loop": self._loop} if self.config.objective.diffusion else {}
        for name, part in parts.items():
            scores, made, gaussians = part()
            values |= scores
            pictures |= {name: self._picture(made), f"{name}_turntable": self._turntable(gaussians)}
        return values, pictures

    def _reconstructor(self) -> tuple[dict[str, float], dict[str, Tensor], Gaussians]:
        batch, lgm = self.batch, self.models.lgm
        gaussians = self.scorer.clean(batch)
        rendering = self.scorer.renderer(gaussians, batch.cameras, batch.images.shape[-1])
        maps = feedback_maps(rendering, batch.cameras, self.config.model.conventions.coordinates_map)
        shape = rendering.alpha > SOLID
        inputs = lgm.input_views(batch.images.shape[1])
        unseen = [v for v in range(batch.images.shape[1]) if v not in inputs]
        values = self._scores("lgm_input", maps["rgb"], shape, inputs)
        if unseen:
            values |= self._scores("lgm_unseen", maps["rgb"], shape, unseen)
        return values, {"3D": maps["rgb"], "coordinates": maps["ccm"]}, gaussians

    def _loop(self) -> tuple[dict[str, float], dict[str, Tensor], Gaussians]:
        batch = self.batch
        step, views = self.scorer.loop(batch, seed=0)
        rendered = step.feedback["rgb"]
        novel = list(range(1, views.shape[1]))
        values = self._scores("views", views, None, novel)
        values |= self._scores("render", rendered, step.rendering.alpha > SOLID, novel)
        values["delta_psnr"] = values["views_psnr"] - values["render_psnr"]
        return values, {"views": views, "3D": rendered, "coordinates": step.feedback["ccm"]}, step.gaussians

    def _scores(self, name: str, made: Tensor, shape: Tensor | None, index: list[int]) -> dict[str, float]:
        """Means over objects of the chosen views, [B, V, 3, H, W] in [0, 1]."""
        truth, alpha = self.batch.images * 0.5 + 0.5, self.batch.alpha
        made, truth, alpha, shape = (x if x is None else x[:, index] for x in (made, truth, alpha, shape))
        scores = self.scorer.scores(name, made, truth, alpha, shape)
        return {metric: value.nanmean().item() for metric, value in scores.items()}

    def _picture(self, made: dict[str, Tensor]) -> Image.Image:
        """Truth and what was made, [B, V, 3, H, W] in [0, 1] by name, of every validation object below each other."""
        kinds = {"truth": self.batch.images * 0.5 + 0.5, **made}
        return views_table(
            [(name, list(images[i])) for i in range(len(self.batch.ids)) for name, images in kinds.items()]
        )

    def _turntable(self, gaussians: Gaussians) -> list[np.ndarray]:
        """Frames of all objects beside each other, each turning about its own up axis."""
        c, size = self.config.turntable, self.batch.images.shape[-1]
        turns = [
            turntable(gaussians.scene(i), self.scorer.renderer, size, TURN, c.radius, c.fov, tilt=tilt)
            for i, tilt in enumerate(tilts(self.batch.cameras))
        ]
        return [np.concatenate(frames, axis=1) for frames in zip(*turns, strict=True)]


def tilts(cameras: Cameras) -> list[float]:
    """Degrees that the up axis of each scene leans towards its first camera: the orbit's first three cameras span a
    plane, of which it is the normal."""
    first, second, third = cameras.c2w[:, :3, :3, 3].double().unbind(1)
    normal = torch.linalg.cross(second - first, third - first)
    normal = normal * normal[:, 1:2].sign()
    return [math.degrees(math.atan2(n[2], n[1])) for n in normal.tolist()]
