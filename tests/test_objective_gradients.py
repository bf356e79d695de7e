"""The joint objective: where gradients flow, and which parts a loss trains."""

from __future__ import annotations

import pytest
import torch
from objective_runs import HEADS, TAILS, draw, evaluate, reaches


class TestGradients:
    def test_of_diffusion_reach_the_reconstructor_only_through_feedback(self, make_objective, make_batch, lean_models):
        without = make_objective()(make_batch(), draw(coin=TAILS))["diffusion"]
        assert reaches(without, lean_models.unet) and not reaches(without, lean_models.lgm)
        with_it = make_objective()(make_batch(), draw(coin=HEADS))["diffusion"]
        assert reaches(with_it, lean_models.unet) and reaches(with_it, lean_models.lgm)

    def test_detaching_the_feedback_stops_them(self, make_objective, make_batch, lean_models):
        losses = make_objective(detach_feedback=True)(make_batch(), draw(coin=HEADS))
        assert reaches(losses["diffusion"], lean_models.unet) and not reaches(losses["diffusion"], lean_models.lgm)
        assert reaches(losses["reconstruction"], lean_models.lgm)

    def test_detaching_changes_no_loss(self, make_objective, make_batch):
        one, other = (
            evaluate(make_objective(detach_feedback=d), make_batch(), draw(coin=HEADS))[0] for d in (False, True)
        )
        assert one == other

    @pytest.mark.parametrize("coin", [TAILS, HEADS])
    def test_of_reconstruction_reach_the_unet_only_with_decode_gradient(
        self, make_objective, make_batch, lean_models, coin
    ):
        for switch in (False, True):
            losses = make_objective(decode_gradient=switch)(make_batch(), draw(coin=coin))
            assert reaches(losses["reconstruction"], lean_models.lgm)
            assert reaches(losses["reconstruction"], lean_models.unet) == switch

    @pytest.mark.parametrize("coin", [TAILS, HEADS])
    def test_of_the_total_reach_every_trained_tensor_and_nothing_frozen(
        self, make_objective, make_batch, lean_models, coin
    ):
        objective = make_objective(second_loss="add")
        try:
            objective(make_batch(), draw(coin=coin))["total"].backward()
            missing = [name for name, p in objective.named_parameters() if p.grad is None]
            assert not missing
            assert all(p.grad is None for p in lean_models.svd.parameters())
        finally:
            objective.zero_grad()

    def test_of_a_second_pass_do_not_end_in_the_weights_that_autocast_cast_for_the_first(
        self, make_objective, make_batch, lean_models, monkeypatch
    ):
        """The first pass, whose loss is replaced, runs without gradient; older torch would hand its casts on."""
        objective, events, clear = make_objective(second_loss="replace"), [], torch.clear_autocast_cache
        hook = lean_models.unet.register_forward_hook(lambda *_: events.append("pass"))
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: events.append("cleared") or clear())
        try:
            with torch.autocast("cpu", torch.bfloat16):
                objective(make_batch(), draw(coin=HEADS))["diffusion"].backward()
            assert events[:3] == ["pass", "cleared", "pass"]
            assert all(p.grad is not None for p in lean_models.unet.parameters())
        finally:
            hook.remove()
            objective.zero_grad()


class TestFreezing:
    """Which parts a loss trains; `objective.freeze` and the modes of training."""

    @pytest.fixture(autouse=True)
    def _thawed(self, make_objective, lean_models):
        yield
        make_objective().zero_grad()

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({}, {"unet", "adapters", "rays", "lgm"}),
            ({"reconstruction": "none"}, {"unet", "adapters", "rays"}),
            ({"freeze": ["unet"]}, {"adapters", "rays", "lgm"}),
            ({"freeze": ["unet", "rays"], "reconstruction": "none"}, {"adapters"}),
            ({"freeze": ["unet", "adapters", "rays"]}, {"lgm"}),
            ({"freeze": ["lgm"], "reconstruction": "none"}, {"unet", "adapters", "rays"}),
            (
                {"freeze": ["lgm"], "reconstruction": "predicted", "decode_gradient": True},
                {"unet", "adapters", "rays"},
            ),
            ({"diffusion": False, "reconstruction": "clean"}, {"lgm"}),
        ],
    )
    @pytest.mark.parametrize("coin", [HEADS, TAILS])
    def test_only_the_others_get_gradients(self, make_objective, make_batch, lean_models, changes, parts, coin):
        objective = make_objective(**changes)
        objective(make_batch(), draw(coin=coin))["total"].backward()
        networks = {"lgm" if part == "lgm" else "unet" for part in parts}
        assert {name.split(".")[1] for name in objective.state_dict()} == networks
        for name, part in lean_models.parts.items():
            assert any(p.grad is not None for p in part.parameters()) == (name in parts)
            assert all(p.requires_grad == (name in parts) for p in part.parameters())
        assert not any(p.requires_grad for p in lean_models.svd.parameters())
        assert not lean_models.svd.train().training

    def test_it_changes_no_loss(self, make_objective, make_batch):
        frozen = {"freeze": ["unet"]}, {"freeze": ["unet", "adapters", "rays"]}, {}
        one, *others = (evaluate(make_objective(**f), make_batch(), draw(coin=HEADS))[0] for f in frozen)
        assert all(other == one for other in others)

    def test_a_frozen_reconstructor_passes_the_loss_of_its_renderings_on(self, make_objective, make_batch, lean_models):
        changes = {"freeze": ["lgm"], "reconstruction": "predicted", "decode_gradient": True}
        losses = make_objective(**changes)(make_batch(), draw())
        assert reaches(losses["reconstruction"], lean_models.unet.unet)

    def test_without_reconstruction_the_maps_of_a_frozen_lgm_still_train_the_adapters(
        self, make_objective, make_batch, lean_models
    ):
        objective = make_objective(reconstruction="none", freeze=["unet", "rays"])
        keep = {}
        objective.record = keep.__setitem__
        losses = objective(make_batch(), draw(coin=HEADS))
        assert keep["position_map"].any() and not keep["position_map"].requires_grad
        assert reaches(losses["diffusion"], lean_models.unet.cond_encoder)
