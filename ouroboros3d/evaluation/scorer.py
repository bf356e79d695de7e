"""Scores the loop's and the reconstructor's results against true pictures, for validation and evaluation.

Shapes: B objects, V views. Pictures are compared on [0, 1].
"""

from __future__ import annotations

from torch import Tensor

from ouroboros3d.build import Models, build_renderer, build_sampler
from ouroboros3d.cameras import Cameras
from ouroboros3d.config.schema import BACKGROUNDS, Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.evaluation.metrics import SOLID, picture_silhouette, score_images
from ouroboros3d.feedback import Feedback, feedback_maps
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.models.lpips import Lpips
from ouroboros3d.sampler import SamplerStep, last_step, noise_seed


class Scorer:
    """One model and its renderer, whose weights may change from call to call."""

    def __init__(self, models: Models, config: Config, lpips: Lpips | None = None) -> None:
        self.models, self.lpips, self.size = models, lpips, config.model.image_size
        self.sampler, self.renderer = build_sampler(models, config), build_renderer(config)
        self.background = BACKGROUNDS[config.data.background]

    def loop(self, batch: OrbitBatch, seed: int) -> tuple[SamplerStep, Tensor]:
        """The last step of the loop from each object's first view, and its views [B, V, 3, H, W] in [0, 1]. The noise
        follows from the seed and the object's id."""
        seeds = [noise_seed(seed, name) for name in batch.ids]
        noise = self.sampler.draw_noise(seeds, batch.images.shape[1]).to(batch.images.device)
        truth = self._true_maps(batch) if self.sampler.config.feedback_of == "truth" else None
        step = last_step(self.sampler(batch.images[:, 0], batch.cameras, noise, every_step=False, truth=truth))
        return step, (step.views.float() * 0.5 + 0.5).clamp(0, 1)

    def clean(self, batch: OrbitBatch) -> Gaussians:
        """Reconstructions of the true views."""
        return self.models.lgm(batch.images, batch.cameras, batch.images.new_zeros(()))

    def _true_maps(self, batch: OrbitBatch) -> Feedback:
        """What a loop whose views were all right would feed back."""
        rendering = self.renderer(self.clean(batch), batch.cameras, self.size)
        return feedback_maps(rendering, batch.cameras, self.sampler.model.conventions.coordinates_map)

    def render(self, gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor]:
        """Pictures [B, V, 3, H, W] and boolean silhouettes [B, V, 1, H, W]."""
        rendering = self.renderer(gaussians, cameras, self.size)
        return rendering.rgb.clamp(0, 1), rendering.alpha > SOLID

    def scores(
        self, name: str, made: Tensor, truth: Tensor, alpha: Tensor | None, shape: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`<name>_<metric>` -> [B], means over views (see `score_images`). Without a silhouette `shape` of what was
        made, its difference from the background is one."""
        shape = picture_silhouette(made, self.background) if shape is None else shape
        return {f"{name}_{metric}": v for metric, v in score_images(made, truth, alpha, shape, self.lpips).items()}
