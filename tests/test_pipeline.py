"""The Python door: what it takes, that it drives the one loop, and that it loads what it and the release write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import photos
import pytest
import torch
from PIL import Image

import ouroboros3d
from ouroboros3d import pipeline as module
from ouroboros3d.config.loading import load_config
from ouroboros3d.devices import DeviceError
from ouroboros3d.errors import ConfigError
from ouroboros3d.export import FormatError
from ouroboros3d.gaussians import load_ply
from ouroboros3d.inference.photo import ImageError
from ouroboros3d.models.weights import CheckpointError, save_checkpoint
from ouroboros3d.pipeline import Ouroboros3DPipeline

ROOT = Path(__file__).parents[1]


def make_pipeline(make_config, make_models, **changes) -> Ouroboros3DPipeline:
    config = make_config(
        {"sampler": {"steps": 2}, "turntable": {"size": 16, "step": 90}, **changes}, textbook=True, lean=True
    )
    pipe = Ouroboros3DPipeline(make_models(config), config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(make_config, make_models) -> Ouroboros3DPipeline:
    """Do not change."""
    return make_pipeline(make_config, make_models)


@pytest.fixture(scope="module")
def toys() -> list[Image.Image]:
    return [photos.toy(), photos.cut_out(40, 30, (2, 4, 38, 20), (20, 160, 90))]


def test_importing_the_package_is_light_and_the_pipeline_comes_on_demand():
    code = "import ouroboros3d, sys; sys.exit('torch' in sys.modules or 'Ouroboros3DPipeline' in vars(ouroboros3d))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert ouroboros3d.Ouroboros3DPipeline is Ouroboros3DPipeline


def test_the_output_is_what_the_sampler_yields(pipe, toys):
    output = pipe(toys[0], seed=3, output_type="pt", return_history=True)
    assert len(output) == 1 and output.views.shape == output.renders.shape == (1, 8, 3, 32, 32)
    assert output.cameras.c2w.shape == (1, 8, 4, 4) and output.gaussians.means.shape == (1, 8 // 2 * 64, 3)
    steps = list(pipe.steps(pipe.prepare_image(toys[0])[None], [3]))
    assert torch.equal(output.gaussians.means, steps[-1].gaussians.means)
    assert torch.equal(output.views[0], (steps[-1].views[0] * 0.5 + 0.5).clamp(0, 1))
    assert torch.equal(output.renders[0], steps[-1].rendering.rgb[0].clamp(0, 1))
    history = output.history[0]
    assert [s.sigma for s in history] == [s.sigma for s in steps] and set(history[0].maps) == {"rgb", "ccm"}
    assert torch.equal(history[0].gaussians.means, steps[0].gaussians.means)
    assert torch.equal(history[0].maps["ccm"], steps[0].feedback["ccm"][0])


def test_a_batch_with_seeds_of_its_own_equals_single_calls(pipe, toys):
    together = pipe(toys, seed=[1, 2], elevation=[0, 20], guidance_scale=2.0)
    for i, toy in enumerate(toys):
        alone = pipe(toy, seed=i + 1, elevation=20 * i, guidance_scale=2.0)
        for name in ("means", "scales", "opacities", "rgb"):
            one, other = (getattr(o.gaussians, name) for o in (alone[0], together[i]))
            assert torch.allclose(one, other, atol=1e-4)
        assert torch.allclose(alone[0].views, together[i].views, atol=1e-4)
    assert not torch.allclose(together[0].gaussians.means, together[1].gaussians.means, atol=1e-2)


def test_the_release_s_conventions_run_a_batch_one_by_one(make_config, make_models, toys):
    config = make_config({"sampler": {"steps": 1}}, lean=True)
    release = Ouroboros3DPipeline(make_models(config), config)
    release.set_progress_bar_config(disable=True)
    together = release(toys, seed=[1, 2])
    assert torch.equal(release(toys[1], seed=2)[0].gaussians.means, together[1].gaussians.means)


def test_pil_arrays_and_paths_are_the_same_picture(pipe, toys, tmp_path):
    toys[0].save(tmp_path / "toy.png")
    values = np.asarray(toys[0])
    expected = pipe.prepare_image(toys[0])
    for picture in (tmp_path / "toy.png", str(tmp_path / "toy.png"), values, values / 255):
        assert torch.equal(pipe.prepare_image(picture), expected)
    assert torch.equal(pipe.prepare_image(expected), expected)
    grey = pipe.prepare_image(np.full((8, 8), 51, np.uint8), remove_background=False)
    assert torch.allclose(grey, torch.tensor(-0.6))


def test_pil_output(pipe, toys):
    output = pipe(toys, num_inference_steps=1)
    assert [len(views) for views in output.views] == [8, 8] and output.renders[1][7].size == (32, 32)
    assert output.history == [(), ()]


def test_arguments_reach_the_loop(pipe, toys):
    seen = []
    pipe(
        toys[0],
        num_inference_steps=3,
        callback_on_step_end=lambda p, i, sigma, kept: seen.append((p is pipe, i, sigma, kept["step"].total)),
    )
    assert [s[:2] for s in seen] == [(True, 0), (True, 1), (True, 2)] and {s[3] for s in seen} == {3}
    assert seen[0][2] == pytest.approx(80.0)

    def views(**options):
        return pipe(toys[0], num_inference_steps=1, output_type="pt", **options).views

    assert torch.equal(views(guidance_scale=2.0), views(guidance_scale=[1, 2.0]))
    assert not torch.equal(views(guidance_scale=2.0), views(guidance_scale=1.0))
    assert torch.equal(views(), views(seed=0)) and not torch.equal(views(), views(seed=1))
    one, other = (views(generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other) and not torch.equal(one, views())
    assert pipe.config.sampler.steps == 2  # a call changes nothing of the pipeline


def test_an_exception_in_the_callback_ends_the_loop(pipe, toys):
    calls = []

    def cancel(*arguments):
        calls.append(arguments[1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(toys[0], callback_on_step_end=cancel)
    assert calls == [0]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"image": []}, ValueError, "no picture"),
        ({"image": "nowhere.png"}, ImageError, "nowhere.png: no such file"),
        ({"image": np.zeros((4, 4, 2))}, ImageError, r"\[4, 4, 2\]"),
        ({"image": np.full((4, 4), 7.0)}, ImageError, "0 to 1"),
        ({"image": np.zeros((4, 4), np.int64)}, ImageError, "int64"),
        ({"image": torch.zeros(3, 8, 8)}, ValueError, r"\[3, 32, 32\]"),
        ({"num_inference_steps": 0}, ConfigError, "sampler.steps = 0"),
        ({"elevation": 95}, ConfigError, "cameras.elevation = 95"),
        ({"guidance_scale": [1, 2, 3]}, ConfigError, "sampler.guidance"),
        ({"seed": [1, 2]}, ValueError, "1 pictures, but 2 of seed"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "not both"),
        ({"output_type": "np"}, ValueError, "'np'"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pipe, toys, options, error, words):
    with pytest.raises(error, match=words):
        pipe(**{"image": toys[0]} | options)


# ---------------------------------------------------------------- files


def test_an_object_saves_itself(pipe, toys, tmp_path):
    output = pipe(toys[0])
    assert output[0].save(tmp_path / "toy.ply") == tmp_path / "toy.ply"
    assert load_ply(tmp_path / "toy.ply").means.shape[1] <= output.gaussians.means.shape[1]
    output[0].save(tmp_path / "toy.png", columns=2)
    assert Image.open(tmp_path / "toy.png").size == (64, 4 * 32)
    output[0].save(str(tmp_path / "toy.mp4"))
    assert (tmp_path / "toy.mp4").stat().st_size > 0
    for name in ("toy.xyz", "toy", ".ply"):
        with pytest.raises(FormatError, match="no known format"):
            output[0].save(tmp_path / name)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize("layout", ["diffusers", "release"])
def test_save_and_load_give_the_same_objects(pipe, toys, tmp_path, layout):
    pipe.save_pretrained(tmp_path / "model", layout=layout)
    assert (tmp_path / "model" / "model_index.json").is_file() == (layout == "diffusers")
    loaded = Ouroboros3DPipeline.from_pretrained(tmp_path / "model", device="cpu")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.sampler == pipe.config.sampler and loaded.config.turntable == pipe.config.turntable
    one, other = (p(toys[0], output_type="pt") for p in (pipe, loaded))
    assert torch.equal(one.gaussians.means, other.gaussians.means) and torch.equal(one.views, other.views)


def test_half_precision(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    half = Ouroboros3DPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16, device="cpu")
    assert half.dtype == torch.bfloat16 and pipe.dtype == torch.float32
    assert half.to(torch.float32).dtype == torch.float32
    with pytest.raises(ConfigError, match="torch_dtype = 'int3'"):
        Ouroboros3DPipeline.from_pretrained(tmp_path / "model", torch_dtype="int3", device="cpu")


def test_the_release_s_two_files_take_the_release_s_dimensions(pipe, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "release", pipe.models, suffix=".pth")
    seen = []
    monkeypatch.setattr(Ouroboros3DPipeline, "from_config", classmethod(lambda cls, config, *rest: seen.append(config)))
    Ouroboros3DPipeline.from_pretrained(tmp_path / "release", overrides=["model.pretrained.svd=here"], device="cpu")
    expected = load_config(
        ROOT / "configs" / "baseline.yaml",
        [f"model.pretrained.checkpoint={tmp_path / 'release'}", "model.pretrained.svd=here"],
    )
    assert seen[0] == expected


def test_the_small_model_s_folder_has_its_configuration(tmp_path):
    """A copy of the folder is a model. After a change of configs/small.yaml: config.loading.save_model_config."""
    expected, found = load_config("configs/small.yaml"), load_config(ROOT / "checkpoints" / "small" / "config.yaml")
    expected.model.pretrained.checkpoint = None
    for part in ("model", "sampler", "cameras", "turntable"):
        assert getattr(found, part) == getattr(expected, part)


def test_the_small_model_loads_by_its_folder_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = Ouroboros3DPipeline.from_pretrained("checkpoints/small", device="cpu")
    expected = load_config(ROOT / "configs" / "small.yaml")
    for part in ("sampler", "cameras", "turntable"):
        assert getattr(pipe.config, part) == getattr(expected, part)


def test_what_from_pretrained_would_not_read_is_refused():
    """Overrides beside a Config object, another checkpoint, and files for parts that the folder brings."""
    for overrides, words in (
        (["model.pretrained.lgm=some/file"], "model.pretrained.lgm = 'some/file': is not read"),
        (["model.pretrained.vae=some/file"], "model.pretrained.vae = 'some/file': is not read"),
        (["model.pretrained.checkpoint=elsewhere"], "first argument names it"),
    ):
        with pytest.raises(ConfigError, match=words):
            Ouroboros3DPipeline.from_pretrained("checkpoints/small", overrides=overrides, device="cpu")
    with pytest.raises(ConfigError, match="overrides: a Config object takes none"):
        config = load_config("configs/small.yaml")
        Ouroboros3DPipeline.from_pretrained("checkpoints/small", config=config, overrides=["sampler.steps=2"])


@pytest.mark.parametrize("part", ["unet", "vae", "image_encoder", "conditioning", "lgm"])
def test_a_folder_without_one_part_is_named(pipe, tmp_path, part):
    pipe.save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model" / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'model'}: has no weights in {part}/"):
        Ouroboros3DPipeline.from_pretrained(tmp_path / "model", device="cpu")


def test_a_hub_id_is_fetched_once_and_a_missing_folder_never(pipe, tmp_path, monkeypatch):
    import huggingface_hub

    pipe.save_pretrained(tmp_path / "model")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: asked.append(name) or tmp_path / "model")
    assert Ouroboros3DPipeline.from_pretrained("somebody/model", device="cpu").device.type == "cpu"
    assert asked == ["somebody/model"]
    for source in (tmp_path / "none", "./none", "none", str(tmp_path / "none")):
        with pytest.raises(CheckpointError, match="no such checkpoint folder"):
            Ouroboros3DPipeline.from_pretrained(source, device="cpu")
    assert len(asked) == 1


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_named(pipe, tmp_path, device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    with pytest.raises(DeviceError, match=f"--device {device}"):
        Ouroboros3DPipeline.from_pretrained(tmp_path, device=device)


def test_on_mps_the_renderer_runs_on_the_cpu(pipe, toys):
    """MPS itself is not at hand: what is tested is that the wrapped renderer gives the same."""
    step = next(iter(pipe.steps(pipe.prepare_image(toys[0])[None], [0])))
    cameras = pipe.cameras([0.0])
    wrapped = module._on_cpu(pipe.sampler.renderer)(step.gaussians, cameras, 32)
    assert torch.equal(wrapped.rgb, step.rendering.rgb) and torch.equal(wrapped.depth, step.rendering.depth)


def test_the_small_model_may_sample_in_one_step():
    """Whatever its training's noise levels are."""
    assert load_config("configs/small.yaml", ["sampler.steps=1"]).sampler.steps == 1


def test_offload_is_asked_for_by_a_call(make_config, make_models, toys, monkeypatch):
    """The networks' turns are test_small_cards.py's; here, that they are asked for and the objects stay the same."""
    pipe = make_pipeline(make_config, make_models)
    expected = pipe(toys[0], output_type="pt").views
    assert pipe.enable_model_cpu_offload("cpu") is pipe and pipe.config.sampler.offload  # a CPU has nothing to save
    assert torch.equal(pipe(toys[0], output_type="pt").views, expected)
    asked = []
    monkeypatch.setattr(module, "pick_device", torch.device)
    monkeypatch.setattr(module, "check_renderer", lambda *_: None)
    monkeypatch.setattr(pipe.models, "to", lambda device, dtype, offload: asked.append((str(device), offload)))
    pipe.enable_model_cpu_offload("cuda")
    assert asked == [("cuda", True)]
