"""The multi-view U-Net: SVD's own forward where nothing is added, and additions exactly where they belong."""

import copy
import functools

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from ouroboros3d.cameras import Cameras
from ouroboros3d.models.conditioning import Residuals
from ouroboros3d.models.multiview_unet import MultiViewUNet

NOTHING = Residuals([None] * 3, None, [None] * 3)


def inputs(batch: int, size: tuple[int, int] = (8, 8), views: int = 8, seed: int = 0):
    """sample, c_noise, context, time_ids of `batch` different samples."""
    randn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([[6.0, 127.0, 0.02 + 0.1 * b] for b in range(batch)])
    return randn(batch, views, 8, *size), randn(batch), randn(batch, 1, 16), ids


def feedback_maps(batch: int, size: int = 32, views: int = 8):
    g = torch.Generator().manual_seed(1)
    return {name: torch.rand(batch, views, 3, size, size, generator=g) for name in ("rgb", "ccm")}


@torch.no_grad()
def run(unet: MultiViewUNet, given, rays=NOTHING, feedback=NOTHING):
    return unet(*given, rays, feedback)


class TestAgainstDiffusers:
    @pytest.mark.parametrize("size", [(8, 8), (16, 8), (5, 7), (6, 6)])  # the last two do not halve evenly
    @pytest.mark.parametrize("batch", [1, 2])
    def test_without_residuals_it_is_diffusers_forward_bit_for_bit(self, textbook, batch, size):
        sample, t, context, ids = inputs(batch, size)
        diffusers = copy.deepcopy(textbook.unet.unet)
        diffusers.set_attn_processor(AttnProcessor2_0())
        with torch.no_grad():
            theirs = diffusers(sample, t, context, ids).sample
        assert torch.equal(run(textbook.unet, (sample, t, context, ids)), theirs)

    def test_residuals_of_zero_change_nothing(self, textbook, make_cameras):
        given = inputs(2)
        rays = textbook.unet.encode_cameras(make_cameras(2), 8)
        features = textbook.unet.encode_feedback(feedback_maps(2))

        def zero(r: Residuals) -> Residuals:
            return Residuals(
                [None if x is None else 0 * x for x in r.down],
                None if r.mid is None else 0 * r.mid,
                [0 * x for x in r.up],
            )

        assert torch.equal(run(textbook.unet, given, zero(rays), zero(features)), run(textbook.unet, given))
        assert not torch.equal(run(textbook.unet, given, rays), run(textbook.unet, given))
        assert not torch.equal(run(textbook.unet, given, feedback=features), run(textbook.unet, given))

    def test_a_scalar_noise_level_serves_the_whole_batch(self, textbook):
        sample, _, context, ids = inputs(2)
        t = torch.tensor(0.3)
        expected = run(textbook.unet, (sample, t.expand(2), context, ids))
        assert torch.equal(run(textbook.unet, (sample, t, context, ids)), expected)


class TestContextOrder:
    """Quirk 2: the release's order of the temporal context, which only a batch can tell."""

    def test_equal_for_one_sample_and_different_for_two(self, release, make_config):
        ordinary = MultiViewUNet(make_config(textbook=True).model).eval()
        ordinary.load_state_dict(release.unet.state_dict())
        for batch in (1, 2):
            given = inputs(batch)
            same = torch.equal(run(release.unet, given), run(ordinary, given))
            assert same == (batch == 1)
        sample, t, context, ids = inputs(2)
        context = context[:1].expand(2, -1, -1)  # one context for both samples: no order to see
        assert torch.equal(run(release.unet, (sample, t, context, ids)), run(ordinary, (sample, t, context, ids)))

    def test_row_r_sees_the_context_of_sample_r_mod_batch(self, release):
        given, seen = inputs(2), []
        block = release.unet.unet.mid_block.attentions[0].temporal_transformer_blocks[0]

        def note(_module, _args, kwargs) -> None:
            seen.append(kwargs["encoder_hidden_states"])

        hook = block.register_forward_pre_hook(note, with_kwargs=True)  # runs after the quirk's own
        try:
            run(release.unet, given)
        finally:
            hook.remove()
        (context,) = seen
        assert len(context) == 2 * 2 * 2  # two samples of 2 x 2 positions
        for row in range(len(context)):
            assert torch.equal(context[row], given[2][row % 2])

    @pytest.mark.parametrize("batch", [1, 2])
    def test_the_conditional_half_alone_is_its_rows_of_the_pair(self, release, make_cameras, batch):
        unet, (sample, t, context, ids) = release.unet, inputs(batch)
        rays = unet.encode_cameras(make_cameras(batch), 8)
        features = unet.encode_feedback(feedback_maps(batch))
        unconditional = sample.clone()
        unconditional[:, :, 4:] = 0
        pair = torch.cat([unconditional, sample]), t.repeat(2), torch.cat([0 * context, context]), ids.repeat(2, 1)
        expected = run(unet, pair, rays.repeat(2), features.repeat(2))[batch:]
        with torch.no_grad():
            alone = unet(sample, t, context, ids, rays, features, conditional_half=True)
            wrong = unet(sample, t, context, ids, rays, features)
        size = expected.norm()
        assert (alone - expected).norm() < 3e-6 * size < 1e-3 * size < (wrong - expected).norm()

    def test_so_it_is_at_the_full_model_s_width(self, make_config, make_models):
        unet = {"block_out_channels": [320, 320], "num_attention_heads": [5, 5]}
        wide = make_models(make_config({"model": {"multiview": {"unet": unet}}}, lean=True)).unet
        nothing, (sample, t, context, ids) = Residuals([None] * 2, None, [None] * 2), inputs(1, (4, 4))
        pair = sample.repeat(2, 1, 1, 1, 1), t.repeat(2), torch.cat([0 * context, context]), ids.repeat(2, 1)
        expected = run(wide, pair, nothing, nothing)[1:]
        with torch.no_grad():
            alone = wide(sample, t, context, ids, nothing, nothing, conditional_half=True)
        assert (alone - expected).norm() < 3e-6 * expected.norm()


class TestBatch:
    def test_a_batch_of_two_is_two_single_runs(self, textbook, make_cameras):
        unet, cameras, maps = textbook.unet, make_cameras(2), feedback_maps(2)

        def predict(which: slice) -> torch.Tensor:
            given = [x[which] for x in inputs(2)]
            rays = unet.encode_cameras(cameras.scenes(which), 8)
            return run(unet, given, rays, unet.encode_feedback({k: m[which] for k, m in maps.items()}))

        both = predict(slice(0, 2))
        torch.testing.assert_close(both[:1], predict(slice(0, 1)), atol=1e-5, rtol=0)
        torch.testing.assert_close(both[1:], predict(slice(1, 2)), atol=1e-5, rtol=0)
        assert (both[0] - both[1]).abs().max() > 0.1

    def test_repeating_residuals_is_repeating_the_batch(self, textbook, make_cameras):
        cameras = make_cameras(2)
        rays = textbook.unet.encode_cameras(cameras, 8)
        again = textbook.unet.encode_cameras(Cameras(cameras.c2w.repeat(2, 1, 1, 1), cameras.K.repeat(2, 1, 1, 1)), 8)
        for one, other in zip(
            [*rays.repeat(2).down, rays.repeat(2).mid, *rays.repeat(2).up],
            [*again.down, again.mid, *again.up],
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


class Trace:
    """What enters each up block and the mid block: (features, skips...)."""

    def __init__(self, unet: MultiViewUNet) -> None:
        self.unet, self.up, self.mid = unet, [], []

    def __enter__(self):
        def note_up(_module, args, _kwargs) -> None:
            self.up.append((args[0].clone(), [s.clone() for s in args[1]]))

        def note_mid(_module, args, _kwargs) -> None:
            self.mid.append(args[0].clone())

        inner = self.unet.unet
        self.hooks = [b.register_forward_pre_hook(note_up, with_kwargs=True) for b in inner.up_blocks]
        self.hooks.append(inner.mid_block.register_forward_pre_hook(note_mid, with_kwargs=True))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def skips(self) -> list[torch.Tensor]:
        """In the order in which the down path stored them."""
        return [s for _, own in reversed(self.up) for s in own]


def traced(unet, given, rays=NOTHING, feedback=NOTHING) -> Trace:
    with Trace(unet) as trace:
        run(unet, given, rays, feedback)
    return trace


class TestWhereResidualsAct:
    """The skips of three levels (a, b, c) with two layers each, in the order in which they are stored."""

    CONV_IN, A0, A1, A_DOWN, B0, B1, B_DOWN, C0, C1 = range(9)

    @pytest.fixture(scope="class")
    def plain(self, textbook):
        return traced(textbook.unet, inputs(1))

    @staticmethod
    def changed(one: Trace, other: Trace) -> list[int]:
        pairs = zip(one.skips(), other.skips(), strict=True)
        return [i for i, (a, b) in enumerate(pairs) if not torch.equal(a, b)]

    @pytest.mark.parametrize(
        ("place", "shape", "skip"), [(0, (32, 8, 8), CONV_IN), (1, (32, 4, 4), A_DOWN), (3, (64, 2, 2), C1)]
    )
    def test_rays_of_a_down_or_mid_block_also_change_the_skip_stored_before_it(
        self, textbook, plain, place, shape, skip
    ):
        ray = torch.randn(8, *shape, generator=torch.Generator().manual_seed(2))
        *down, mid = (ray if k == place else None for k in range(4))
        trace = traced(textbook.unet, inputs(1), rays=Residuals(down, mid, [None] * 3))
        assert torch.equal(trace.skips()[skip], plain.skips()[skip] + ray)
        assert self.changed(trace, plain) == list(range(skip, 9))
        if mid is not None:
            assert torch.equal(trace.mid[0], plain.mid[0] + ray)

    @pytest.mark.parametrize(("level", "shape"), [(0, (64, 2, 2)), (1, (64, 4, 4)), (2, (64, 8, 8))])
    def test_rays_of_an_up_block_change_what_enters_it(self, textbook, plain, level, shape):
        ray = torch.randn(8, *shape, generator=torch.Generator().manual_seed(2))
        up = [None] * 3
        up[level] = ray
        trace = traced(textbook.unet, inputs(1), rays=Residuals([None] * 3, None, up))
        assert torch.equal(trace.up[level][0], plain.up[level][0] + ray)
        assert self.changed(trace, plain) == []
        for earlier in range(level):
            assert torch.equal(trace.up[earlier][0], plain.up[earlier][0])

    def test_feedback_of_a_down_block_leaves_its_own_layers_skips_alone(self, textbook, plain):
        feature = torch.randn(8, 32, 8, 8, generator=torch.Generator().manual_seed(2))
        trace = traced(textbook.unet, inputs(1), feedback=Residuals([feature, None, None], None, []))
        assert self.changed(trace, plain) == list(range(self.A_DOWN, 9))
        downsampler = textbook.unet.unet.down_blocks[0].downsamplers[0]
        with torch.no_grad():
            expected = downsampler(plain.skips()[self.A1] + feature)
        assert torch.equal(trace.skips()[self.A_DOWN], expected)

    def test_the_last_feedback_level_acts_after_the_mid_block(self, textbook, plain):
        feature = torch.randn(8, 64, 2, 2, generator=torch.Generator().manual_seed(2))
        trace = traced(textbook.unet, inputs(1), feedback=Residuals([None] * 3, feature, []))
        assert self.changed(trace, plain) == []
        assert torch.equal(trace.mid[0], plain.mid[0])
        assert torch.equal(trace.up[0][0], plain.up[0][0] + feature)

    def test_encoded_feedback_has_one_level_a_cross_attention_block_and_the_mid(self, textbook):
        features = textbook.unet.encode_feedback(feedback_maps(1))
        assert [None if x is None else tuple(x.shape) for x in features.down] == [(8, 32, 8, 8), (8, 64, 4, 4), None]
        assert features.mid.shape == (8, 64, 2, 2)

    @pytest.mark.parametrize("size", [8, 7, 5])
    def test_rays_are_embedded_at_every_blocks_own_resolution(self, textbook, make_cameras, size):
        rays = textbook.unet.encode_cameras(make_cameras(1), size)
        run(textbook.unet, inputs(1, (size, size)), rays)  # would not add up otherwise
        half, quarter = (size + 1) // 2, ((size + 1) // 2 + 1) // 2
        assert [x.shape[-1] for x in (*rays.down, rays.mid, *rays.up)] == [
            size,
            half,
            quarter,
            quarter,
            quarter,
            half,
            size,
        ]


class TestAdapters:
    def test_the_features_of_two_adapters_add_up(self, textbook):
        unet, maps = textbook.unet, feedback_maps(1)
        features = unet.encode_feedback(maps)
        with torch.no_grad():
            rgb, ccm = (unet.cond_encoder[i](maps[name].flatten(0, 1)) for i, name in enumerate(("rgb", "ccm")))
        for level, total in enumerate([*features.down[:2], features.mid]):
            torch.testing.assert_close(total, rgb[level] + ccm[level], atol=1e-6, rtol=0)

    def test_the_order_of_the_maps_is_the_configs_not_the_dictionarys(self, textbook):
        maps = feedback_maps(1)
        features = textbook.unet.encode_feedback(maps)
        assert torch.equal(textbook.unet.encode_feedback(dict(reversed(maps.items()))).mid, features.mid)
        exchanged = {"rgb": maps["ccm"], "ccm": maps["rgb"]}
        assert not torch.equal(textbook.unet.encode_feedback(exchanged).mid, features.mid)

    def test_zero_maps_are_not_the_same_as_no_feedback(self, textbook):
        given = inputs(1)
        zeros = {k: torch.zeros_like(m) for k, m in feedback_maps(1).items()}
        features = textbook.unet.encode_feedback(zeros)
        assert not torch.equal(run(textbook.unet, given, feedback=features), run(textbook.unet, given))
        nothing = textbook.unet.encode_feedback(None)
        assert torch.equal(run(textbook.unet, given, feedback=nothing), run(textbook.unet, given))

    @pytest.mark.parametrize("names", [[], ["rgb"], ["ccm"]])
    def test_a_model_may_have_fewer_adapters(self, make_config, names):
        changes = {"model": {"multiview": {"feedback": names}}, "sampler": {"feedback": names}}
        config = make_config(changes, textbook=True).model
        unet = MultiViewUNet(config).eval()
        assert len(unet.cond_encoder) == len(names)
        given = inputs(1)
        features = unet.encode_feedback({k: m for k, m in feedback_maps(1).items() if k in names})
        assert torch.equal(run(unet, given, feedback=features), run(unet, given)) == (not names)

    def test_maps_that_do_not_fit_the_model_are_named(self, textbook):
        maps = feedback_maps(1)
        del maps["ccm"]
        with pytest.raises(ValueError, match=r"takes feedback maps \['rgb', 'ccm'\], got \['rgb'\]"):
            textbook.unet.encode_feedback(maps)

    def test_residual_branches_of_a_new_adapter_start_at_zero(self, make_config):
        config = make_config().model
        unet = MultiViewUNet(config)
        blocks = [r for adapter in unet.cond_encoder for b in adapter.body for r in b.resnets]
        assert len(blocks) == 2 * 3 * 2
        assert not any(p.any() for block in blocks for p in block.block2.parameters())
        assert all(block.block1.weight.any() for block in blocks)


@pytest.mark.parametrize("context", ["release", "textbook"])
def test_gradient_checkpointing_gives_the_same_gradients(make_config, make_models, make_cameras, context):
    config = make_config({"model": {"conventions": {"temporal_context": context}}})
    unet = make_models(config).unet.train()
    given, maps, calls = inputs(2), feedback_maps(2), []
    counted = unet.unet.down_blocks[0].resnets[0]
    counted.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        calls.clear()
        rays, features = unet.encode_cameras(make_cameras(2), 8), unet.encode_feedback(maps)
        unet(*given, rays, features).square().mean().backward()
        result = {name: p.grad.clone() for name, p in unet.named_parameters()}
        unet.zero_grad()
        return result, len(calls)

    plain, once = gradients()
    unet.unet.enable_gradient_checkpointing()
    recomputed, twice = gradients()
    assert (once, twice) == (1, 2)
    assert plain.keys() == recomputed.keys()
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-6, rtol=1e-4, msg=name)
