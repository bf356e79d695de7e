"""The recursive loop: what it repeats, what it feeds back and when, what it computes only once."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ouroboros3d.build import Models, build_sampler
from ouroboros3d.errors import ConfigError
from ouroboros3d.sampler import NumericalError, Sampler, SamplerStep, last_step, noise_seed

SEEDS = [7, 8]


def images(batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture
def make_sampler(make_config, lean_models):
    """make_sampler(models, steps=5): the release's conventions unless asked otherwise."""

    def make(models: Models | None = None, textbook: bool = False, **changes) -> Sampler:
        return build_sampler(models or lean_models, make_config({"sampler": changes}, textbook, lean=True))

    return make


def run(sampler: Sampler, cameras, batch: int = 1, seeds=None) -> list[SamplerStep]:
    noise = sampler.draw_noise(seeds or SEEDS[:batch], cameras.num_views)
    return list(sampler(images(batch), cameras, noise))


@contextmanager
def spied(owner: object, name: str) -> Iterator[list[tuple]]:
    """Collects the (positional arguments, result) of every call of a method."""
    calls: list[tuple] = []
    original = getattr(owner, name)

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    object.__setattr__(owner, name, spy)
    try:
        yield calls
    finally:
        object.__delattr__(owner, name)


class TestRepetition:
    def test_the_same_seed_gives_the_same_result(self, make_sampler, make_cameras):
        one, other = (run(make_sampler(), make_cameras())[-1] for _ in range(2))
        assert torch.equal(one.views, other.views)
        assert torch.equal(one.gaussians.to_tensor(), other.gaussians.to_tensor())

    def test_another_seed_gives_another(self, make_sampler, make_cameras):
        one, other = (run(make_sampler(), make_cameras(), seeds=[s])[-1] for s in SEEDS)
        assert (one.views - other.views).abs().max() > 1e-2

    def test_noise_of_a_sample_depends_on_its_own_seed_alone(self, make_sampler):
        both = make_sampler().draw_noise(SEEDS, 8)
        alone = make_sampler().draw_noise(SEEDS[1:], 8)
        assert torch.equal(both.latents[1:], alone.latents) and torch.equal(both.image[1:], alone.image)
        assert both.latents.shape == (2, 8, 4, 8, 8) and both.image.shape == (2, 3, 32, 32)

    def test_the_seed_of_an_object_follows_from_its_name(self):
        assert noise_seed(0, "../a/chair_0") == noise_seed(0, "chair_0") == noise_seed(0, "/b/chair_0")
        assert len({noise_seed(s, n) for s in (0, 1) for n in ("chair_0", "chair_1")}) == 4

    def test_with_textbook_options_a_batch_of_two_is_two_single_runs(self, make_sampler, make_cameras, lean_textbook):
        sampler, cameras = make_sampler(lean_textbook, textbook=True, steps=2), make_cameras(2)
        both = run(sampler, cameras, 2)
        for b in range(2):
            noise = sampler.draw_noise([SEEDS[b]], 8)
            alone = list(sampler(images(2)[b : b + 1], cameras.scenes([b]), noise))
            for one, step in zip(alone, both, strict=True):
                torch.testing.assert_close(step.views[b : b + 1], one.views, atol=1e-3, rtol=0)
                torch.testing.assert_close(step.x0[b : b + 1], one.x0, atol=1e-3, rtol=0)
        assert (both[-1].views[0] - both[-1].views[1]).abs().max() > 0.05

    def test_with_the_releases_it_is_not(self, make_sampler, make_cameras):
        """Quirks 2 and 14 mix the samples of a batch."""
        both = run(make_sampler(steps=1), make_cameras(2), 2)[-1]
        alone = run(make_sampler(steps=1), make_cameras(2).scenes([0]))[-1]
        assert (both.views[:1] - alone.views).abs().max() > 1e-2


class TestFeedback:
    @staticmethod
    def received(sampler: Sampler, cameras) -> tuple[list[SamplerStep], list[dict[str, torch.Tensor]]]:
        """The steps, and the maps whose features each step was given."""
        made, used = {}, []
        with spied(sampler.unet, "encode_feedback") as encoded, spied(sampler.unet, "forward") as forwards:
            steps = run(sampler, cameras)
        for (maps,), features in encoded:
            made[features.mid.sum().item()] = maps
        for args, _ in forwards:
            features = args[5]
            used.append(made[features.mid[: len(features.mid) // 2].sum().item()])  # one half of the guidance pair
        return steps, used

    @pytest.mark.parametrize(
        ("changes", "fed"),
        [
            ({}, [1, 2, 3, 4]),
            ({"feedback_from": 1}, [1, 2, 3, 4]),
            ({"feedback_from": 3}, [3, 4]),
            ({"feedback_to": 3}, [1, 2]),
            ({"feedback_from": 2, "feedback_to": 4}, [2, 3]),
            ({"feedback_every": 2}, [1, 3]),
            ({"feedback_every": 3}, [1, 4]),
            ({"feedback_from": 2, "feedback_every": 2}, [2, 4]),
            ({"feedback": []}, []),
        ],
    )
    def test_which_steps_get_the_maps_of_the_step_before(self, make_sampler, make_cameras, changes, fed):
        steps, used = self.received(make_sampler(steps=5, **changes), make_cameras())
        for i, maps in enumerate(used):
            assert maps.keys() == {"rgb", "ccm"}
            for name, value in maps.items():
                expected = steps[i - 1].feedback[name] if i in fed else torch.zeros_like(value)
                assert torch.equal(value, expected), (i, name)

    @pytest.mark.parametrize("name", ["rgb", "ccm"])
    def test_a_map_left_out_is_zero(self, make_sampler, make_cameras, name):
        steps, used = self.received(make_sampler(steps=2, feedback=[name]), make_cameras())
        for other in ("rgb", "ccm"):
            assert torch.equal(used[1][other], steps[0].feedback[other] * (other == name))

    def test_maps_are_of_the_steps_own_rendering_within_0_and_1(self, make_sampler, make_cameras):
        for step in run(make_sampler(), make_cameras()):
            assert torch.equal(step.feedback["rgb"], step.rendering.rgb.clamp(0, 1))
            assert step.feedback["ccm"].min() >= 0 and step.feedback["ccm"].max() <= 1

    def test_feedback_changes_the_result(self, make_sampler, make_cameras):
        without, with_it = (run(make_sampler(feedback=f), make_cameras())[-1] for f in ([], ["rgb", "ccm"]))
        assert (without.views - with_it.views).abs().max() > 1e-3

    def test_of_another_object_it_is_a_swap_in_a_pair(self, make_sampler, make_cameras, lean_textbook):
        def sample(whose: str, count: int = 2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            sampler = make_sampler(lean_textbook, textbook=True, steps=2, feedback_of=whose)
            with spied(sampler.unet, "encode_feedback") as encoded:
                views = run(sampler, make_cameras(2).scenes(slice(count)), count)[-1].views
            _, ((maps,), _) = encoded  # an empty one, then the maps of the first step
            return views, maps

        (own, first), (swapped, second) = sample("own"), sample("another")
        assert not torch.allclose(own, swapped, atol=1e-4)
        for name in ("rgb", "ccm"):
            assert torch.equal(first[name].flip(0), second[name]) and not torch.equal(first[name], second[name])
        with pytest.raises(ValueError, match="no other object"):
            sample("another", 1)

    def test_of_the_truth_every_step_but_the_first_sees_the_maps_it_was_given(self, make_sampler, make_cameras):
        truth = {
            name: torch.rand(1, 8, 3, 32, 32, generator=torch.Generator().manual_seed(5)) for name in ("rgb", "ccm")
        }
        sampler, cameras = make_sampler(steps=3, feedback_of="truth"), make_cameras()
        noise = sampler.draw_noise(SEEDS[:1], cameras.num_views)
        with spied(sampler.unet, "encode_feedback") as encoded:
            list(sampler(images(), cameras, noise, truth=truth))
        for (maps,), _ in encoded[1:]:
            assert all(torch.equal(maps[name], truth[name]) for name in truth)
        assert len(encoded) == 3
        with pytest.raises(ConfigError, match=r"feedback_of = 'truth'"):
            run(sampler, cameras)

    def test_a_model_without_adapters_runs(self, make_config, make_models, make_cameras):
        config = make_config(
            {"model": {"multiview": {"feedback": []}}, "sampler": {"feedback": [], "steps": 2}}, lean=True
        )
        assert len(run(build_sampler(make_models(config), config), make_cameras())) == 2


class TestCost:
    STEPS = 4

    @pytest.fixture
    def count(self, make_sampler, make_cameras):
        def count(**changes) -> dict[str, int]:
            sampler = make_sampler(steps=self.STEPS, **changes)
            methods = {
                "unet": (sampler.unet, "forward"),
                "lgm": (sampler.reconstructor, "forward"),
                "decode": (sampler.svd, "decode"),
                "embed": (sampler.svd, "embed_image"),
                "encode": (sampler.svd, "encode"),
                "unet rays": (sampler.unet, "encode_cameras"),
                "lgm rays": (sampler.reconstructor, "encode_cameras"),
                "adapters": (sampler.unet, "encode_feedback"),
            }
            spies = {key: spied(*where) for key, where in methods.items()}
            calls = {key: spy.__enter__() for key, spy in spies.items()}
            try:
                run(sampler, make_cameras())
            finally:
                for spy in spies.values():
                    spy.__exit__(None, None, None)
            return {key: len(made) for key, made in calls.items()}

        return count

    def test_networks_run_once_a_step_and_constants_once_a_run(self, count):
        once = dict.fromkeys(("embed", "encode", "unet rays", "lgm rays"), 1)
        every = dict.fromkeys(("unet", "lgm", "decode", "adapters"), self.STEPS)
        assert count() == once | every

    @pytest.mark.parametrize(
        ("changes", "adapters"),
        [({"feedback": []}, 1), ({"feedback_from": 3}, 2), ({"feedback_every": 2}, 3), ({"feedback_to": 2}, 2)],
    )
    def test_empty_feedback_is_encoded_at_most_once(self, count, changes, adapters):
        assert count(**changes)["adapters"] == adapters


class TestEveryStep:
    """Without it, steps whose 3D nobody sees are not decoded, and the result is the same."""

    @pytest.mark.parametrize(
        ("changes", "made"),
        [
            ({}, [0, 1, 2, 3]),
            ({"feedback": []}, [3]),
            ({"feedback_from": 3}, [2, 3]),
            ({"feedback_to": 2}, [0, 3]),
            ({"feedback_every": 2}, [0, 2, 3]),
        ],
    )
    def test_what_is_made(self, make_sampler, make_cameras, changes, made):
        sampler, cameras = make_sampler(steps=4, **changes), make_cameras()
        with spied(sampler.svd, "decode") as decoded:
            steps = list(sampler(images(), cameras, sampler.draw_noise(SEEDS[:1], 8), every_step=False))
        assert [step.index for step in steps] == made
        assert len(decoded) == len(made)
        expected = run(sampler, cameras)[-1]
        assert torch.equal(steps[-1].views, expected.views)
        assert torch.equal(steps[-1].gaussians.to_tensor(), expected.gaussians.to_tensor())


class TestGuidance:
    def test_the_first_view_is_purely_conditional_and_guidance_is_a_mix(self, make_sampler, make_cameras):
        sampler = make_sampler(steps=1, guidance=[1.0, 3.0])
        with spied(sampler.unet, "forward") as calls:
            (step,) = run(sampler, make_cameras())
        unconditional, conditional = calls[0][1].chunk(2)
        torch.testing.assert_close(step.v[:, 0], conditional[:, 0])
        torch.testing.assert_close(step.v[:, 7], unconditional[:, 7] + 3 * (conditional - unconditional)[:, 7])

    def test_a_guidance_of_one_needs_no_unconditional_half(self, make_sampler, make_cameras, lean_textbook):
        results = []
        for guidance, rows in ([1.0, 3.0], 2), ([1.0, 1.0], 1):
            sampler = make_sampler(lean_textbook, True, steps=1, guidance=guidance)
            with spied(sampler.unet, "forward") as calls:
                (step,) = run(sampler, make_cameras())
            assert len(calls[0][1]) == rows
            results.append((calls[0][1][-1:], step.v))
        (conditional, mixed), (_, v) = results
        torch.testing.assert_close(v, conditional, atol=1e-5, rtol=1e-4)
        assert (v - mixed).abs().max() > 1e-3

    @pytest.mark.parametrize("batch", [1, 2])
    def test_nor_does_the_releases_context_order(self, make_sampler, make_cameras, batch):
        """Quirk 2 lets the conditional half see the unconditional one's context, which is known to be zero."""
        results = []
        for guidance, rows in ([1.0, 1.0], batch), ([1.0, 1.0 + 1e-12], 2 * batch):
            sampler = make_sampler(guidance=guidance, steps=2)
            with spied(sampler.unet, "forward") as calls:
                steps = run(sampler, make_cameras(batch), batch)
            assert {len(result) for _, result in calls} == {rows}
            results.append(steps[-1].x0)
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)

    def test_the_unconditional_half_has_no_image(self, make_sampler, make_cameras):
        sampler = make_sampler(steps=1)
        with spied(sampler.unet, "forward") as calls:
            run(sampler, make_cameras())
        sample, _, context, ids, _, _ = calls[0][0]
        assert not context[0].any() and context[1].any()
        assert not sample[0, :, 4:].any() and sample[1, :, 4:].any()
        assert torch.equal(sample[0, :, :4], sample[1, :, :4])
        torch.testing.assert_close(ids, torch.tensor([[6.0, 127.0, 0.02]] * 2))

    def test_noise_augmentation_reaches_the_image_and_the_time_id(self, make_sampler, make_cameras, lean_models):
        sampler = make_sampler(steps=1, noise_augmentation=0.3)
        noise = sampler.draw_noise(SEEDS[:1], 8)
        with spied(sampler.unet, "forward") as calls:
            run(sampler, make_cameras())
        sample, _, context, ids, _, _ = calls[0][0]
        assert ids[:, 2].tolist() == pytest.approx([0.3, 0.3])
        with torch.no_grad():
            latent = lean_models.svd.encode(images() + 0.3 * noise.image)
            embedding = lean_models.svd.embed_image(images())  # of the clean image
        assert torch.equal(sample[1, 0, 4:], latent[0]) and torch.equal(sample[1, 7, 4:], latent[0])
        assert torch.equal(context[1], embedding[0])


class TestConditionLatent:
    def test_mode_needs_no_draw_and_sample_uses_it(self, make_config, make_models, make_cameras):
        results = []
        for kind in ("mode", "sample"):
            changes = {"model": {"conventions": {"condition_latent": kind}}, "sampler": {"steps": 1}}
            config = make_config(changes, lean=True)
            sampler = build_sampler(make_models(config), config)
            noise = sampler.draw_noise(SEEDS[:1], 8)
            assert (noise.posterior is None) == (kind == "mode")
            results.append(last_step(sampler(images(), make_cameras(), noise)).views)
        assert (results[0] - results[1]).abs().max() > 1e-4


class TestSteps:
    def test_numbers_shapes_and_order(self, make_sampler, make_cameras):
        sampler, cameras = make_sampler(), make_cameras()
        steps = run(sampler, cameras)
        assert [s.index for s in steps] == [0, 1, 2] and {s.total for s in steps} == {3}
        assert steps[0].sigma == pytest.approx(80.0) and steps[-1].sigma == pytest.approx(0.002)
        last = steps[-1]
        assert last.latents.shape == last.x0.shape == (1, 8, 4, 8, 8)
        assert last.views.shape == last.rendering.rgb.shape == (1, 8, 3, 32, 32)
        torch.testing.assert_close(last.latents, last.x0, atol=1e-4, rtol=0)  # the schedule ends at sigma 0

    def test_it_is_lazy(self, make_sampler, make_cameras):
        sampler = make_sampler()
        with spied(sampler.unet, "forward") as calls:
            steps = sampler(images(), make_cameras(), sampler.draw_noise([0], 8))
            assert len(calls) == 0
            next(steps)
            assert len(calls) == 1

    def test_it_needs_no_gradients_and_leaves_the_consumers_alone(self, make_sampler, make_cameras):
        sampler = make_sampler()
        for step in sampler(images(), make_cameras(), sampler.draw_noise([0], 8)):
            assert torch.is_grad_enabled()
            assert not step.views.requires_grad and not step.gaussians.means.requires_grad

    def test_last_step_calls_back_with_every_step(self, make_sampler, make_cameras):
        sampler, seen = make_sampler(), []
        last = last_step(sampler(images(), make_cameras(), sampler.draw_noise([0], 8)), seen.append)
        assert len(seen) == 3 and seen[-1] is last

    def test_seconds_are_collected(self, make_sampler, make_cameras):
        sampler = make_sampler()
        run(sampler, make_cameras())
        assert sampler.clock.seconds.keys() == {"condition", "unet", "decode", "reconstruct", "render"}


class TestErrors:
    @pytest.fixture
    def models(self, make_config, make_models) -> Models:
        return make_models(make_config(lean=True))

    def test_nan_in_the_diffusion_weights_names_step_and_part(self, make_sampler, make_cameras, models):
        models.unet.unet.conv_out.bias.data[0] = float("nan")
        with pytest.raises(NumericalError, match="latents of step 0"):
            run(make_sampler(models), make_cameras())

    @pytest.mark.parametrize("channel", [0, 3, 6, 9, 12])  # means, opacity, scales, quaternion, rgb
    def test_infinity_in_the_reconstructor_names_step_and_part(self, make_sampler, make_cameras, models, channel):
        models.lgm.conv.weight.data[channel] = float("nan")
        with pytest.raises(NumericalError, match="Gaussians of step 0") as caught:
            run(make_sampler(models), make_cameras())
        assert "\n" not in str(caught.value)

    def test_a_later_step_is_named(self, make_sampler, make_cameras, models):
        calls = []

        def spoil(_module, _args, output):
            calls.append(1)
            return output * float("nan") if len(calls) == 2 else output

        models.lgm.conv.register_forward_hook(spoil)
        with pytest.raises(NumericalError, match="Gaussians of step 1"):
            run(make_sampler(models), make_cameras())

    def test_shapes_that_do_not_fit(self, make_sampler, make_cameras):
        sampler = make_sampler()
        noise = sampler.draw_noise([0], 8)
        with pytest.raises(ValueError, match=r"image must be \[1, 3, 32, 32\], got \[1, 3, 16, 16\]"):
            next(sampler(torch.zeros(1, 3, 16, 16), make_cameras(), noise))
        with pytest.raises(ValueError, match=r"image must be \[2, 3, 32, 32\]"):
            next(sampler(images(), make_cameras(2), noise))
        with pytest.raises(ValueError, match=r"noise is for \(1, 8\).*cameras for \(1, 4\)"):
            next(sampler(images(), make_cameras(views=4), noise))


def test_four_views_are_enough(make_config, make_models, make_cameras):
    config = make_config({"cameras": {"num_views": 4, "orbit_frames": 4}, "sampler": {"steps": 1}}, lean=True)
    sampler = build_sampler(make_models(config), config)
    (step,) = run(sampler, make_cameras(views=4))
    assert step.views.shape[1] == 4
