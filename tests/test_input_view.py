"""`model.conventions.input_view`: at the input's own camera the reconstructor sees the input, or the prediction."""

from unittest.mock import patch

import pytest
import torch

from ouroboros3d.build import build_sampler
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.feedback import views_to_reconstruct
from ouroboros3d.models.lgm import LGM
from ouroboros3d.training.setup import build_objective


@pytest.fixture(scope="module")
def models(make_config, make_models):
    return make_models(make_config(lean=True))


@pytest.fixture
def config(make_config):
    def make(input_view: str):
        changes = {"model": {"conventions": {"input_view": input_view}}, "sampler": {"steps": 2}}
        return make_config(changes, lean=True)

    return make


def seen_by(lgm_call) -> list[torch.Tensor]:
    return [call.args[1] for call in lgm_call.call_args_list]


def test_by_default_the_prediction_is_reconstructed(make_config):
    assert make_config().model.conventions.input_view == "predicted"
    views = torch.rand(1, 8, 3, 4, 4)
    assert views_to_reconstruct(views, torch.rand(1, 3, 8, 8), "predicted") is views


def test_the_input_is_resized_to_the_views():
    image = torch.rand(1, 3, 8, 8)
    known = views_to_reconstruct(torch.rand(1, 8, 3, 4, 4), image, "given")
    torch.testing.assert_close(known[:, 0], image.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3)))


def test_in_the_loop(config, models, make_cameras):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    with patch.object(LGM, "forward", autospec=True, side_effect=LGM.forward) as lgm:
        sampler = build_sampler(models, config("given"))
        steps = list(sampler(image, make_cameras(), sampler.draw_noise([0], 8)))
    assert len(steps) == 2
    for step, views in zip(steps, seen_by(lgm), strict=True):
        assert torch.equal(views[:, 0], image) and torch.equal(views[:, 1:], step.views[:, 1:])
        assert not torch.equal(step.views[:, 0], image)  # what is shown and scored stays the prediction


def test_in_training(config, models, make_cameras):
    batch = OrbitBatch(torch.rand(1, 8, 3, 32, 32) * 2 - 1, make_cameras(), ["object"], torch.ones(1, 8, 1, 32, 32))
    for input_view, equal in (("given", True), ("predicted", False)):
        objective = build_objective(models, config(input_view))
        with patch.object(LGM, "forward", autospec=True, side_effect=LGM.forward) as lgm, torch.no_grad():
            objective(batch, objective.draw(0, 0, [0], batch))
        assert torch.equal(seen_by(lgm)[0][:, 0], batch.images[:, 0]) == equal
