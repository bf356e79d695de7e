"""The GPU path without a GPU: does a tensor on the CPU meet one on the device, and what runs in half precision?

Fake tensors compute shapes, dtypes and devices, and refuse to mix devices as CUDA does. Their device is called "meta"
here: a CPU build of torch cannot run autograd on fake tensors called "cuda".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ouroboros3d import sampler
from ouroboros3d.build import Models, build_cameras, build_models
from ouroboros3d.config.schema import Config
from ouroboros3d.diffusion import euler_schedule
from ouroboros3d.objective import Objective
from ouroboros3d.rendering import dense, render
from ouroboros3d.sampler import Noise, Sampler, last_step
from ouroboros3d.training.dry_run import _flat_renderer, blank_batch
from ouroboros3d.training.setup import prepare_training

GPU = torch.device("meta")


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def models_on_gpu(config: Config) -> Models:
    """Networks and their constants as fake tensors on the device."""
    with unset_fake_temporarily():
        models = build_models(config.model)
    for network in (models.unet, models.lgm, models.svd):
        for part in network.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    new = torch.empty(parameter.shape, dtype=parameter.dtype, device=GPU)
                    part._parameters[name] = nn.Parameter(new, parameter.requires_grad)
            part._buffers |= {n: torch.empty(b.shape, dtype=b.dtype, device=GPU) for n, b in part._buffers.items()}
    return models


def to_gpu(draws):
    moved = {f.name: getattr(draws, f.name) for f in fields(draws)}
    return replace(draws, **{name: x.to(GPU) if isinstance(x, Tensor) else x for name, x in moved.items()})


def test_the_simulation_sees_a_tensor_left_on_the_cpu(fake):
    with pytest.raises(FakeTensorDeviceMismatchError):
        torch.empty(2, device=GPU) + torch.empty(2)


class Sigmas(list):
    """Noise levels lie on the CPU, where their values are known; as tensors they would be fake."""

    tolist = list.copy


def schedule_on_gpu(config, steps: int, _device):
    """diffusers' own, with timesteps on the device."""
    with unset_fake_temporarily():
        scheduler = euler_schedule(config, steps)
        scheduler.sigmas = Sigmas(scheduler.sigmas.tolist())
    scheduler.timesteps = torch.empty(steps, device=GPU)
    return scheduler


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_the_loop(fake, make_config, monkeypatch, preset):
    """Also that no step waits for the device: fake tensors refuse to tell their values."""
    fast = {"feedback_every": 2, "guidance_sigma": [0.5, 100.0], "loop_decoder": "half"}
    config = make_config({"sampler": {"steps": 3} | (fast if preset == "fast" else {})}, lean=True)
    looks = []
    monkeypatch.setattr(sampler.FiniteWatch, "look", lambda _self: looks.append(1))  # the one wait
    monkeypatch.setattr(sampler.diffusion, "euler_schedule", schedule_on_gpu)
    with unset_fake_temporarily():
        cameras = build_cameras(config)
    models = models_on_gpu(config).eval()
    run = Sampler(models.unet, models.svd, models.lgm, _flat_renderer, config.model, config.sampler)
    size, views = config.model.image_size, config.cameras.num_views
    picture, latents = (1, 3, size, size), (1, views, 4, size // 4, size // 4)
    noise = Noise(torch.empty(picture, device=GPU), torch.empty(latents, device=GPU))
    step = last_step(run(torch.empty(picture, device=GPU), cameras.to(GPU), noise))
    assert step.views.device == step.gaussians.means.device == step.feedback["ccm"].device == GPU
    assert len(looks) == 1


class HostData(TorchFunctionMode):
    """Collects what makes tensors of Python's numbers: on CUDA they are copied from the host, and waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        makes = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not isinstance(args[-1], Tensor)
        index = tree_leaves(args[1:], is_leaf=lambda x: isinstance(x, list)) if func is Tensor.__getitem__ else []
        if makes or any(isinstance(x, list) for x in index):
            self.readers.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("colours", ["absolute", "residual"])
def test_reconstruction_and_background_copy_nothing_from_the_host(fake, make_config, monkeypatch, colours):
    config = make_config({"model": {"lgm": {"colours": colours}}}, lean=True)
    with unset_fake_temporarily():
        cameras = build_cameras(config)
    lgm, cameras = models_on_gpu(config).lgm.eval(), cameras.to(GPU)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # of which meta has none
    monkeypatch.setattr(dense, "rasterize", lambda _g, _c, _size, background, *_: background)
    with HostData() as host, torch.no_grad():
        images = torch.empty(1, 8, 3, 32, 32, device=GPU)
        gaussians = lgm(images, cameras, torch.empty((), device=GPU))
        background = render(gaussians, cameras, 32, (0.1, 0.5, 1.0), backend="dense")
    assert background.shape == (3,) and background.device == GPU
    assert host.readers == []


def test_the_objective_forward_and_backward(fake, make_config):
    changes = {"train": {"batch_size": 2}, "objective": {"decode_gradient": True, "second_loss": "add"}}
    config = make_config(changes, lean=True)
    models = models_on_gpu(config)
    prepare_training(models, config)
    with unset_fake_temporarily():  # it reads the sampler's noise levels
        objective = Objective(models.unet, models.svd, models.lgm, _flat_renderer, config)
    draws = to_gpu(replace(objective.draw(0, 0, [0, 1], blank_batch(config)), feedback=1.0))
    objective(blank_batch(config).to(GPU), draws)["total"].backward()
    gradients = [p.grad for p in objective.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.device == GPU for g in gradients)


def test_ema_after_a_resume_must_be_moved_to_the_device(fake):
    """accelerate loads it on the CPU; test_resume.py sees to it that a resume moves it."""
    network = nn.Linear(2, 2, device=GPU)
    ema = EMAModel(list(network.parameters()), decay=0.9, foreach=True)
    ema.step(network.parameters())
    ema.load_state_dict(ema.state_dict() | {"shadow_params": [torch.empty(2, 2), torch.empty(2)]})
    with pytest.raises(FakeTensorDeviceMismatchError):
        ema.step(network.parameters())
    ema.to(GPU)
    ema.step(network.parameters())
    assert {p.device for p in ema.shadow_params} == {GPU}


# ---------------------------------------------------------------- precision, on real tensors


def watched(models: Models) -> dict[str, torch.dtype]:
    """Filled with the dtype of what these layers make."""
    vae, lgm, seen = models.svd.vae, models.lgm, {}
    layers = {"image_encoder": models.svd.image_encoder.visual_projection, "unet": models.unet.unet.conv_in}
    layers |= {"vae.encoder": vae.encoder.conv_in, "vae.decoder": vae.decoder.conv_in}
    for name, layer in (layers | {"lgm": lgm.unet.conv_in, "lgm's head": lgm.conv}).items():
        layer.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.dtype}))
    return seen


def test_the_loop_in_half_precision_keeps_the_encoder_and_the_head_in_float32(make_config, make_models):
    config = make_config({"sampler": {"steps": 1}}, lean=True)
    models = make_models(config).to("cpu", torch.bfloat16)
    constants = [b.dtype for b in (models.lgm._mean, models.svd._mean)]
    assert constants == [torch.float32] * 2
    seen = watched(models)
    run = Sampler(models.unet, models.svd, models.lgm, _flat_renderer, config.model, config.sampler)
    last_step(run(torch.zeros(1, 3, 32, 32), build_cameras(config), run.draw_noise([0], 8)))
    assert seen == dict.fromkeys(seen, torch.bfloat16) | {"vae.encoder": torch.float32, "lgm's head": torch.float32}


@pytest.mark.parametrize("wrapped", [True, False], ids=["ddp", "sharded"])
def test_the_objective_in_half_precision(make_config, make_models, wrapped):
    """VAE encoder, LGM's head and LPIPS stay float32; frozen parts are in half precision also under DeepSpeed and
    FSDP2, around which accelerate wraps no autocast."""
    changes = {"train": {"batch_size": 1, "mixed_precision": "bf16"}, "objective": {"lpips_weight": 1.0}}
    config = make_config(changes, lean=True)
    models = make_models(config)
    prepare_training(models, config)
    seen = watched(models)
    objective = Objective(models.unet, models.svd, models.lgm, _flat_renderer, config, lambda a, b: (a - b).mean())
    draws = replace(objective.draw(0, 0, [0], blank_batch(config)), feedback=torch.ones(()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=wrapped):
        total = objective(blank_batch(config), draws)["total"]
    assert total.dtype == torch.float32
    trained = torch.bfloat16 if wrapped else torch.float32
    frozen = {"image_encoder": torch.bfloat16, "vae.decoder": torch.bfloat16, "vae.encoder": torch.float32}
    assert seen == frozen | {"unet": trained, "lgm": trained, "lgm's head": torch.float32}
