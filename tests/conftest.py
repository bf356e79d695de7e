"""Tiny random models that every test file can ask for. Seeded; one thread, so that sums have one order."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from ouroboros3d.app.browser import chromium
from ouroboros3d.app.port import AppError
from ouroboros3d.build import Models, build_models
from ouroboros3d.cameras import Cameras, orbit
from ouroboros3d.config.loading import config_from_dict
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.objective import Objective
from ouroboros3d.training.setup import build_objective

CROSS, PLAIN = "CrossAttn{}BlockSpatioTemporal", "{}BlockSpatioTemporal"
# Three levels of two layers: the smallest U-Net in which every kind of skip connection is there twice.
SMALL = {
    "model": {
        "image_size": 32,
        "multiview": {
            "unet": {
                "sample_size": 8,
                "down_block_types": [*[CROSS.format("Down")] * 2, PLAIN.format("Down")],
                "up_block_types": [PLAIN.format("Up"), *[CROSS.format("Up")] * 2],
                "block_out_channels": [32, 64, 64],
                "num_attention_heads": [2, 4, 4],
                "layers_per_block": 2,
                "addition_time_embed_dim": 8,
                "num_frames": 8,
            },
            "adapter": {"res_blocks": 2},
            "ray_octaves": 2,
        },
        "vae": {"block_out_channels": [32, 32, 32], "layers_per_block": 1, "scaling_factor": 0.5},
        "image_encoder": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
        },
        "lgm": {
            "input_size": 16,
            "down_channels": [32, 64, 32],
            "down_attention": [False, True, True],
            "up_channels": [32, 64],
            "up_attention": [True, False],
            "heads": 4,
            "time_channels": 8,
            "time_embed_dim": 16,
        },
    },
    "sampler": {"steps": 3, "scheduler": {"sigma_max": 80.0}},
    "objective": {"lpips_weight": 0.0},
}
# Half as deep, for tests of whole loops.
LEAN = {
    "model": {
        "multiview": {
            "unet": {
                "down_block_types": [CROSS.format("Down"), PLAIN.format("Down")],
                "up_block_types": [PLAIN.format("Up"), CROSS.format("Up")],
                "block_out_channels": [32, 32],
                "num_attention_heads": [2, 2],
                "layers_per_block": 1,
            },
            "adapter": {"res_blocks": 1},
        },
        "lgm": {
            "down_channels": [32, 32],
            "down_attention": [False, True],
            "up_channels": [32],
            "up_attention": [False],
            "layers_per_block": 1,
        },
    }
}
TEXTBOOK = {
    "temporal_context": "textbook",
    "rays": "textbook",
    "coordinates_map": "textbook",
    "view_selection": "even",
    "decode_chunk": 0,
    "rotation": "textbook",
    "renderer": "exact",
    "time_id": "textbook",
    "clip_training_image": "clean",
}


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file may be longer than so many bytes."""
    import resource  # not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, for tests marked `slow`; skips where there is none."""
    try:
        with chromium() as started:
            yield started
    except AppError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """load_script("render_orbits"): the module of a command."""
    return lambda name: importlib.import_module(f"ouroboros3d.cli.{name}")


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """make_config({"sampler": {"steps": 5}}, textbook=True): the small config with changes."""

    def make(changes: dict[str, Any] | None = None, textbook: bool = False, lean: bool = False) -> Config:
        conventions = {"model": {"conventions": TEXTBOOK}} if textbook else {}
        layers = [SMALL, LEAN if lean else {}, conventions, changes or {}]
        return config_from_dict(OmegaConf.to_container(OmegaConf.merge(*layers)))

    return make


@pytest.fixture(scope="session")
def make_models(make_config) -> Callable[..., Models]:
    """make_models(config): every parameter random, also those that start at zero."""

    def make(config: Config | None = None, seed: int = 0) -> Models:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models = build_models((config or make_config()).model)
        for module in (models.unet, models.lgm):
            randomise_zeros(module, generator)
        return models

    return make


def randomise_zeros(module: nn.Module, generator: torch.Generator) -> None:
    """Replaces all-zero parameters, through which nothing would be seen."""
    for parameter in module.parameters():
        if not parameter.any():
            with torch.no_grad():
                parameter.normal_(0, 0.1, generator=generator)


@pytest.fixture(scope="session")
def make_cameras() -> Callable[..., Cameras]:
    """make_cameras(batch): eight views a scene, each scene with an elevation and a lens of its own."""

    def make(batch: int = 1, views: int = 8) -> Cameras:
        azimuths = [360 * i / views for i in range(views)]
        scenes = [orbit(azimuths, 10.0 * b, fov=39.598 + 5 * b) for b in range(batch)]
        return Cameras(torch.cat([s.c2w for s in scenes]), torch.cat([s.K for s in scenes]))

    return make


@pytest.fixture(scope="module")
def release(make_models) -> Models:
    """Do not change."""
    return make_models()


@pytest.fixture(scope="module")
def textbook(make_config, make_models) -> Models:
    """The textbook variant of every quirk. Do not change."""
    return make_models(make_config(textbook=True))


@pytest.fixture(scope="module")
def lean_models(make_config, make_models) -> Models:
    """Half as deep. Do not change, apart from gradients."""
    return make_models(make_config(lean=True))


@pytest.fixture(scope="module")
def lean_textbook(make_config, make_models) -> Models:
    return make_models(make_config(textbook=True, lean=True))


@pytest.fixture
def make_objective(make_config, lean_models, lean_textbook) -> Callable[..., Objective]:
    """make_objective(image_loss="mse"): the release's objective with changes."""

    def make(conventions: dict | None = None, textbook_options: bool = False, **changes) -> Objective:
        data = {"depth": True} if changes.get("position_weight") else {}
        sampler = {"feedback": changes["feedback"]} if "feedback" in changes else {}
        model = {"conventions": conventions or {}}
        changes = {"objective": changes, "model": model, "data": data, "sampler": sampler}
        config = make_config(changes, textbook=textbook_options, lean=True)
        return build_objective(lean_textbook if textbook_options else lean_models, config)

    return make


@pytest.fixture(scope="session")
def make_batch(make_cameras) -> Callable[..., OrbitBatch]:
    """make_batch(2): smooth random pictures of two objects, with alpha and depth."""

    def make(size: int = 1) -> OrbitBatch:
        g = torch.Generator().manual_seed(5)
        coarse = torch.rand(size, 8 * 3, 4, 4, generator=g) * 2 - 1
        images = F.interpolate(coarse, (32, 32), mode="bilinear").unflatten(1, (8, 3))
        alpha = (images.mean(2, keepdim=True) > 0).float()
        depth = (1.5 + 0.3 * torch.rand(size, 8, 1, 16, 16, generator=g)) * (alpha[..., ::2, ::2] > 0)
        return OrbitBatch(images, make_cameras(size), [f"object {i}" for i in range(size)], alpha, depth)

    return make
