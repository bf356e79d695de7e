"""The joint objective: which losses there are, what each switch does to them, what the networks see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from objective_runs import HEADS, TAILS, draw, evaluate

from ouroboros3d import diffusion
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.geometry import unproject
from ouroboros3d.objective import Draws


def scenes(batch: OrbitBatch, index: list[int]) -> OrbitBatch:
    return OrbitBatch(
        batch.images[index],
        batch.cameras.scenes(index),
        [batch.ids[i] for i in index],
        batch.alpha[index],
        batch.depth[index],
    )


class TestLosses:
    @pytest.mark.parametrize("coin", [HEADS, TAILS])
    def test_the_total_is_their_sum(self, make_objective, make_batch, coin):
        losses, _ = evaluate(make_objective(), make_batch(), draw(coin=coin))
        assert losses.keys() == {"diffusion", "reconstruction", "total"}
        assert losses["total"] == pytest.approx(losses["diffusion"] + losses["reconstruction"])

    def test_diffusion_is_the_weighted_error_of_x0_against_the_clean_latents(self, make_objective, make_batch):
        """Which is the squared error of v = alpha eps - sigma alpha x0."""
        draws = draw()
        losses, keep = evaluate(make_objective(), make_batch(), draws)
        sigma = diffusion.lognormal_sigma(draws.sigma, 1.0, 1.6)
        alpha = (sigma**2 + 1) ** -0.5
        v = alpha * draws.latents - sigma * alpha * keep["clean"]
        assert losses["diffusion"] == pytest.approx(F.mse_loss(keep["model_pred_0"], v).item(), rel=1e-4)
        torch.testing.assert_close(keep["c_noise"], sigma.log() / 4)

    @pytest.mark.parametrize(("kind", "function"), [("l1", F.l1_loss), ("mse", F.mse_loss)])
    def test_reconstruction_is_the_mean_over_predicted_and_clean_views(
        self, make_objective, make_batch, kind, function
    ):
        batch = make_batch()
        losses, keep = evaluate(make_objective(image_loss=kind), batch, draw())
        parts = [function(keep[k].clamp(0, 1), batch.images / 2 + 0.5).item() for k in ("render_x0", "render_x1")]
        assert losses["reconstruction"] == pytest.approx(sum(parts) / 2)
        assert parts[0] != parts[1]
        for name, part in (("clean", parts[0]), ("predicted", parts[1])):
            alone, _ = evaluate(make_objective(image_loss=kind, reconstruction=name), batch, draw())
            assert alone["reconstruction"] == pytest.approx(part)

    def test_clean_views_are_reconstructed_at_noise_level_0(self, make_objective, make_batch, lean_models):
        batch = make_batch()
        _, keep = evaluate(make_objective(), batch, draw())
        objective = make_objective()
        with torch.no_grad():
            gaussians = lean_models.lgm(batch.images, batch.cameras, torch.zeros(()))
            rendering = objective.renderer(gaussians, batch.cameras, 32)
        assert torch.equal(keep["render_x0"], rendering.rgb)

    def test_without_reconstruction_there_is_only_diffusion(self, make_objective, make_batch):
        for coin in (TAILS, HEADS):
            losses, keep = evaluate(make_objective(reconstruction="none"), make_batch(), draw(coin=coin))
            assert losses.keys() == {"diffusion", "total"}
            assert ("decoded_x0" in keep) == ("model_pred_1" in keep) == (coin is HEADS)

    def test_without_diffusion_there_is_only_reconstruction(self, make_objective, make_batch, lean_models, monkeypatch):
        monkeypatch.setattr(lean_models.unet, "forward", None)  # it is not run
        losses, _ = evaluate(make_objective(diffusion=False, reconstruction="clean"), make_batch(), draw())
        assert losses.keys() == {"reconstruction", "total"}

    def test_alpha(self, make_objective, make_batch):
        batch = make_batch()
        once, twice = (evaluate(make_objective(alpha_weight=w), batch, draw())[0] for w in (1.0, 2.0))
        assert twice["alpha"] == pytest.approx(2 * once["alpha"]) and once["alpha"] > 0
        assert once["total"] == pytest.approx(once["diffusion"] + once["reconstruction"] + once["alpha"])

    def test_positions_are_those_of_the_surface_each_pixel_sees(self, make_objective, make_batch, lean_models):
        """A reconstruction that is right has loss 0, one that is 0.01 off everywhere has 0.01."""
        batch = make_batch(2)
        objective = make_objective(position_weight=1.0, reconstruction="clean", diffusion=False)
        views = lean_models.lgm.input_views(8)
        depth = F.interpolate(batch.depth[:, views].flatten(0, 1), (8, 8), mode="nearest").unflatten(0, (2, 4))
        points = unproject(depth, batch.cameras.views(views)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        empty = depth.flatten(1) == 0
        assert empty.any() and not empty.all()

        for offset in (0.0, 0.01):
            means = torch.where(empty[..., None], 5.0, points + offset)  # where there is nothing, anything goes
            x = torch.cat([means, torch.full((*means.shape[:2], 11), 0.5)], -1)
            with torch.no_grad():
                loss = objective._position_loss(Gaussians.from_tensor(x), batch)
            assert loss.item() == pytest.approx(offset, abs=1e-5)


class TestFeedback:
    @pytest.fixture
    def both(self, make_objective, make_batch):
        """Losses and intermediates without and with feedback, of the same draws."""
        return [evaluate(make_objective(), make_batch(), draw(coin=coin)) for coin in (TAILS, HEADS)]

    @pytest.fixture
    def seen(self, lean_models, monkeypatch) -> list[dict[str, torch.Tensor]]:
        """The maps of every pass."""
        maps_of_passes, original = [], lean_models.unet.encode_feedback
        monkeypatch.setattr(
            lean_models.unet, "encode_feedback", lambda maps: maps_of_passes.append(maps) or original(maps)
        )
        return maps_of_passes

    def test_the_second_loss_replaces_or_adds_to_the_first(self, make_objective, make_batch, both):
        (first, _), (second, keep) = both
        assert first["diffusion"] != second["diffusion"]
        added, _ = evaluate(make_objective(second_loss="add"), make_batch(), draw(coin=HEADS))
        assert added["diffusion"] == pytest.approx(first["diffusion"] + second["diffusion"], rel=1e-5)
        assert "model_pred_1" in keep and "model_pred_1" not in both[0][1]

    def test_it_changes_neither_first_pass_nor_reconstruction(self, both):
        (first, one), (second, other) = both
        assert first["reconstruction"] == second["reconstruction"]
        for name in ("model_pred_0", "unet_input", "decoded_x0", "render_x1", "context"):
            assert torch.equal(one[name], other[name]), name

    @pytest.mark.parametrize(("p", "above"), [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.2, 0.8)])
    def test_how_often(self, make_objective, make_batch, p, above):
        objective = make_objective(feedback_probability=p, reconstruction="none")
        for coin in (above - 1e-3, above + 1e-3):
            if 0 < coin < 1:
                _, keep = evaluate(objective, make_batch(), draw(coin=torch.tensor(coin)))
                assert ("model_pred_1" in keep) == (coin > above)

    def test_the_second_pass_sees_the_rendered_maps_and_the_first_zeros(self, make_objective, make_batch, seen):
        _, keep = evaluate(make_objective(), make_batch(), draw(coin=HEADS))
        assert [sorted(maps) for maps in seen] == [["ccm", "rgb"]] * 2
        assert not seen[0]["rgb"].any() and not seen[0]["ccm"].any()
        assert torch.equal(seen[1]["rgb"], keep["render_x1"].clamp(0, 1))
        assert torch.equal(seen[1]["ccm"], keep["position_map"])

    @pytest.mark.parametrize("chosen", [["rgb"], ["ccm"]])
    def test_which_maps_it_sees(self, make_objective, make_batch, seen, chosen):
        evaluate(make_objective(feedback=chosen), make_batch(), draw(coin=HEADS))
        assert [name for name in ("rgb", "ccm") if seen[1][name].any()] == chosen


class TestExtraViews:
    @pytest.fixture
    def batch(self, make_batch) -> OrbitBatch:
        """Two objects: six views, and two further ones for supervision."""
        batch = make_batch(2)
        first, last = slice(6), slice(6, 8)
        extra = OrbitBatch(batch.images[:, last], batch.cameras.views(last), batch.ids, batch.alpha[:, last])
        return OrbitBatch(
            batch.images[:, first], batch.cameras.views(first), batch.ids, batch.alpha[:, first], None, extra
        )

    def draws(self, coin=TAILS) -> Draws:
        draws = Draws.draw(0, 0, [0, 1], 6, 32, (4, 8))
        return dataclasses.replace(draws, feedback=coin, dropout=torch.full((2,), 0.9))

    def test_renderings_are_compared_to_them_as_well(self, make_objective, batch):
        losses, keep = evaluate(make_objective(reconstruction="predicted", alpha_weight=1.0), batch, self.draws())
        truth = torch.cat([batch.images, batch.extra.images], 1) / 2 + 0.5
        assert keep["render_x1"].shape == (2, 8, 3, 32, 32)
        assert losses["reconstruction"] == pytest.approx(F.l1_loss(keep["render_x1"].clamp(0, 1), truth).item())
        without, _ = evaluate(
            make_objective(reconstruction="predicted"), dataclasses.replace(batch, extra=None), self.draws()
        )
        assert losses["reconstruction"] != pytest.approx(without["reconstruction"], rel=1e-4)

    def test_networks_and_feedback_see_nothing_of_them(self, make_objective, batch):
        alone = dataclasses.replace(batch, extra=None)
        (one, a), (other, b) = (evaluate(make_objective(), x, self.draws(HEADS)) for x in (batch, alone))
        assert one["diffusion"] == pytest.approx(other["diffusion"], rel=1e-6)
        for name in ("model_pred_0", "decoded_x0", "position_map", "model_pred_1"):
            torch.testing.assert_close(a[name], b[name])
        torch.testing.assert_close(a["render_x0"][:, :6], b["render_x0"])

    def test_they_travel_with_the_batch(self, batch):
        moved = batch.to(torch.device("meta"))
        assert moved.extra.images.is_meta and moved.extra.cameras.c2w.is_meta and moved.ids == batch.ids
        assert batch.supervised.images.shape[1] == batch.supervised.cameras.num_views == 8


class TestLPIPS:
    @pytest.fixture
    def counted(self, monkeypatch) -> list[int]:
        """LPIPS as a stand-in with value 0.25, and how many pictures it was asked for."""
        calls: list[int] = []

        def lpips(rendered, _truth):
            calls.append(len(rendered))
            return rendered.new_tensor(0.25)

        monkeypatch.setattr("ouroboros3d.training.setup.make_lpips", lambda *_: lpips)
        return calls

    @pytest.mark.parametrize(("warmup", "step", "weight"), [(0, 0, 2.0), (10, 0, 0.0), (10, 5, 1.0), (10, 30, 2.0)])
    def test_the_weight_rises_over_the_warm_up(self, make_objective, make_batch, counted, warmup, step, weight):
        objective = make_objective(lpips_weight=2.0, lpips_warmup_steps=warmup)
        losses, _ = evaluate(objective, make_batch(), draw(step=step))
        assert losses.get("lpips", 0.0) == pytest.approx(0.25 * weight)
        assert counted == ([8, 8] if weight else []), "at weight 0 it must cost nothing"

    def test_without_a_weight_its_network_is_not_made(self, make_objective, monkeypatch):
        def refuse(*_):
            raise AssertionError("LPIPS was made")

        monkeypatch.setattr("ouroboros3d.training.setup.make_lpips", refuse)
        make_objective(lpips_weight=0.0)
        make_objective(lpips_weight=1.0, reconstruction="none")


class TestConditions:
    @pytest.mark.parametrize(
        ("u", "context", "latent"), [(0.05, False, True), (0.15, False, False), (0.25, True, False), (0.35, True, True)]
    )
    def test_dropout(self, make_objective, make_batch, u, context, latent):
        draws = dataclasses.replace(draw((0, 1)), dropout=torch.tensor([u, 0.9]))
        _, keep = evaluate(make_objective(reconstruction="none"), make_batch(2), draws)
        assert bool(keep["context"][0].any()) == context and keep["context"][1].any()
        assert bool(keep["unet_input"][0, :, 4:].any()) == latent and keep["unet_input"][1, :, 4:].any()

    def test_rate(self, make_objective, make_batch):
        draws = dataclasses.replace(draw(), dropout=torch.tensor([0.15]))
        _, keep = evaluate(make_objective(reconstruction="none", dropout=0.0), make_batch(), draws)
        assert keep["context"].any() and keep["unet_input"][0, :, 4:].any()

    def test_time_ids_are_the_first_samples_or_each_ones_own(self, make_objective, make_batch):
        draws = draw((0, 1))
        sigma = diffusion.lognormal_sigma(draws.condition_sigma, -3.0, 0.5)
        assert sigma[0] != sigma[1]
        for kind, expected in (("release", sigma[[0, 0]]), ("textbook", sigma)):
            objective = make_objective({"time_id": kind}, reconstruction="none")
            _, keep = evaluate(objective, make_batch(2), draws)
            torch.testing.assert_close(keep["time_ids"][:, 2], expected)
            assert keep["time_ids"][:, :2].tolist() == [[6, 127]] * 2

    def test_clip_sees_the_noised_or_the_clean_picture(self, make_objective, make_batch, lean_models):
        batch, draws = make_batch(), draw()
        image = batch.images[:, 0]
        noised = image + diffusion.lognormal_sigma(draws.condition_sigma, -3.0, 0.5) * draws.condition_image
        for kind, expected in (("noised", noised), ("clean", image)):
            objective = make_objective({"clip_training_image": kind}, reconstruction="none")
            _, keep = evaluate(objective, batch, draws)
            with torch.no_grad():
                torch.testing.assert_close(keep["context"], lean_models.svd.embed_image(expected))

    def test_the_input_is_scaled_noisy_latents_beside_the_unscaled_condition(self, make_objective, make_batch):
        batch, draws = make_batch(), draw()
        _, keep = evaluate(make_objective(reconstruction="none"), batch, draws)
        sigma = diffusion.lognormal_sigma(draws.sigma, 1.0, 1.6)
        noisy = (keep["clean"] + sigma * draws.latents) * diffusion.c_in(sigma)
        torch.testing.assert_close(keep["unet_input"][:, :, :4], noisy)
        assert torch.equal(keep["unet_input"][:, 3, 4:], keep["condition_latent"])


def test_with_textbook_options_a_batch_of_two_is_the_mean_of_two_single_ones(make_objective, make_batch):
    batch, objective = make_batch(2), make_objective(textbook_options=True, alpha_weight=1.0)
    for coin in (TAILS, HEADS):
        both, _ = evaluate(objective, batch, draw((0, 1), coin))
        single = [evaluate(objective, scenes(batch, [i]), draw((i,), coin))[0] for i in range(2)]
        for name, value in both.items():
            assert value == pytest.approx((single[0][name] + single[1][name]) / 2, rel=1e-3), name
            assert single[0][name] != single[1][name]
