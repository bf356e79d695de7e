"""Validation during training: a few fixed objects, from fixed noise.

Shapes: B objects, V views. Pictures are compared on [0, 1].
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
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
from ouroboros3d.objective import HALF
from ouroboros3d.visualize import turntable, views_table

TURN = 10.0  # degrees a frame of the turntables
Pictures = dict[str, Image.Image | list[np.ndarray]]  # a list is a video's frames, uint8 [H, W, 3]


Scores = dict[str, list[float]]  # a number per object


@dataclass(frozen=True)
class Look:
    """What one process saw of some objects."""

    scores: Scores
    rows: list[tuple[str, list[Tensor]]]  # of the picture's table: uint8 [3, H, W] per view, on the CPU
    turns: list[np.ndarray]  # frames of all turntables beside each other, uint8


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
        chosen = spread_evenly(range(len(dataset)), objects or config.train.validate_objects)
        self.items = [dataset[i] for i in chosen]
        self.scorer = Scorer(models, config)

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], Pictures]:
        """Of all objects, in every process; each process looks at its share of them."""
        state = PartialState()
        parts = {"lgm": self._reconstructor} if self.config.objective.reconstruction != "none" else {}
        parts |= {"loop": self._loop} if self.config.objective.diffusion else {}
        share = np.array_split(np.arange(len(self.items)), state.num_processes)[state.process_index].tolist()
        size = self.config.model.batch_size(len(share))
        own = []
        with self._autocast():
            for start in range(0, len(share), size):
                items = [self.items[i] for i in share[start : start + size]]
                batch = OrbitBatch.collate(items).to(self.models.device)
                if self.config.train.compile:
                    torch.compiler.cudagraph_mark_step_begin()
                own.append({name: part(batch) for name, part in parts.items()})
        looks = gather_object(own)  # every process's, in order
        values, pictures = {}, {}
        for name in parts:
            found = [look[name] for look in looks]
            for key in found[0].scores:
                values[key] = torch.tensor([x for look in found for x in look.scores[key]]).nanmean().item()
            rows = [(kind, [view / 255 for view in views]) for look in found for kind, views in look.rows]
            pictures[name] = views_table(rows)
            frames = zip(*(look.turns for look in found), strict=True)
            pictures[f"{name}_turntable"] = [np.concatenate(beside, axis=1) for beside in frames]
        if "loop" in parts:
            values["delta_psnr"] = values["views_psnr"] - values["render_psnr"]
        return values, pictures

    def _autocast(self) -> contextlib.AbstractContextManager:
        """On a GPU validation runs in the precision of training; on a CPU, where half is no faster, in float32."""
        half = HALF.get(self.config.train.mixed_precision)
        on_gpu = self.models.device.type == "cuda" and half is not None
        return torch.autocast("cuda", half) if on_gpu else contextlib.nullcontext()

    def _reconstructor(self, batch: OrbitBatch) -> Look:
        lgm = self.models.lgm
        gaussians = self.scorer.clean(batch)
        rendering = self.scorer.renderer(gaussians, batch.cameras, batch.images.shape[-1])
        maps = feedback_maps(rendering, batch.cameras, self.config.model.conventions.coordinates_map)
        shape = rendering.alpha > SOLID
        inputs = lgm.input_views(batch.images.shape[1])
        unseen = [v for v in range(batch.images.shape[1]) if v not in inputs]
        values = self._scores("lgm_input", batch, maps["rgb"], shape, inputs)
        if unseen:
            values |= self._scores("lgm_unseen", batch, maps["rgb"], shape, unseen)
        return self._look(values, batch, {"3D": maps["rgb"], "coordinates": maps["ccm"]}, gaussians)

    def _loop(self, batch: OrbitBatch) -> Look:
        step, views = self.scorer.loop(batch, seed=0)
        rendered = step.feedback["rgb"]
        novel = list(range(1, views.shape[1]))
        values = self._scores("views", batch, views, None, novel)
        values |= self._scores("render", batch, rendered, step.rendering.alpha > SOLID, novel)
        made = {"views": views, "3D": rendered, "coordinates": step.feedback["ccm"]}
        return self._look(values, batch, made, step.gaussians)

    def _scores(self, name: str, batch: OrbitBatch, made: Tensor, shape: Tensor | None, index: list[int]) -> Scores:
        """Of the chosen views, [B, V, 3, H, W] in [0, 1], a number per object."""
        truth, alpha = batch.images * 0.5 + 0.5, batch.alpha
        made, truth, alpha, shape = (x if x is None else x[:, index] for x in (made, truth, alpha, shape))
        return {metric: value.tolist() for metric, value in self.scorer.scores(name, made, truth, alpha, shape).items()}

    def _look(self, scores: Scores, batch: OrbitBatch, made: dict[str, Tensor], gaussians: Gaussians) -> Look:
        """`made` [B, V, 3, H, W] in [0, 1] by name; truth and what was made of every object below each other."""
        c, size = self.config.turntable, batch.images.shape[-1]
        kinds = {name: to_bytes(x) for name, x in {"truth": batch.images * 0.5 + 0.5, **made}.items()}
        rows = [(name, list(images[i])) for i in range(len(batch.ids)) for name, images in kinds.items()]
        turns = [
            turntable(gaussians.scene(i), self.scorer.renderer, size, TURN, c.radius, c.fov, tilt=tilt)
            for i, tilt in enumerate(tilts(batch.cameras))
        ]
        return Look(scores, rows, [np.concatenate(frames, axis=1) for frames in zip(*turns, strict=True)])


def to_bytes(images: Tensor) -> Tensor:
    """Pictures in [0, 1] as bytes on the CPU: what processes send each other."""
    return (images.clamp(0, 1) * 255).round().byte().cpu()


def tilts(cameras: Cameras) -> list[float]:
    """Degrees that the up axis of each scene leans towards its first camera: the orbit's first three cameras span a
    plane, of which it is the normal."""
    first, second, third = cameras.c2w[:, :3, :3, 3].double().unbind(1)
    normal = torch.linalg.cross(second - first, third - first)
    normal = normal * normal[:, 1:2].sign()
    return [math.degrees(math.atan2(n[2], n[1])) for n in normal.tolist()]
