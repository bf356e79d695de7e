"""The joint objective: which losses there are, what each switch does to them, and where gradients flow."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ouroboros3d import diffusion
from ouroboros3d.build import Models
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.geometry import unproject
from ouroboros3d.objective import Draws, Objective
from ouroboros3d.training.setup import build_objective

HEADS, TAILS = torch.tensor(0.9), torch.tensor(0.1)  # with feedback, without


@pytest.fixture(scope="module")
def models(make_config, make_models) -> Models:
    """Do not change, apart from gradients."""
    return make_models(make_config(lean=True))


@pytest.fixture(scope="module")
def textbook(make_config, make_models) -> Models:
    return make_models(make_config(textbook=True, lean=True))


@pytest.fixture
def make_objective(make_config, models, textbook):
    """make_objective(image_loss="mse"): the release's objective with changes."""

    def make(conventions: dict | None = None, textbook_options: bool = False, **changes) -> Objective:
        data = {"depth": True} if changes.get("position_weight") else {}
        sampler = {"feedback": changes["feedback"]} if "feedback" in changes else {}
        model = {"conventions": conventions or {}}
        changes = {"objective": changes, "model": model, "data": data, "sampler": sampler}
        config = make_config(changes, textbook=textbook_options, lean=True)
        return build_objective(textbook if textbook_options else models, config)

    return make


@pytest.fixture
def make_batch(make_cameras):
    def make(size: int = 1) -> OrbitBatch:
        """Smooth random pictures, the views of an object."""
        g = torch.Generator().manual_seed(5)
        coarse = torch.rand(size, 8 * 3, 4, 4, generator=g) * 2 - 1
        images = F.interpolate(coarse, (32, 32), mode="bilinear").unflatten(1, (8, 3))
        alpha = (images.mean(2, keepdim=True) > 0).float()
        depth = (1.5 + 0.3 * torch.rand(size, 8, 1, 16, 16, generator=g)) * (alpha[..., ::2, ::2] > 0)
        return OrbitBatch(images, make_cameras(size), [f"object {i}" for i in range(size)], alpha, depth)

    return make


def draw(samples=(0,), coin: torch.Tensor = TAILS, **changes) -> Draws:
    draws = Draws.draw(0, 0, list(samples), 8, 32, (4, 8))
    return dataclasses.replace(draws, feedback=coin, dropout=torch.full((len(samples),), 0.9), **changes)


def scenes(batch: OrbitBatch, index: list[int]) -> OrbitBatch:
    return OrbitBatch(
        batch.images[index],
        batch.cameras.scenes(index),
        [batch.ids[i] for i in index],
        batch.alpha[index],
        batch.depth[index],
    )


@torch.no_grad()
def evaluate(objective: Objective, batch: OrbitBatch, draws: Draws | None):
    keep: dict[str, torch.Tensor] = {}
    objective.record = keep.__setitem__
    losses = objective(batch, draws)
    return {name: value.item() for name, value in losses.items()}, keep


def reaches(loss: torch.Tensor, module: torch.nn.Module) -> bool:
    """Whether the loss has a gradient that is not zero in any parameter."""
    if not loss.requires_grad:
        return False
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(g is not None and bool(g.any()) for g in gradients)


class TestDraws:
    def test_a_samples_draws_depend_on_seed_and_sample_alone(self):
        both, alone = Draws.draw(3, 5, [7, 8], 2, 4, (4, 2)), Draws.draw(3, 99, [8], 2, 4, (4, 2))
        for field in dataclasses.fields(Draws):
            if field.name not in ("feedback", "step"):
                assert torch.equal(getattr(both, field.name)[1:], getattr(alone, field.name)), field.name

    @pytest.mark.parametrize("other", [(4, 5, [7]), (3, 5, [8])])
    def test_another_seed_or_sample_gives_others(self, other):
        one, two = Draws.draw(3, 5, [7], 2, 4, (4, 2)), Draws.draw(*other, 2, 4, (4, 2))
        for field in dataclasses.fields(Draws):
            if field.name not in ("feedback", "step"):
                assert not torch.equal(getattr(one, field.name), getattr(two, field.name)), field.name

    def test_the_coin_depends_on_seed_and_step_alone(self):
        coins = {}
        for seed in range(2):
            for step in range(50):
                coin, same = (Draws.draw(seed, step, samples, 1, 2, (1, 1)).feedback for samples in ([0], [3, 4]))
                assert torch.equal(coin, same) and coin.shape == ()
                coins[seed, step] = coin.item()
        assert len(set(coins.values())) == 100
        assert 0.35 < sum(c > 0.5 for c in coins.values()) / 100 < 0.65

    def test_distributions(self):
        draws = Draws.draw(0, 0, list(range(200)), 2, 4, (4, 4))
        for name in ("sigma", "condition_sigma", "dropout"):
            uniform = getattr(draws, name)
            assert uniform.shape == (200,) and uniform.min() >= 0 and uniform.max() < 1
            assert uniform.mean().item() == pytest.approx(0.5, abs=0.07)
        for name in ("latents", "vae_images", "condition_image", "vae_condition"):
            normal = getattr(draws, name)
            assert normal.mean().item() == pytest.approx(0, abs=0.05)
            assert normal.std().item() == pytest.approx(1, abs=0.05)
        assert not torch.equal(draws.latents, draws.vae_images)

    def test_the_objective_draws_for_its_batch(self, make_objective, make_batch):
        draws = make_objective().draw(1, 2, [5, 6], make_batch(2))
        assert draws.latents.shape == (2, 8, 4, 8, 8) and draws.condition_image.shape == (2, 3, 32, 32)
        assert draws.step == 2


class TestLosses:
    def test_the_defaults_are_the_releases(self):
        config = Config().objective
        assert config.second_loss == "replace" and config.reconstruction == "both"
        assert not config.detach_feedback and not config.decode_gradient

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

    def test_clean_views_are_reconstructed_at_noise_level_0(self, make_objective, make_batch, models):
        batch = make_batch()
        _, keep = evaluate(make_objective(), batch, draw())
        objective = make_objective()
        with torch.no_grad():
            gaussians = models.lgm(batch.images, batch.cameras, torch.zeros(()))
            rendering = objective.renderer(gaussians, batch.cameras, 32)
        assert torch.equal(keep["render_x0"], rendering.rgb)

    def test_without_reconstruction_there_is_only_diffusion(self, make_objective, make_batch):
        losses, keep = evaluate(make_objective(reconstruction="none"), make_batch(), draw())
        assert losses.keys() == {"diffusion", "total"} and "decoded_x0" not in keep
        losses, keep = evaluate(make_objective(reconstruction="none"), make_batch(), draw(coin=HEADS))
        assert losses.keys() == {"diffusion", "total"} and "model_pred_1" in keep

    def test_without_diffusion_there_is_only_reconstruction(self, make_objective, make_batch, models):
        def refuse(*_args):
            raise AssertionError("the U-Net was run")

        hook = models.unet.register_forward_pre_hook(refuse)
        try:
            objective = make_objective(diffusion=False, reconstruction="clean")
            losses, _ = evaluate(objective, make_batch(), draw())
        finally:
            hook.remove()
        assert losses.keys() == {"reconstruction", "total"}

    def test_alpha(self, make_objective, make_batch):
        batch = make_batch()
        once, twice = (evaluate(make_objective(alpha_weight=w), batch, draw())[0] for w in (1.0, 2.0))
        assert twice["alpha"] == pytest.approx(2 * once["alpha"]) and once["alpha"] > 0
        assert once["total"] == pytest.approx(once["diffusion"] + once["reconstruction"] + once["alpha"])

    def test_positions_are_those_of_the_surface_each_pixel_sees(self, make_objective, make_batch, models):
        """A reconstruction that is right has loss 0, one that is 0.01 off everywhere has 0.01."""
        batch = make_batch(2)
        objective = make_objective(position_weight=1.0, reconstruction="clean", diffusion=False)
        views = models.lgm.input_views(8)
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

    def test_the_second_pass_sees_the_rendered_maps_and_the_first_zeros(self, make_objective, make_batch, models):
        seen, original = [], models.unet.encode_feedback
        models.unet.encode_feedback = lambda maps: seen.append(maps) or original(maps)
        try:
            _, keep = evaluate(make_objective(), make_batch(), draw(coin=HEADS))
        finally:
            del models.unet.encode_feedback
        assert [sorted(maps) for maps in seen] == [["ccm", "rgb"]] * 2
        assert not seen[0]["rgb"].any() and not seen[0]["ccm"].any()
        assert torch.equal(seen[1]["rgb"], keep["render_x1"].clamp(0, 1))
        assert torch.equal(seen[1]["ccm"], keep["position_map"])

    @pytest.mark.parametrize("chosen", [["rgb"], ["ccm"]])
    def test_which_maps_it_sees(self, make_objective, make_batch, models, chosen):
        seen, original = [], models.unet.encode_feedback
        models.unet.encode_feedback = lambda maps: seen.append(maps) or original(maps)
        try:
            evaluate(make_objective(feedback=chosen), make_batch(), draw(coin=HEADS))
        finally:
            del models.unet.encode_feedback
        assert [name for name in ("rgb", "ccm") if seen[1][name].any()] == chosen


class TestGradients:
    def losses(self, objective, batch, coin):
        return objective(batch, draw(coin=coin))

    def test_of_diffusion_reach_the_reconstructor_only_through_feedback(self, make_objective, make_batch, models):
        without = self.losses(make_objective(), make_batch(), TAILS)["diffusion"]
        assert reaches(without, models.unet) and not reaches(without, models.lgm)
        with_it = self.losses(make_objective(), make_batch(), HEADS)["diffusion"]
        assert reaches(with_it, models.unet) and reaches(with_it, models.lgm)

    def test_detaching_the_feedback_stops_them(self, make_objective, make_batch, models):
        losses = self.losses(make_objective(detach_feedback=True), make_batch(), HEADS)
        assert reaches(losses["diffusion"], models.unet) and not reaches(losses["diffusion"], models.lgm)
        assert reaches(losses["reconstruction"], models.lgm)

    def test_detaching_changes_no_loss(self, make_objective, make_batch):
        one, other = (
            evaluate(make_objective(detach_feedback=d), make_batch(), draw(coin=HEADS))[0] for d in (False, True)
        )
        assert one == other

    @pytest.mark.parametrize("coin", [TAILS, HEADS])
    def test_of_reconstruction_reach_the_unet_only_with_decode_gradient(self, make_objective, make_batch, models, coin):
        for switch in (False, True):
            losses = self.losses(make_objective(decode_gradient=switch), make_batch(), coin)
            assert reaches(losses["reconstruction"], models.lgm)
            assert reaches(losses["reconstruction"], models.unet) == switch

    @pytest.mark.parametrize("coin", [TAILS, HEADS])
    def test_of_the_total_reach_every_trained_tensor_and_nothing_frozen(self, make_objective, make_batch, models, coin):
        objective = make_objective(second_loss="add")
        try:
            self.losses(objective, make_batch(), coin)["total"].backward()
            missing = [name for name, p in objective.named_parameters() if p.grad is None]
            assert not missing
            assert all(p.grad is None for p in models.svd.parameters())
        finally:
            objective.zero_grad()


class TestFreezing:
    """Which parts a loss trains; `objective.freeze` and the modes of training."""

    @staticmethod
    def moved(objective: Objective, models: Models, batch: OrbitBatch, coin: torch.Tensor) -> set[str]:
        """The parts with a gradient of the total."""
        try:
            objective(batch, draw(coin=coin))["total"].backward()
            return {name for name, part in models.parts.items() if any(p.grad is not None for p in part.parameters())}
        finally:
            for part in models.parts.values():
                part.zero_grad()

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({}, {"unet", "adapters", "rays", "lgm"}),
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
    def test_only_the_others_get_gradients(self, make_objective, make_batch, models, changes, parts, coin):
        objective = make_objective(**changes)
        try:
            assert self.moved(objective, models, make_batch(), coin) == parts
            networks = {"lgm" if part == "lgm" else "unet" for part in parts}
            assert {name.split(".")[1] for name in objective.state_dict()} == networks
        finally:
            make_objective()

    def test_it_changes_no_loss(self, make_objective, make_batch):
        frozen = {"freeze": ["unet"]}, {"freeze": ["unet", "adapters", "rays"]}, {}
        one, *others = (evaluate(make_objective(**f), make_batch(), draw(coin=HEADS))[0] for f in frozen)
        assert all(other == one for other in others)

    def test_a_frozen_reconstructor_passes_the_loss_of_its_renderings_on(self, make_objective, make_batch, models):
        changes = {"freeze": ["lgm"], "reconstruction": "predicted", "decode_gradient": True}
        losses = make_objective(**changes)(make_batch(), draw())
        make_objective()  # thaws
        assert reaches(losses["reconstruction"], models.unet.unet)

    def test_without_reconstruction_the_maps_of_a_frozen_lgm_still_train_the_adapters(
        self, make_objective, make_batch, models
    ):
        objective = make_objective(reconstruction="none", freeze=["unet", "rays"])
        losses, keep = {}, {}
        try:
            objective.record = keep.__setitem__
            losses = objective(make_batch(), draw(coin=HEADS))
            assert keep["position_map"].any() and not keep["position_map"].requires_grad
            assert reaches(losses["diffusion"], models.unet.cond_encoder)
        finally:
            make_objective()


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
        ("u", "context", "latent"),
        [(0.05, False, True), (0.15, False, False), (0.25, True, False), (0.35, True, True)],
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

    def test_clip_sees_the_noised_or_the_clean_picture(self, make_objective, make_batch, models):
        batch, draws = make_batch(), draw()
        image = batch.images[:, 0]
        noised = image + diffusion.lognormal_sigma(draws.condition_sigma, -3.0, 0.5) * draws.condition_image
        for kind, expected in (("noised", noised), ("clean", image)):
            objective = make_objective({"clip_training_image": kind}, reconstruction="none")
            _, keep = evaluate(objective, batch, draws)
            with torch.no_grad():
                torch.testing.assert_close(keep["context"], models.svd.embed_image(expected))

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


class TestParameters:
    @pytest.mark.parametrize(
        ("changes", "trained"),
        [
            ({}, {"unet", "lgm"}),
            ({"reconstruction": "none"}, {"unet"}),
            ({"diffusion": False, "reconstruction": "clean"}, {"lgm"}),
        ],
    )
    def test_only_what_is_trained_is_saved_and_requires_gradients(self, make_objective, models, changes, trained):
        objective = make_objective(**changes)
        try:
            assert {name.split(".")[1] for name in objective.state_dict()} == trained
            for name in ("unet", "lgm"):
                assert all(p.requires_grad == (name in trained) for p in getattr(models, name).parameters())
            assert not any(p.requires_grad for p in models.svd.parameters())
            assert not models.svd.train().training
        finally:
            make_objective()


def test_a_batch_is_collated_from_items(make_batch):
    batch = make_batch(2)
    items = [
        {"images": batch.images[i], "c2w": batch.cameras.c2w[i].double(), "K": batch.cameras.K[i], "id": batch.ids[i]}
        for i in range(2)
    ]
    collated = OrbitBatch.collate(items)
    assert torch.equal(collated.images, batch.images) and collated.ids == batch.ids
    assert collated.cameras.c2w.dtype == torch.float32 and collated.alpha is None and collated.depth is None
    items = [item | {"alpha": batch.alpha[i], "depth": batch.depth[i]} for i, item in enumerate(items)]
    assert torch.equal(OrbitBatch.collate(items).depth, batch.depth)
