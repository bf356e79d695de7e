"""The committed small model still is what it was when it was committed: eight held-out objects, one seed.

The bounds lie a little under what was measured then: 19.29 dB for the novel views; 19.26 dB, 14.04 in the foreground,
an SSIM of 0.819 and an IoU of 0.741 for the 3D there; 20.87 dB and 0.817 for the reconstructor on true views, between
them. Better weights may raise them, nothing else may lower them. Other processors round differently, which the margins
allow for. The objects are every second of the held-out ones under CC0: a single one can lose a decibel where the mean
gains (tests/data/held_out).
"""

from pathlib import Path

import pytest
import torch

from ouroboros3d.build import Models, build_models, build_renderer
from ouroboros3d.config.loading import load_config
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.evaluation.validation import Validation

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config() -> Config:
    root = ROOT / "tests" / "data" / "held_out"
    return load_config(ROOT / "configs" / "small.yaml", [f"data.root={root}", "data.val=test.txt", "data.cache=none"])


@pytest.fixture(scope="module")
def models(config) -> Models:
    return build_models(config.model)


@pytest.fixture(scope="module")
def scores(config, models) -> dict[str, float]:
    return Validation(models, config, build_dataset(config, "val"), objects=8)()[0]


@pytest.mark.parametrize(
    ("score", "bound"),
    [
        ("views_psnr", 19.2),
        ("render_psnr", 19.15),
        ("render_psnr_foreground", 13.9),
        ("render_ssim", 0.817),
        ("render_iou", 0.737),
        ("lgm_unseen_psnr", 20.8),
        ("lgm_unseen_iou", 0.81),
    ],
)
def test_held_out_objects_are_as_good_as_they_were(scores, score, bound):
    assert scores[score] > bound


@torch.no_grad()
def test_grey_views_give_a_grey_object(config, models):
    """At the noise level of the last sampling step: told it, LGM once turned grey into green."""
    batch = OrbitBatch.collate([build_dataset(config, "val")[0]])
    grey = batch.images.mean(dim=2, keepdim=True).expand_as(batch.images)
    level = torch.tensor(config.sampler.scheduler.sigma_min).log() / 4
    gaussians = models.lgm(grey, batch.cameras, level)
    rgb = build_renderer(config)(gaussians, batch.cameras, config.model.image_size).rgb
    red, green, blue = rgb.movedim(2, 0)[:, batch.alpha[:, :, 0] > 0.5]
    assert (green - (red + blue) / 2).abs().mean() < 0.008
    assert (red - blue).abs().mean() < 0.008
