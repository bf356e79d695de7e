"""The reconstructor: public weights start unchanged, every variant does what its name says."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ouroboros3d.gaussians import Gaussians
from ouroboros3d.models.lgm import LGM
from ouroboros3d.models.lgm_growth import grown
from ouroboros3d.models.lgm_unet import sinusoidal_embedding
from ouroboros3d.models.weights import CheckpointError, load_lgm

C_NOISE = torch.tensor(0.7)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def reconstruct(lgm: LGM, images, cameras, c_noise=C_NOISE) -> torch.Tensor:
    return lgm(images, cameras, c_noise).to_tensor()


def new_lgm(make_config, rotation: str = "release") -> LGM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LGM(make_config().model.lgm, rotation).eval()


class TestNoiseLevel:
    def test_it_has_no_effect_on_a_new_model(self, make_config, make_cameras, images):
        lgm = new_lgm(make_config)
        one, other = (reconstruct(lgm, images, make_cameras(2), torch.tensor(t)) for t in (0.0, 1.6))
        assert torch.equal(one, other)

    def test_it_has_one_afterwards(self, release, make_cameras, images):
        one, other = (reconstruct(release.lgm, images, make_cameras(2), torch.tensor(t)) for t in (0.0, 1.6))
        assert (one - other).abs().max() > 1e-3

    def test_a_network_that_is_told_none_acts_as_at_0(self, release, make_cameras, images):
        plain = LGM(replace(release.lgm.config, noise_level=False), release.lgm.rotation)
        plain.load_state_dict(release.lgm.state_dict())
        told = reconstruct(release.lgm, images, make_cameras(2), torch.tensor(0.0))
        for level in (0.0, 1.3):
            assert torch.equal(reconstruct(plain, images, make_cameras(2), torch.tensor(level)), told)

    def test_one_level_a_sample_or_one_for_all(self, textbook, make_cameras, images):
        levels = torch.tensor([0.2, 1.1])
        together = reconstruct(textbook.lgm, images, make_cameras(2), levels)
        for sample, level in enumerate(levels):
            alone = reconstruct(textbook.lgm, images, make_cameras(2), level)
            torch.testing.assert_close(together[sample], alone[sample], atol=1e-5, rtol=0)

    def test_its_embedding_is_cosines_then_sines(self):
        t = torch.tensor([0.0, 2.0])
        frequencies = torch.tensor([1.0, 0.01])  # 10000^0 and 10000^(-1/2)
        expected = torch.cat([(t[:, None] * frequencies).cos(), (t[:, None] * frequencies).sin()], 1)
        torch.testing.assert_close(sinusoidal_embedding(t, 4), expected)


class TestPublicWeights:
    """Weights of LGM itself, which know no noise level."""

    @pytest.fixture
    def public(self, release):
        state = release.lgm.state_dict()
        return {k: v for k, v in state.items() if "time_embed" not in k and "emb_layers" not in k}

    def test_they_load_and_the_noise_level_has_no_effect(
        self, release, make_config, make_cameras, images, public, tmp_path
    ):
        assert 0 < len(public) < len(release.lgm.state_dict())
        save_file(public, tmp_path / "model.safetensors")
        lgm = new_lgm(make_config)
        load_lgm(tmp_path / "model.safetensors", lgm)
        loaded = lgm.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in public.items())
        one, other = (reconstruct(lgm, images, make_cameras(2), torch.tensor(t)) for t in (0.0, 1.6))
        assert torch.equal(one, other)

    def test_any_other_missing_key_is_named(self, make_config, public, tmp_path):
        del public["unet.mid_block.nets.0.conv1.weight"], public["conv.bias"]
        save_file(public, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="2 missing") as error:
            load_lgm(tmp_path / "model.safetensors", new_lgm(make_config))
        assert "conv.bias" in str(error.value) and "unet.mid_block.nets.0.conv1.weight" in str(error.value)


class TestViews:
    @pytest.mark.parametrize(
        ("views", "chosen"), [(4, [0, 1, 2, 3]), (8, [0, 2, 4, 6]), (9, [0, 2, 4, 6]), (16, [0, 4, 8, 12])]
    )
    def test_which_ones_are_read(self, release, views, chosen):
        assert release.lgm.input_views(views) == chosen

    def test_too_few_are_refused(self, release):
        with pytest.raises(ValueError, match="reads 4 views, got 3"):
            release.lgm.input_views(3)

    def test_only_those_matter_and_every_one_reaches_all_gaussians(self, textbook, make_cameras, images):
        cameras, images = make_cameras(1), images[:1]
        plain = reconstruct(textbook.lgm, images, cameras)
        for view in (1, 6):
            changed = images.clone()
            changed[:, view] *= -1
            difference = (reconstruct(textbook.lgm, changed, cameras) - plain).abs()
            per_view = difference[0].unflatten(0, (4, 64)).amax((1, 2))
            assert (per_view > 0).tolist() == [view == 6] * 4

    def test_gaussians_are_ordered_by_view_row_column(self, textbook, make_cameras, images):
        outputs = []
        hook = textbook.lgm.conv.register_forward_hook(lambda _m, _a, output: outputs.append(output))
        try:
            means = reconstruct(textbook.lgm, images, make_cameras(2))[..., :3]
        finally:
            hook.remove()
        raw = outputs[0].unflatten(0, (2, 4))  # [B, view, channel, row, column]
        for b, view, row, column in ((0, 0, 0, 1), (1, 2, 5, 3)):
            expected = raw[b, view, :3, row, column].clamp(-1, 1)
            assert torch.equal(means[b, view * 64 + row * 8 + column], expected)

    def test_a_batch_of_two_is_two_single_runs(self, release, textbook, make_cameras, images):
        cameras = make_cameras(2)
        for models in (release, textbook):
            both = reconstruct(models.lgm, images, cameras)
            for b in range(2):
                alone = reconstruct(models.lgm, images[b : b + 1], cameras.scenes([b]))
                torch.testing.assert_close(both[b : b + 1], alone, atol=1e-5, rtol=0)

    def test_rays_made_beforehand_are_the_same(self, textbook, make_cameras, images):
        cameras = make_cameras(2)
        rays = textbook.lgm.encode_cameras(cameras)
        assert rays.shape == (2, 4, 6, 16, 16)
        with torch.no_grad():
            given = textbook.lgm(images, cameras, C_NOISE, rays).to_tensor()
        assert torch.equal(given, reconstruct(textbook.lgm, images, cameras))


class TestActivations:
    @pytest.fixture
    def raw(self) -> torch.Tensor:
        return torch.randn(2, 50, 14, generator=torch.Generator().manual_seed(1)) * 3

    def test_ranges(self, release, raw):
        g = release.lgm.activate(raw)
        torch.testing.assert_close(g.means, raw[..., :3].clamp(-1, 1))
        torch.testing.assert_close(g.opacities, 1 / (1 + (-raw[..., 3]).exp()))
        torch.testing.assert_close(g.scales, 0.1 * (1 + raw[..., 4:7].exp()).log())
        torch.testing.assert_close(g.rgb, 0.5 * raw[..., 11:].tanh() + 0.5)

    def test_textbook_quaternions_have_unit_length(self, textbook, raw):
        quats = textbook.lgm.activate(raw).quats
        torch.testing.assert_close(quats.norm(dim=-1), torch.ones(2, 50))
        torch.testing.assert_close(quats * raw[..., 7:11].norm(dim=-1, keepdim=True), raw[..., 7:11])

    def test_release_quaternions_have_unit_columns_within_a_sample(self, release, raw):
        """Quirk 17: so few-thousandth parts of a rotation, and covariances that are nearly axis-aligned."""
        quats = release.lgm.activate(raw).quats
        torch.testing.assert_close(quats.norm(dim=1), torch.ones(2, 4))
        torch.testing.assert_close(release.lgm.activate(raw[:1]).quats, quats[:1])

    def test_the_two_differ_in_nothing_else(self, release, textbook, raw):
        one, other = (models.lgm.activate(raw).to_tensor() for models in (release, textbook))
        assert torch.equal(one[..., :7], other[..., :7]) and torch.equal(one[..., 11:], other[..., 11:])
        assert not torch.equal(one[..., 7:11], other[..., 7:11])


def test_gradient_checkpointing_gives_the_same_gradients(make_models, make_cameras, images):
    lgm, calls = make_models().lgm.train(), []
    lgm.unet.down_blocks[1].nets[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        calls.clear()
        lgm(images, make_cameras(2), C_NOISE).to_tensor().square().sum().backward()
        result = {name: p.grad.clone() for name, p in lgm.named_parameters()}
        lgm.zero_grad()
        return result, len(calls)

    plain, once = gradients()
    lgm.unet.gradient_checkpointing = True
    recomputed, twice = gradients()
    assert (once, twice) == (1, 2)
    for name, gradient in plain.items():
        assert gradient.any(), name
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_it_is_a_reconstructor(release, make_cameras, images):
    gaussians = release.lgm(images, make_cameras(2), C_NOISE)
    assert isinstance(gaussians, Gaussians)
    assert gaussians.means.shape == (2, 4 * 8 * 8, 3)
    assert gaussians.means.dtype == torch.float32


class TestChoices:
    """What a configuration can change about the reconstructor; off by default."""

    @staticmethod
    def like(lgm: LGM, make_config, **changes) -> LGM:
        """The same weights under another configuration."""
        other = LGM(make_config({"model": {"lgm": changes}}).model.lgm, lgm.rotation).eval()
        other.load_state_dict(lgm.state_dict())
        return other

    def test_a_bounded_noise_level_is_told_below_the_bound_as_the_bound(
        self, textbook, make_config, make_cameras, images
    ):
        bounded = self.like(textbook.lgm, make_config, lowest_noise_level=-0.25)
        cameras, levels = make_cameras(2), torch.tensor([-1.55, 0.5])
        clamped = reconstruct(textbook.lgm, images, cameras, torch.tensor([-0.25, 0.5]))
        assert torch.equal(reconstruct(bounded, images, cameras, levels), clamped)
        assert not torch.equal(reconstruct(textbook.lgm, images, cameras, levels), clamped)

    def test_a_smallest_scale_bounds_the_scales_and_moves_nothing_else(
        self, textbook, make_config, make_cameras, images
    ):
        bounded = reconstruct(self.like(textbook.lgm, make_config, smallest_scale=0.1), images, make_cameras(2))
        plain = reconstruct(textbook.lgm, images, make_cameras(2))
        torch.testing.assert_close(bounded[..., 4:7], torch.hypot(plain[..., 4:7], torch.tensor(0.1)))
        assert torch.equal(bounded[..., :4], plain[..., :4]) and torch.equal(bounded[..., 7:], plain[..., 7:])

    def test_residual_colours_start_from_the_pixels(self, textbook, make_config, make_cameras, images):
        lgm = self.like(textbook.lgm, make_config, colours="residual")
        with torch.no_grad():
            lgm.conv.weight[11:], lgm.conv.bias[11:] = 0, 0
        rgb = reconstruct(lgm, images, make_cameras(2))[..., 11:]
        view, row, column = 1, 5, 3  # of an 8 x 8 grid over 32 x 32 pixels, view 2 of the 8
        expected = images[1, 2, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean((1, 2)) * 0.5 + 0.5
        torch.testing.assert_close(rgb[1, view * 64 + row * 8 + column], expected)

    def test_residual_colours_stay_in_range_and_move_nothing_else(self, textbook, make_config, make_cameras, images):
        lgm = self.like(textbook.lgm, make_config, colours="residual")
        residual, absolute = (reconstruct(m, 2 * images, make_cameras(2)) for m in (lgm, textbook.lgm))
        assert torch.equal(residual[..., :11], absolute[..., :11])
        assert residual[..., 11:].min() >= 0 and residual[..., 11:].max() <= 1

    def test_chroma_is_the_pixels_and_brightness_the_networks(self, textbook, make_config, make_cameras, images):
        lgm = self.like(textbook.lgm, make_config, colours="chroma")
        grey = images.mean(dim=2, keepdim=True).expand_as(images)
        rgb = reconstruct(lgm, grey, make_cameras(2))[..., 11:]
        absolute = reconstruct(textbook.lgm, grey, make_cameras(2))[..., 11:]
        assert absolute.std(dim=-1).max() > 0.05
        torch.testing.assert_close(rgb, absolute.mean(dim=-1, keepdim=True).expand_as(rgb), atol=1e-5, rtol=0)
        coloured = reconstruct(lgm, images, make_cameras(2))[1, 1 * 64 + 5 * 8 + 3, 11:]
        pixel = images[1, 2, :, 20:24, 12:16].mean((1, 2)) * 0.5 + 0.5
        torch.testing.assert_close(coloured - coloured.mean(), pixel - pixel.mean(), atol=1e-5, rtol=0)


def test_a_grown_grid_starts_from_the_same_features(make_models, make_config, make_cameras, images, load_script):
    """Each coarse pixel's features four times, then smaller and more transparent Gaussians, coloured by the pixels."""
    narrow = {"down_channels": [32] * 3, "up_channels": [32] * 2}
    fine = {"up_channels": [32] * 3, "up_attention": [True, False, False], "colours": "residual"}
    coarse = make_models(make_config({"model": {"lgm": narrow}}, textbook=True)).lgm
    lgm = LGM(make_config({"model": {"lgm": narrow | fine}}).model.lgm, "textbook").eval()
    lgm.load_state_dict(grown(coarse.state_dict()))
    seen = []
    for network in (coarse, lgm):
        network.unet.norm_out.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    gaussians = [reconstruct(network, images, make_cameras(2)) for network in (coarse, lgm)]
    repeated = seen[0].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(seen[1], repeated, atol=1e-5, rtol=1e-5)
    assert gaussians[1].shape[1] == 4 * gaussians[0].shape[1]
    assert gaussians[1][..., 3].mean() < gaussians[0][..., 3].mean()
    assert gaussians[1][..., 4:7].mean() < gaussians[0][..., 4:7].mean()
    pixels = images[:, ::2].permute(0, 1, 3, 4, 2).unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    torch.testing.assert_close(gaussians[1][..., 11:], pixels.flatten(1, 3) * 0.5 + 0.5)


def test_only_weights_whose_last_level_has_the_first_ones_width_grow(textbook, load_script, tmp_path):
    save_file(textbook.lgm.state_dict(), tmp_path / "lgm.safetensors")
    with pytest.raises(CheckpointError, match="has 64 channels; growing wants 32"):
        load_script("grow_lgm").main([str(tmp_path / "lgm.safetensors"), "--out", str(tmp_path / "out.safetensors")])
