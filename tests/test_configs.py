"""Every YAML in configs/ loads; the full-size model is the release's, built and wired up without memory."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import pytest
import torch

from ouroboros3d import build
from ouroboros3d.build import build_cameras, build_models
from ouroboros3d.config.loading import load_config
from ouroboros3d.config.schema import ConventionsConfig, ModelConfig
from ouroboros3d.errors import ConfigError
from ouroboros3d.models.multiview_unet import make_unet
from ouroboros3d.models.svd import make_image_encoder, make_vae, time_ids

CONFIGS = Path(__file__).parents[1] / "configs"
OURS = sorted(set(CONFIGS.rglob("*.yaml")) - set(CONFIGS.glob("accelerate/*")))  # accelerate has a format of its own
SVD = "stabilityai/stable-video-diffusion-img2vid"


@pytest.mark.parametrize("path", OURS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_it_loads_and_can_be_used(path):
    config = load_config(path)
    checkpoint = config.model.pretrained.checkpoint
    assert checkpoint is None or (CONFIGS.parent / checkpoint).is_dir()
    if path.parent == CONFIGS / "small":  # a stage of training: a finished model would take the place of its parts
        assert checkpoint is None


def test_every_convention_and_every_quirk_is_documented():
    text = (CONFIGS.parent / "docs" / "faithfulness.md").read_text()
    for field in dataclasses.fields(ConventionsConfig):
        assert f"`{field.name}: " in text, field.name
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == set(range(1, 24))


def test_full_size_training_is_the_release_s():
    config = load_config(CONFIGS / "mv" / "svd_lgm_rgb_ccm_lvis.yaml")
    train, objective = config.train, config.objective
    assert (8 * train.batch_size * train.gradient_accumulation, train.steps) == (32, 40000)
    assert (train.learning_rate, train.mixed_precision, train.clip_norm) == (1e-5, "fp16", 1.0)
    assert (objective.lpips_weight, objective.second_loss, objective.dropout) == (1.0, "replace", 0.1)
    assert config.model.multiview.feedback == config.sampler.feedback == ["rgb", "ccm"]


def test_full_size_training_is_the_table_s():
    """docs/faithfulness.md, hyperparameter by hyperparameter."""
    config = load_config(CONFIGS / "mv" / "svd_lgm_rgb_ccm_lvis.yaml")
    text = (CONFIGS.parent / "docs" / "faithfulness.md").read_text()
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| ([^|]+) \|", text.split("hyperparameter by hyperparameter")[1], re.MULTILINE
    )
    assert len(rows) > 30
    for key, value in rows:
        assert str(functools.reduce(getattr, key.split("."), config)) == value, key


def test_the_fast_variant_is_the_same_training_in_larger_batches():
    """What keeps samples apart (tests/test_objective.py), and the same samples per step."""
    release, fast = (
        load_config(CONFIGS / "mv" / f"svd_lgm_rgb_ccm_lvis{end}.yaml", ["train.output_dir=x"]) for end in ("", "_fast")
    )
    same = {"batch_size": 1, "gradient_accumulation": 4}
    assert dataclasses.replace(fast.train, **same) == release.train
    batch = [c.train.batch_size * c.train.gradient_accumulation for c in (release, fast)]
    assert batch == [4, 4] and fast.train.batch_size >= 2
    apart = {"temporal_context": "textbook", "decode_chunk": 0, "time_id": "textbook"}
    assert fast.model.conventions == dataclasses.replace(release.model.conventions, **apart)
    assert (fast.objective, fast.data, fast.sampler) == (release.objective, release.data, release.sampler)


@pytest.fixture(scope="module")
def baseline():
    """configs/baseline.yaml and its networks on the meta device, SVD's parts made instead of fetched."""
    config = load_config(CONFIGS / "baseline.yaml")
    default, fetched = ModelConfig(), []

    def make(_cls, part: str, source: str, _variant: str | None):
        fetched.append((source, part))
        if part == "vae":
            return make_vae(default.vae)
        if part == "image_encoder":
            return make_image_encoder(default.image_encoder)
        return make_unet(default)

    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(build, "from_pretrained", make)
        models = build_models(config.model).to("meta")  # diffusers makes a few parameters on the CPU all the same
    assert fetched == [(SVD, part) for part in ("vae", "image_encoder", "unet")]
    return config, models


def test_the_baseline_has_the_published_sizes(baseline):
    _, models = baseline

    def billions(module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e9

    assert billions(models.unet.unet) == pytest.approx(1.52, abs=0.01)
    assert billions(models.lgm) == pytest.approx(0.42, abs=0.01)
    assert (len(models.unet.state_dict()), len(models.lgm.state_dict())) == (1572, 438)


@torch.no_grad()
def test_the_baseline_s_networks_fit_each_other(baseline):
    config, models = baseline
    cameras = build_cameras(config).to("meta")
    picture = torch.empty(1, 3, 512, 512, device="meta")
    latent = models.svd.encode(picture)
    assert latent.shape == (1, 4, 64, 64)
    context = torch.empty(2, 1, config.model.image_encoder.projection_dim, device="meta")
    maps = {name: torch.empty(1, 8, 3, 512, 512, device="meta") for name in models.unet.config.feedback}
    v = models.unet(
        torch.empty(2, 8, 8, 64, 64, device="meta"),
        torch.empty((), device="meta"),
        context,
        time_ids([6.0, 127.0], torch.empty(2, device="meta")),
        models.unet.encode_cameras(cameras, 64).repeat(2),
        models.unet.encode_feedback(maps).repeat(2),
    )
    assert v.shape == (2, 8, 4, 64, 64)
    views = models.svd.decode(v[:1])
    assert views.shape == (1, 8, 3, 512, 512)
    gaussians = models.lgm(views, cameras, torch.empty((), device="meta"))
    assert gaussians.means.shape == (1, 65536, 3)


def test_cuda_refuses_a_renderer_it_does_not_have(monkeypatch):
    """tests/test_gsplat_kernels.py has the rest."""
    loaded = []
    monkeypatch.setattr(build, "load_kernels", lambda: loaded.append(True))
    config = load_config(CONFIGS / "small" / "model.yaml")
    build.check_renderer(config, torch.device("cpu"))
    assert not loaded
    build.check_renderer(config, torch.device("cuda"))
    assert loaded
    config.model.conventions.renderer = "release"
    with pytest.raises(ConfigError, match=r"model\.conventions\.renderer.*set it to gsplat"):
        build.check_renderer(config, torch.device("cuda"))


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("lgm_positions", ["lgm"]),
        ("lgm", ["lgm"]),
        ("lgm_grown", ["lgm"]),
        ("unet", ["unet", "rays"]),
        ("joint", ["unet", "adapters", "rays", "lgm"]),
        ("feedback", ["unet", "adapters", "rays"]),
        ("lgm_predicted", ["lgm"]),
    ],
)
def test_a_stage_of_the_small_model_trains_what_it_says(stage, trained):
    """Also where it inherits another stage's keys."""
    assert load_config(CONFIGS / "small" / f"{stage}.yaml").objective.trained == trained
