"""Small cards and wrong machines: what is needed is said before, options help, and what cannot work is one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import small_training
import torch

from ouroboros3d import needs
from ouroboros3d.build import build_cameras
from ouroboros3d.cli import call
from ouroboros3d.cli.inference import parse
from ouroboros3d.devices import DeviceError, check_shared_memory, gpu_memory, pick_device
from ouroboros3d.errors import TrainingError
from ouroboros3d.models import offload
from ouroboros3d.needs import GIB, Stage, announce, loop_bytes, loop_stages, smallest_card
from ouroboros3d.sampler import NumericalError, Sampler, last_step
from ouroboros3d.training.dry_run import _device_problems, _flat_renderer


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- offload


def test_offloaded_networks_take_turns_and_give_the_same_result(make_config, make_models, monkeypatch):
    config = make_config({"sampler": {"steps": 2}}, lean=True)
    models, at_work = make_models(config), []
    names = {models.unet: "unet", models.lgm: "lgm", models.svd.vae: "vae", models.svd.image_encoder: "encoder"}
    cameras = build_cameras(config)

    def run() -> torch.Tensor:
        made = Sampler(models.unet, models.svd, models.lgm, _flat_renderer, config.model, config.sampler)
        return last_step(made(torch.zeros(1, 3, 32, 32), cameras, made.draw_noise([0], 8))).gaussians.to_tensor()

    def places() -> dict[str, list[int]]:
        return {name: [p.data_ptr() for p in network.parameters()] for network, name in names.items()}

    def copy(values: torch.Tensor, _device: torch.device) -> torch.Tensor:
        """As to a GPU: elsewhere; and which network is away from home then."""
        away = [name for name, where in places().items() if where[-1] != home[name][-1] or where[0] != home[name][0]]
        at_work.extend(away if at_work[-1:] != away else [])
        assert len(away) <= 1
        return values.clone()

    whole = run()
    models.to("cpu", offload=True)
    home = places()
    monkeypatch.setattr(offload, "_copy", copy)
    assert torch.equal(run(), whole)
    assert at_work == ["encoder", "vae", "unet", "vae", "lgm", "unet", "vae", "lgm"]
    models.unet._hf_hook.pre_forward(models.unet)
    models.lgm._hf_hook.pre_forward(models.lgm)
    now = places()
    assert now.pop("lgm") != home.pop("lgm") and now == home  # dropped, not copied back


def test_networks_wait_in_pinned_memory_for_cuda(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape) or x.clone())
    network = torch.nn.BatchNorm1d(3)
    offload.offload([network], torch.device("cuda"))
    assert len(pinned) == len([*network.parameters(), *network.buffers()])


@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_exact_but_in_training_with_tf32(tmp_path, tf32):
    """torch lets convolutions round unless told."""

    def settings() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    torch.backends.cudnn.allow_tf32 = True
    pick_device("cpu")
    assert settings() == (False, False)
    small_training.make(tmp_path, tf32=tf32)
    assert settings() == (tf32, tf32)
    pick_device("cpu")
    assert settings() == (False, False)


def test_what_offload_saves():
    stages = {"embed": Stage(4, 1, 0), "encode": Stage(2, 1, 0), "U-Net": Stage(9, 3, 0), "decode": Stage(2, 8, 0)}
    assert loop_bytes(stages) == 4 + 9 + 2 + 8
    assert loop_bytes(stages, offload=True) == 9 + 3


def test_a_stage_s_weights_and_work_are_those_of_the_network(make_config, make_models):
    config = make_config(lean=True)
    models = make_models(config)
    stages = loop_stages(config, torch.float32)
    assert stages["U-Net"].weights == sum(p.nbytes for p in models.unet.parameters())
    half = loop_stages(config, torch.bfloat16)
    assert (
        half["U-Net"].weights == stages["U-Net"].weights / 2 and half["U-Net"].working < 0.8 * stages["U-Net"].working
    )
    head = sum(p.nbytes for m in (models.lgm.conv, models.lgm.unet.conv_out) for p in m.parameters())
    assert stages["U-Net"].flop > 0 and half["reconstruct"].weights < stages["reconstruct"].weights / 2 + head
    fewer = make_config({"model": {"conventions": {"decode_chunk": 2}}}, lean=True)
    assert loop_stages(fewer, torch.float32)["decode"].working < 0.6 * stages["decode"].working


# ---------------------------------------------------------------- said beforehand


@pytest.fixture
def card(monkeypatch, tmp_path):
    """card(8): the machine's GPU has so many GiB."""

    def make(gib: float) -> torch.device:
        properties = SimpleNamespace(name="NVIDIA Test", total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return torch.device("cuda")

    stages = {"embed": Stage(2 * GIB, 0, 0), "U-Net": Stage(4 * GIB, 2 * GIB, 0), "decode": Stage(0, 3 * GIB, 0)}
    monkeypatch.setattr(needs.Path, "home", lambda: tmp_path)
    monkeypatch.setattr(needs, "loop_stages", lambda *_: stages | {"reconstruct": Stage(0, 0, 6e13)})
    return make


def test_a_card_that_holds_it(card, make_config):
    assert announce(make_config(), card(12), torch.float16) == "needs about 10.0 GiB of the 12.0 GiB of NVIDIA Test"


def test_a_card_too_small_names_the_options_before_anything_is_loaded(card, make_config):
    with pytest.raises(DeviceError) as caught:
        announce(make_config(), card(8), torch.float32)
    text = one_line(caught)
    assert text.startswith("NVIDIA Test has 8.0 GiB and this needs about 10.0: --dtype fp16")
    assert "sampler.offload=true (then 6.7 GiB)" in text and "decode_chunk=2" in text
    config = make_config({"sampler": {"offload": True}})
    assert "needs about 6.7 GiB" in announce(config, card(8), torch.float16)


def test_on_a_cpu_the_time_of_a_step(card, make_config, monkeypatch):
    monkeypatch.setattr(needs, "matrix_rate", lambda _device, _dtype: 0.1)
    text = announce(make_config({"sampler": {"steps": 6}}), torch.device("cpu"), torch.float32)
    assert "a step takes at least 10.0 minutes, 6 steps 1.0 hours" in text


def test_a_training_that_does_not_fit_is_a_problem_of_the_plan(card):
    card(79)
    assert _device_problems(64 * GIB) == []
    assert "115 GiB a process, and NVIDIA Test has 79" in _device_problems(115 * GIB)[0]
    assert _device_problems(115 * GIB, "cpu") == []
    assert smallest_card(64 * GIB).startswith("80 GB") and smallest_card(115 * GIB).startswith("141 GB")
    assert smallest_card(999 * GIB) == "none on one card"


# ---------------------------------------------------------------- wrong machines


def test_a_driver_too_old_is_not_passed_over(monkeypatch):
    """torch would go on with the CPU."""
    reason = "The NVIDIA driver on your system is too old (found version 12020). Please update\nby downloading"

    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in (None, "cuda"):
        with pytest.raises(DeviceError) as caught:
            pick_device(name)
        text = one_line(caught)
        assert "too old (found version 12020)" in text and "wants CUDA 13.0" in text and "--device cpu" in text
    assert pick_device("cpu").type == "cpu"


def test_shared_memory_too_small_for_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=64 * 2**20))
    check_shared_memory(2**20, str(tmp_path))
    check_shared_memory(2**40, str(tmp_path / "none"))  # no such place: not a Linux
    with pytest.raises(DeviceError) as caught:
        check_shared_memory(4 * 2**30, str(tmp_path))
    text = one_line(caught)
    assert "has 64 MiB free and the data workers need 4096" in text and "--ipc=host or --shm-size=5g" in text


def test_an_overflow_in_the_decoder_names_the_way_out(make_config, make_models, monkeypatch):
    config = make_config({"sampler": {"steps": 1}}, lean=True)
    models = make_models(config)
    monkeypatch.setattr(models.svd, "decode", lambda x: torch.full((1, 8, 3, 32, 32), float("inf")))
    run = Sampler(models.unet, models.svd, models.lgm, _flat_renderer, config.model, config.sampler)
    with pytest.raises(NumericalError, match="--dtype bf16 instead of fp16") as caught:
        last_step(run(torch.zeros(1, 3, 32, 32), build_cameras(config), run.draw_noise([0], 8)))
    one_line(caught)


def test_the_release_s_flags():
    options = parse(
        ["--input", "a.png", "--checkpoint", "c", "--output", "o", "--num_inference_steps", "7", "--seed", "3"]
    )
    assert (options.input_img, options.output_dir) == (["a.png"], "o")
    keys = {"model.pretrained.checkpoint": '"c"', "sampler.steps": "7", "sampler.seed": "3"}
    assert dict(text.split("=") for text in options.overrides) == keys


def out_of_memory(*_args, **_options):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more")


def test_out_of_memory_is_one_line_with_the_options(capsys):
    """Wherever it happens: while weights move to the GPU, in the loop, in a benchmark."""
    with pytest.raises(DeviceError) as caught, gpu_memory():
        out_of_memory()
    assert call(out_of_memory) == 2
    text = capsys.readouterr().err
    assert text == f"error: {one_line(caught)}\n"
    assert all(way in text for way in ("sampler.offload=true", "decode_chunk=2", "--dtype fp16", "--device cpu"))
    with pytest.raises(RuntimeError, match="another"):
        call(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_out_of_memory_in_training_names_its_own_options(monkeypatch, make_config, make_models, tmp_path):
    from ouroboros3d.cli.train import train

    config = make_config({"train": {"output_dir": str(tmp_path), "batch_size": 1}}, lean=True)
    monkeypatch.setattr("ouroboros3d.build.build_models", lambda _config: make_models(config))
    monkeypatch.setattr("ouroboros3d.data.splits.build_dataset", lambda *_: [{"id": str(i)} for i in range(4)])
    monkeypatch.setattr("ouroboros3d.data.splits.check_split", lambda *_: None)
    monkeypatch.setattr("ouroboros3d.evaluation.validation.Validation", lambda *_: None)
    monkeypatch.setattr("ouroboros3d.training.trainer.Trainer.run", out_of_memory)
    with pytest.raises(TrainingError, match=r"train\.batch_size.*gradient_checkpointing.*deepspeed_zero2") as caught:
        train(config, "cpu")
    one_line(caught)
