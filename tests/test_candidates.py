"""Candidates: the score needs no truth, and the chosen object is the one that its seed gives alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from photos import toy

from ouroboros3d.cli import call
from ouroboros3d.config.loading import save_config
from ouroboros3d.evaluation import candidate_choice
from ouroboros3d.inference import candidates as module
from ouroboros3d.inference.candidates import candidates, elevation_grid, score, score_parts, step_at
from ouroboros3d.models.weights import save_checkpoint
from ouroboros3d.pipeline import Ouroboros3DPipeline


@pytest.fixture(scope="module")
def pipe(make_config, make_models) -> Ouroboros3DPipeline:
    config = make_config({"sampler": {"steps": 3}}, textbook=True, lean=True)
    pipe = Ouroboros3DPipeline(make_models(config), config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def picture(pipe) -> torch.Tensor:
    return pipe.prepare_image(toy())


def test_starts_are_all_seeds_at_all_elevations():
    assert elevation_grid(-5, 30, 3) == [-5, 12.5, 30]
    starts = [(c.seed, c.elevation) for c in candidates(7, [0, 10], 2)]
    assert starts == [(7, 0.0), (8, 0.0), (7, 10.0), (8, 10.0)]


def test_the_score_is_the_psnr_of_what_should_agree(pipe, picture):
    step = next(iter(pipe.steps(picture.expand(2, -1, -1, -1), [1, 2])))
    parts = score_parts(step, picture.expand(2, -1, -1, -1))
    views, renders = (step.views * 0.5 + 0.5).clamp(0, 1), step.rendering.rgb.clamp(0, 1)
    for i in range(2):
        error = ((views[i, 1:] - renders[i, 1:]) ** 2).mean()
        assert parts["agreement"][i].item() == pytest.approx(-10 * torch.log10(error).item(), abs=1e-4)
        error = ((picture * 0.5 + 0.5 - renders[i, 0]) ** 2).mean()
        assert parts["reprojection"][i].item() == pytest.approx(-10 * torch.log10(error).item(), abs=1e-4)
    assert torch.equal(score(step, picture[None]), parts["reprojection"])


def test_scoring_stops_at_its_step(pipe, picture):
    images, seen = picture[None], []

    def steps():
        for step in pipe.steps(images, [1]):
            seen.append(step.index)
            yield step

    assert torch.equal(score(step_at(steps(), 2), images), score(list(pipe.steps(images, [1]))[1], images))
    assert seen == [0, 1]


def test_a_shorter_loop_and_smaller_views_are_scored_as_well(pipe, picture):
    sampler = replace(pipe.config.sampler, last_sigma=10.0, loop_decoder="half")
    config = replace(pipe.config, sampler=sampler)
    steps = list(pipe.steps(picture[None], [1], config=config))
    assert len(steps) == 2 and steps[0].views.shape[-1] == 16
    assert torch.isfinite(score_parts(steps[0], picture[None])["agreement"]).all()
    assert torch.equal(score(step_at(iter(steps), 3), picture[None]), score(steps[-1], picture[None]))


def test_the_chosen_object_is_that_of_its_seed(pipe, picture):
    output = pipe(picture, seed=5, num_candidates=3)
    scores = [score(step_at(pipe.steps(picture[None], [s]), 3), picture[None]).item() for s in (5, 6, 7)]
    best = 5 + scores.index(max(scores))
    assert output[0].seed == best
    alone = pipe(picture, seed=best)[0]
    assert torch.allclose(output[0].gaussians.means, alone.gaussians.means, atol=1e-4)


def test_a_candidate_that_ran_the_whole_loop_is_not_sampled_again(pipe, picture, monkeypatch):
    """3 of 3 steps are run for the choice, 4 of 5 are not all; a history needs the steps again."""
    sampled = []
    steps = Ouroboros3DPipeline.steps
    monkeypatch.setattr(
        Ouroboros3DPipeline,
        "steps",
        lambda self, x, seeds, *rest: sampled.append(len(seeds)) or steps(self, x, seeds, *rest),
    )
    output = pipe(picture, seed=5, num_candidates=3)
    assert sampled == [3] and torch.allclose(output[0].image, picture * 0.5 + 0.5)
    pipe(picture, seed=5, num_candidates=3, return_history=True)
    pipe(picture, seed=5, num_candidates=3, num_inference_steps=5)
    assert sampled == [3, 3, 1, 3, 1]


def test_an_elevation_is_looked_for_in_the_trained_range(pipe, picture):
    output = pipe(picture, seed=5, elevation="auto")
    assert output[0].elevation in elevation_grid(-5, 30)
    assert torch.allclose(output[0].cameras.c2w, pipe.cameras([output[0].elevation]).c2w)
    chosen = pipe.choose(picture, 5, "auto", 1)
    assert chosen.elevation == output[0].elevation and chosen.seed == 5


def test_an_elevation_outside_the_trained_range_is_said_in_one_line(pipe, picture, caplog):
    caplog.set_level(logging.WARNING)
    pipe(picture, elevation=30, num_inference_steps=1)
    assert not caplog.records
    pipe([picture, picture], elevation=[45, -20], num_inference_steps=1)
    assert [r.getMessage() for r in caplog.records] == [
        "elevation -20, 45: the model was trained on -5 to 30 degrees; expect worse"
    ]
    with pytest.raises(ValueError, match="num_candidates"):
        pipe(picture, num_candidates=0)


def test_the_measuring_command_goes_on_where_it_was(tmp_path, make_config, make_models, load_script, monkeypatch):
    """On the orbits of tests/data with a tiny model; the tables hold every score and step."""
    config = make_config({"sampler": {"steps": 2}}, textbook=True, lean=True)
    save_checkpoint(tmp_path / "ckpt", make_models(config), frozen=True)
    config.model.pretrained.checkpoint = str(tmp_path / "ckpt")
    config.data.root = str(Path(__file__).parent / "data" / "orbits")
    save_config(config, tmp_path / "tiny.yaml")
    script = load_script("measure_candidates")
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--list", "train.txt", "--objects", "2"]
    arguments += ["--candidates", "2", "--elevations", "2", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert call(script.main, arguments) == 0
    tables = (tmp_path / "out" / "tables.txt").read_text()
    rows = candidate_choice.read_rows(tmp_path / "out" / "samples.csv")
    assert len(rows) == 2 * (2 + 2) * 2  # objects, samples, steps
    for text in ("2 seeds, 2 objects", "mean candidate", "chosen by reprojection at step 2", "2 elevations, 2 objects"):
        assert text in tables
    monkeypatch.setattr(candidate_choice, "sample", None)  # nothing is sampled again
    assert call(script.main, arguments) == 0
    assert (tmp_path / "out" / "tables.txt").read_text() == tables


def test_the_tables_by_hand():
    rows = [
        {"object": o, "kind": "seed", "true_elevation": 0.0, "elevation": 0.0, "seed": s, "step": 1.0}
        | {"agreement": a, "reprojection": r, "psnr": p}
        for o, s, a, r, p in (("x", 0, 10, 9, 20), ("x", 1, 12, 5, 16), ("y", 0, 5, 5, 10), ("y", 1, 6, 6, 12))
    ]
    lines = list(candidate_choice.seed_table(rows))
    assert lines[1].startswith("mean candidate   14.50") and lines[2].startswith("best candidate   16.00")
    assert lines[3].startswith("chosen by agreement + reprojection at step 1   16.00")
    assert lines[4].startswith("chosen by agreement at step 1   14.00")
    assert module.ELEVATIONS >= 2
