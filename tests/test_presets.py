"""Presets as layers of configuration, and the keys they are made of."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from ouroboros3d import devices
from ouroboros3d.build import build_models, build_sampler
from ouroboros3d.config.loading import load_config, save_config, save_model_config
from ouroboros3d.config.schema import SamplerConfig
from ouroboros3d.devices import inference_dtype
from ouroboros3d.errors import ConfigError
from ouroboros3d.models.svd import make_tiny_decoder
from ouroboros3d.models.weights import CheckpointError, save_checkpoint
from ouroboros3d.sampler import Sampler, plan_steps

SIGMAS = [80.0, 17.5, 2.5, 0.17, 0.002, 0.0]


def write(path, text):
    path.write_text(text)
    return path


class TestLayers:
    def test_it_lies_between_the_base_and_the_file(self, tmp_path):
        write(tmp_path / "base.yaml", "sampler: {feedback_every: 5, last_sigma: 7.0, steps: 9}")
        path = write(tmp_path / "top.yaml", "base: base.yaml\nsampler: {preset: fast, last_sigma: 3.0}")
        sampler = load_config(path, ["sampler.guidance_sigma=[1,2]"]).sampler
        assert (sampler.feedback_every, sampler.last_sigma, sampler.steps) == (2, 3.0, 9)
        assert (sampler.guidance_sigma, sampler.dtype) == ([1.0, 2.0], "half")

    def test_the_last_to_name_one_wins(self, tmp_path):
        path = write(tmp_path / "top.yaml", "sampler: {preset: fast}")
        assert load_config(path).sampler.loop_decoder == "half"
        assert load_config(path, ["sampler.preset=draft"]).sampler.loop_decoder == "tiny"
        assert load_config(path, ["sampler.preset=exact"]).sampler == SamplerConfig()

    def test_draft_is_fast_with_the_tiny_decoder_and_fewer_steps(self):
        fast, draft = (load_config(None, [f"sampler.preset={name}"]).sampler for name in ("fast", "draft"))
        assert draft == replace(fast, preset="draft", loop_decoder="tiny", step_share=0.8, last_sigma=0.5)
        assert (fast.taken_steps, draft.taken_steps) == (25, 20)

    def test_an_unknown_one_is_refused_with_the_names_there_are(self):
        with pytest.raises(ConfigError, match=r"sampler\.preset.*exact.*fast.*draft"):
            load_config(None, ["sampler.preset=faster"])

    def test_one_of_which_nothing_is_left_is_refused(self, tmp_path):
        every = "feedback_every: 1, feedback_sigma: null, guidance_sigma: null, last_sigma: 0.0, dtype: auto"
        every += ", loop_decoder: full"
        path = write(tmp_path / "run.yaml", f"sampler: {{preset: exact, {every}}}")
        with pytest.raises(ConfigError, match="sets every key of the preset"):
            load_config(path, ["sampler.preset=fast"])

    def test_it_reaches_a_model_folder_whose_configuration_is_whole(self, tmp_path):
        config = load_config("configs/small.yaml")
        config.model.pretrained.checkpoint = None
        save_model_config(config, tmp_path / "config.yaml")
        fast = load_config(tmp_path / "config.yaml", ["sampler.preset=fast"]).sampler
        assert fast == load_config("configs/small.yaml", ["sampler.preset=fast"]).sampler
        assert (fast.feedback_every, fast.steps) == (2, config.sampler.steps)

    def test_it_reaches_the_configuration_of_a_run(self, tmp_path):
        """In which every key is written out."""
        config = load_config("configs/small/joint.yaml", ["sampler.dtype=bf16"])
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config
        fast = load_config(tmp_path / "config.yaml", ["sampler.preset=fast"]).sampler
        assert (fast.feedback_every, fast.steps, fast.dtype) == (2, config.sampler.steps, "bf16")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("feedback_sigma=[3,1]", "lowest, highest"),
            ("guidance_sigma=[1]", "lowest, highest"),
            ("last_sigma=700", "must be less than scheduler.sigma_max"),
            ("last_sigma=-1", "at least 0"),
            ("step_share=0", "more than 0"),
            ("step_share=1.1", "at most 1"),
        ],
    )
    def test_values_that_cannot_be_meant(self, override, message):
        with pytest.raises(ConfigError, match=message):
            load_config(None, [f"sampler.{override}"])


class TestPlan:
    @staticmethod
    def plan(**changes):
        return plan_steps(SamplerConfig(steps=5, **changes), SIGMAS, every_step=False)

    def test_exact_does_everything(self):
        plans = self.plan()
        assert [p.sigma for p in plans] == SIGMAS[:5]
        assert all(p.guided and p.made for p in plans) and [p.fed for p in plans] == [False] + [True] * 4

    @pytest.mark.parametrize(
        ("changes", "fed", "made"),
        [
            ({"feedback_sigma": [0.1, 10.0]}, [2, 3], [1, 2, 4]),
            ({"feedback_sigma": [0.1, 10.0], "feedback_every": 2}, [3], [2, 4]),
            ({"feedback_sigma": [0.1, 10.0], "feedback_every": 2, "last_sigma": 0.2}, [3], [2, 3]),
            ({"feedback_sigma": [0.0, 0.01], "last_sigma": 0.2}, [], [3]),
            ({"feedback_sigma": [80.0, 90.0]}, [], [4]),  # the first step has nothing to be fed
        ],
    )
    def test_which_steps_are_fed_and_made(self, changes, fed, made):
        plans = self.plan(**changes)
        assert [i for i, p in enumerate(plans) if p.fed] == fed
        assert [i for i, p in enumerate(plans) if p.made] == made

    def test_guidance_within_an_interval(self):
        assert [p.halves for p in self.plan(guidance_sigma=[0.17, 17.5])] == [1, 2, 2, 2, 1]
        assert {p.halves for p in self.plan(guidance_sigma=[0.17, 17.5], guidance=[1.0, 1.0])} == {1}

    @pytest.mark.parametrize(("last", "steps"), [(0.0, 5), (0.002, 5), (0.1699, 5), (0.17, 4), (79.0, 2), (80.0, 1)])
    def test_the_loop_ends_with_the_first_step_at_or_below_last_sigma(self, last, steps):
        assert len(self.plan(last_sigma=last)) == steps


class TestLoop:
    @pytest.fixture(scope="class")
    def config(self, make_config):
        return make_config({"sampler": {"steps": 3}}, lean=True)

    @pytest.fixture(scope="class")
    def models(self, make_models, config):
        models = make_models(config)
        torch.manual_seed(1)
        config.model.tiny_decoder.channels, config.model.tiny_decoder.blocks = 8, [1, 1, 1]
        models.svd.tiny_decoder = make_tiny_decoder(config.model.tiny_decoder, 4).requires_grad_(False)
        return models

    @staticmethod
    def run(models, config, make_cameras, **changes):
        config = copy.deepcopy(config)
        for key, value in changes.items():
            setattr(config.sampler, key, value)
        sampler = build_sampler(models, config)
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
        return list(sampler(image, make_cameras(), sampler.draw_noise([7], 8)))

    def test_guidance_outside_its_interval_is_the_conditional_prediction(self, models, config, make_cameras):
        exact = self.run(models, config, make_cameras)
        none = self.run(models, config, make_cameras, guidance_sigma=[1e-4, 2e-4])
        unguided = self.run(models, config, make_cameras, guidance=[1.0, 1.0])
        first = self.run(models, config, make_cameras, guidance_sigma=[70.0, math.inf])
        assert torch.equal(none[-1].views, unguided[-1].views)
        assert torch.equal(first[0].v, exact[0].v)
        assert not torch.equal(first[1].v, exact[1].v)

    @pytest.mark.parametrize(("decoder", "size"), [("half", 16), ("tiny", 32)])
    def test_the_last_step_decodes_in_full(self, models, config, make_cameras, decoder, size):
        steps = self.run(models, config, make_cameras, loop_decoder=decoder)
        assert [s.views.shape[-1] for s in steps] == [size, size, 32]
        assert torch.equal(steps[-1].views, models.svd.decode(steps[-1].x0))
        assert steps[0].feedback["rgb"].shape[-1] == 32
        exact = self.run(models, config, make_cameras)
        assert torch.equal(steps[0].x0, exact[0].x0) and not torch.equal(steps[1].x0, exact[1].x0)

    def test_a_loop_cut_short_is_the_beginning_of_the_whole(self, models, config, make_cameras):
        whole, short = (self.run(models, config, make_cameras, last_sigma=s) for s in (0.0, 3.0))
        assert len(short) == 2 and torch.equal(short[-1].views, whole[1].views)
        assert {s.total for s in short} == {2}

    def test_a_share_of_the_steps_is_that_many_steps(self, models, config, make_cameras):
        share, fewer = (self.run(models, config, make_cameras, **c) for c in ({"step_share": 0.6}, {"steps": 2}))
        assert len(share) == 2 and torch.equal(share[-1].views, fewer[-1].views)

    def test_the_tiny_decoder_travels_with_the_checkpoint(self, models, config, tmp_path):
        save_checkpoint(tmp_path / "new", models, frozen=True)
        again = copy.deepcopy(config.model)
        again.pretrained.checkpoint = str(tmp_path / "new")
        latents = torch.randn(1, 8, 4, 8, 8)
        loaded = build_models(again).svd
        assert torch.equal(loaded.decode_in_loop(latents, "tiny"), models.svd.decode_in_loop(latents, "tiny"))
        again.pretrained.tiny_decoder = str(tmp_path / "nothing")
        with pytest.raises(CheckpointError, match=r"model\.pretrained\.tiny_decoder=.*no such folder"):
            build_models(again)

    def test_without_a_tiny_decoder_it_is_said_before_the_work(self, models, config):
        config = copy.deepcopy(config)
        config.sampler.loop_decoder = "tiny"
        svd = copy.copy(models.svd)
        svd.tiny_decoder = None
        with pytest.raises(ConfigError, match=r"model\.pretrained\.tiny_decoder"):
            Sampler(models.unet, svd, models.lgm, None, config.model, config.sampler)

    def test_compile_is_asked_for_graphs_of_static_shapes(self, models, config, monkeypatch):
        asked = []
        monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: asked.append((module, options)))
        config = copy.deepcopy(config)
        build_sampler(models, config)
        assert not asked
        config.sampler.compile = True
        build_sampler(models, config)
        assert [module for module, _ in asked] == [models.unet, models.svd.vae.decoder]
        assert all(options == {"mode": "reduce-overhead", "dynamic": False} for _, options in asked)

    @pytest.mark.parametrize("guidance", [[1.0, 1.0], [1.0, 3.0]])
    def test_steps_outlive_the_graphs_memory(self, models, config, make_cameras, monkeypatch, guidance):
        """A compiled network's outputs last until the next step begins; train.compile compiles for validation too."""
        exact = self.run(models, config, make_cameras, guidance=guidance)
        memory, marks = [], []

        def begin_step() -> None:
            marks.append(1)
            for output in memory:
                output.fill_(math.nan)
            memory.clear()

        networks = models.unet, models.svd.vae.decoder, models.lgm
        keep = lambda _m, _i, out: memory.extend([out] if isinstance(out, torch.Tensor) else vars(out).values())  # noqa: E731
        hooks = [network.register_forward_hook(keep) for network in networks]
        monkeypatch.setattr(models.svd, "decode_chunk", 0)
        monkeypatch.setattr(models.unet, "_compiled_call_impl", models.unet._call_impl)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", begin_step)
        steps = self.run(models, config, make_cameras, guidance=guidance)
        begin_step()
        for hook in hooks:
            hook.remove()
        assert len(marks) == len(exact) + 1
        for step, true in zip(steps, exact, strict=True):
            for name in ("latents", "x0", "views", "v"):
                assert torch.equal(getattr(step, name), getattr(true, name))
            assert torch.equal(step.gaussians.to_tensor(), true.gaussians.to_tensor())


@pytest.mark.parametrize(
    ("name", "device", "bf16", "expected"),
    [
        ("auto", "cpu", True, torch.float32),
        ("half", "cpu", True, torch.bfloat16),
        ("half", "cpu", False, torch.float32),  # emulated it would be slower
        ("auto", "cuda", False, torch.float16),
        ("half", "cuda", False, torch.float16),
        ("bf16", "cpu", False, torch.bfloat16),
        ("float32", "cuda", True, torch.float32),
    ],
)
def test_precision_by_device(monkeypatch, name, device, bf16, expected):
    monkeypatch.setattr(devices, "_multiplies_bf16", lambda: bf16)
    assert inference_dtype(name, torch.device(device)) == expected
