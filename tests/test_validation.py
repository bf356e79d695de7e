"""What validation shows of a run: the right numbers in the right rows, and turntables that stand upright."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ouroboros3d.cameras import orbit
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.evaluation import validation as module
from ouroboros3d.evaluation.validation import Validation, tilts
from ouroboros3d.feedback import coordinates_map
from ouroboros3d.rendering import render
from ouroboros3d.visualize import GAP, LABEL_HEIGHT, LABEL_WIDTH, to_uint8, turntable


@pytest.fixture(scope="module")
def validation(make_config, make_models):
    config = make_config({"sampler": {"steps": 1}}, textbook=True, lean=True)
    items = []
    for number, elevation in enumerate((0.0, 25.0)):
        cameras = orbit([45.0 * k for k in range(8)], elevation)
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(number)) * 2 - 1
        items.append({"id": f"object_{number}", "images": images, "c2w": cameras.c2w[0], "K": cameras.K[0]})
        items[-1] |= {"background": torch.ones(3)}
    return Validation(make_models(config).eval(), config, items, objects=2)


def cell(table: Image.Image, row: int, column: int) -> np.ndarray:
    left, top = LABEL_WIDTH + column * (32 + GAP), LABEL_HEIGHT + row * (32 + GAP)
    return np.asarray(table.crop((left, top, left + 32, top + 32)))


def test_pictures_hold_truth_views_renders_and_coordinates(validation):
    values, pictures = validation()
    assert list(pictures) == ["lgm", "lgm_turntable", "loop", "loop_turntable"]
    assert {"lgm_input_psnr", "lgm_unseen_psnr", "views_psnr", "render_psnr", "delta_psnr"} <= set(values)
    batch, table = OrbitBatch.collate(validation.items), pictures["lgm"]
    with torch.no_grad():
        gaussians = validation.models.lgm(batch.images, batch.cameras, torch.zeros(()))
        rendering = render(gaussians, batch.cameras, 32)
    ccm = coordinates_map(rendering.depth, batch.cameras, "textbook", rendering.alpha)
    for row, images in enumerate((batch.images * 0.5 + 0.5, rendering.rgb, ccm)):
        expected = to_uint8(images[1, 3])  # of the second object
        assert np.abs(cell(table, 3 + row, 3).astype(int) - expected).max() <= 1
    assert pictures["loop"].height - table.height == 2 * (32 + GAP)  # and the views, of each object


def test_turntables_turn_each_object_about_its_own_axis(validation):
    batch, frames = OrbitBatch.collate(validation.items), validation()[1]["lgm_turntable"]
    assert len(frames) == 36 and frames[0].shape == (32, 2 * 32, 3)
    with torch.no_grad():
        gaussians = validation.models.lgm(batch.images, batch.cameras, torch.zeros(()))
    own = list(turntable(gaussians.scene(1), render, 32, 10.0, tilt=25.0))
    assert np.abs(frames[9][:, 32:].astype(int) - own[9]).max() <= 1


def test_the_lean_of_an_orbit_is_its_elevation():
    for elevation in (-5.0, 0.0, 30.0):
        assert tilts(orbit([20.0 * k for k in range(8)], elevation)) == [pytest.approx(elevation, abs=1e-3)]


def test_processes_share_the_objects_and_agree_on_the_result(validation, monkeypatch):
    """What each of two processes would gather is what one process says."""
    alone, pictures = validation()
    shares: list[list] = []

    def look(rank: int) -> None:
        monkeypatch.setattr(module, "PartialState", lambda: SimpleNamespace(num_processes=2, process_index=rank))
        monkeypatch.setattr(module, "gather_object", lambda own: shares.append(own) or own)
        validation()

    for rank in (0, 1):
        look(rank)
    assert [len(share) for share in shares] == [1, 1]
    monkeypatch.setattr(module, "gather_object", lambda _own: shares[0] + shares[1])
    together, table = validation()
    assert together == pytest.approx(alone, rel=1e-4)
    assert table["lgm"].size == pictures["lgm"].size and len(table["lgm_turntable"]) == 36
    # More processes than objects: one has nothing to look at and still takes part.
    monkeypatch.setattr(module, "PartialState", lambda: SimpleNamespace(num_processes=3, process_index=2))
    assert validation()[0] == pytest.approx(alone, rel=1e-4)


def test_each_batch_begins_a_step_for_cuda_graphs(validation, monkeypatch):
    """Or the graphs of training would be joined by one for every call."""
    marks = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    monkeypatch.setattr(validation.config.train, "compile", True)
    validation()
    assert marks == [1]
