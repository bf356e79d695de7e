"""Weights in and out: the release's names, round trips, and one clear line for everything that does not fit."""

import copy
import gzip
import json
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from safetensors import safe_open
from transformers import CLIPVisionModelWithProjection

from ouroboros3d.build import Models, build_models, from_pretrained
from ouroboros3d.config.schema import LGMConfig, ModelConfig
from ouroboros3d.diffusion import euler_schedule
from ouroboros3d.models import weights as checkpoint
from ouroboros3d.models.lgm import LGM
from ouroboros3d.models.multiview_unet import MultiViewUNet
from ouroboros3d.models.weights import (
    CheckpointError,
    find_checkpoint,
    fit_state,
    from_release_names,
    load_checkpoint,
    load_trained,
    read_state,
    save_checkpoint,
    save_diffusers,
    to_release_names,
    write_state,
)

RELEASED_KEYS = Path(__file__).parent / "data" / "released_keys.txt.gz"  # of the release's own classes at full size


def released(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of one of the release's two files."""
    keys: dict[str, dict[str, tuple[int, ...]]] = {}
    for line in gzip.decompress(RELEASED_KEYS.read_bytes()).decode().splitlines():
        if line.startswith("#"):
            section = keys.setdefault(line[1:].split(":")[0].strip(), {})
        elif line.strip():
            key, shape = line.split()
            section[key] = () if shape == "scalar" else tuple(map(int, shape.split("x")))
    return keys[name]


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items()}


def assert_same_networks(one: Models, other: Models) -> None:
    assert_same(one.unet, other.unet)
    assert_same(one.lgm, other.lgm)


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    state = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, state[name]), name


@contextmanager
def refused(match: str | None = None) -> Iterator[pytest.ExceptionInfo]:
    """By a CheckpointError of one line."""
    with pytest.raises(CheckpointError, match=match) as caught:
        yield caught
    assert "\n" not in str(caught.value)


class TestReleasedNames:
    """The full-size networks, without memory for their weights."""

    def test_multiview_unet(self):
        with torch.device("meta"):
            unet = MultiViewUNet(ModelConfig())
        ours = to_release_names(unet.state_dict(), unet.config.adapter.res_blocks)
        assert shapes(ours) == released("mv_model_unet.pth")
        assert len(ours) == 1572

    def test_lgm(self):
        with torch.device("meta"):
            lgm = LGM(LGMConfig())
        assert shapes(lgm.state_dict()) == released("recon_model.pth")
        assert len(lgm.state_dict()) == 438

    @pytest.mark.parametrize("res_blocks", [1, 2, 3])
    def test_renaming_there_and_back(self, res_blocks):
        names = [f"cond_encoder.1.body.{i}.resnets.{j}.block1.weight" for i in range(4) for j in range(res_blocks)]
        names += [f"cond_encoder.0.body.{i}.in_conv.bias" for i in range(1, 4)]
        names += ["cond_encoder.0.conv_in.weight", "unet.conv_in.bias", "mid_plucker.embed.0.bias"]
        state = {name: torch.tensor(i) for i, name in enumerate(names)}
        flat = to_release_names(state, res_blocks)
        assert len(flat) == len(state)
        assert f"cond_encoder.1.body.{4 * res_blocks - 1}.block1.weight" in flat
        assert f"cond_encoder.0.body.{res_blocks}.in_conv.bias" in flat
        assert from_release_names(flat, res_blocks) == state


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_folder(self, release, make_models, tmp_path, suffix, frozen):
        save_checkpoint(tmp_path / "new" / "folder", release, suffix, frozen=frozen)
        other = make_models(seed=1)
        before = {k: v.clone() for k, v in other.svd.state_dict().items()}
        load_checkpoint(tmp_path / "new" / "folder", other)
        assert_same_networks(release, other)
        if frozen:
            assert_same(release.svd, other.svd)
        else:
            assert all(torch.equal(v, before[k]) for k, v in other.svd.state_dict().items())

    def test_diffusers_layout(self, release, make_config, make_models, tmp_path):
        """Read here as a checkpoint, and part by part by the libraries the parts come from."""
        config = make_config()
        save_diffusers(tmp_path / "new", release, euler_schedule(config.sampler.scheduler, 3))
        other = make_models(seed=1)
        load_checkpoint(tmp_path / "new", other)
        assert_same_networks(release, other)
        assert_same(release.svd, other.svd)
        config.model.pretrained.checkpoint = str(tmp_path / "new")
        assert_same(build_models(config.model).svd, release.svd)
        for name, cls, part in (
            ("unet", UNetSpatioTemporalConditionModel, release.unet.unet),
            ("vae", AutoencoderKLTemporalDecoder, release.svd.vae),
            ("image_encoder", CLIPVisionModelWithProjection, release.svd.image_encoder),
        ):
            assert_same(cls.from_pretrained(tmp_path / "new", subfolder=name), part)
        scheduler = EulerDiscreteScheduler.from_pretrained(tmp_path / "new", subfolder="scheduler")
        assert scheduler.config.sigma_max == 80.0 and scheduler.config.prediction_type == "v_prediction"
        index = json.loads((tmp_path / "new" / "model_index.json").read_text())
        folders = {path.name for path in (tmp_path / "new").iterdir() if path.is_dir()}
        assert folders == {name for name in index if not name.startswith("_")}

    def test_diffusers_layout_in_half_precision(self, release, make_config, tmp_path):
        save_diffusers(tmp_path, release, euler_schedule(make_config().sampler.scheduler, 3), torch.float16)
        state = read_state(tmp_path / "lgm" / "diffusion_pytorch_model.safetensors")
        assert {v.dtype for v in state.values()} == {torch.float16}

    def test_files_hold_the_releases_names_and_say_that_they_are_pytorch_s(self, release, tmp_path):
        save_checkpoint(tmp_path, release)
        with safe_open(tmp_path / "recon_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers 4.46 refuses files that do not
        names = read_state(tmp_path / "mv_model_unet.safetensors").keys()
        assert "cond_encoder.1.body.5.block2.weight" in names and "cond_encoder.0.body.2.in_conv.weight" in names
        assert not any("resnets" in name for name in names if name.startswith("cond_encoder"))

    def test_a_state_dict_in_a_lightning_file_is_found(self, tmp_path):
        torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "a.pth")
        assert read_state(tmp_path / "a.pth").keys() == {"a"}

    def test_writing_casts_only_floats_and_copies_views(self, tmp_path):
        whole = torch.arange(6.0).reshape(2, 3)
        write_state({"view": whole[:, 1], "count": torch.tensor(7)}, tmp_path / "a.safetensors", torch.float16)
        state = read_state(tmp_path / "a.safetensors")
        assert state["view"].dtype == torch.float16 and state["view"].tolist() == [1, 4]
        assert state["count"].dtype == torch.int64


class TestWhatDoesNotFit:
    @pytest.fixture
    def linear(self):
        return torch.nn.Linear(2, 3)

    def test_missing_unexpected_and_wrongly_shaped_keys_are_named(self, linear):
        state = {"weight": torch.ones(4, 2), "extra": torch.ones(1)}
        with refused() as caught:
            fit_state(linear, state, "some/file")
        text = str(caught.value)
        assert text.startswith("some/file: does not fit the configured model")
        assert "1 missing (bias)" in text and "1 unexpected (extra)" in text
        assert "weight is (4, 2), the model's is (3, 2)" in text

    def test_nothing_is_loaded_then(self, linear):
        before = linear.bias.clone()
        with refused():
            fit_state(linear, {"bias": torch.full((3,), 9.0)}, "file")
        assert torch.equal(linear.bias, before)

    def test_many_keys_are_counted_and_three_named(self, linear):
        extra = {f"extra{i}": torch.ones(1) for i in range(5)}
        with refused(r"5 unexpected \(extra0, extra1, extra2, \.\.\.\)"):
            fit_state(linear, linear.state_dict() | extra, "file")

    def test_only_what_may_be_missing_may_be(self, linear):
        fit_state(linear, {"weight": torch.zeros(3, 2)}, "file", may_miss="^bias$")
        assert not linear.weight.any()
        with refused(r"1 missing \(weight\)"):
            fit_state(linear, {"bias": torch.zeros(3)}, "file", may_miss="^bias$")

    def test_another_model(self, release, make_config, make_models, tmp_path):
        save_checkpoint(tmp_path, release)
        wider = make_models(make_config({"model": {"lgm": {"time_channels": 16}}}))
        with refused("1 wrongly shaped") as caught:
            load_checkpoint(tmp_path, wider)
        assert "unet.time_embed.0.weight" in str(caught.value) and "recon_model" in str(caught.value)


class TestUnreadable:
    @pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
    @pytest.mark.parametrize("keep", [0, 10, 0.5])
    def test_truncated(self, tmp_path, suffix, keep):
        path = tmp_path / f"a{suffix}"
        write_state({"a": torch.arange(1000.0)}, path)
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
        with refused() as caught:
            read_state(path)
        assert str(caught.value).startswith(f"{path}: ")

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made by the pickle"),)

        path = tmp_path / "a.pth"
        torch.save({"a": Harmful()}, path)
        with refused("not a plain state dict of tensors"):
            read_state(path)
        path.write_bytes(pickle.dumps({"a": Harmful()}, protocol=2))
        with refused():
            read_state(path)
        assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]

    @pytest.mark.parametrize("content", [[1, 2], {"a": 3}, torch.ones(2)])
    def test_something_else_than_a_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "a.pth")
        with refused("not a plain state dict of tensors"):
            read_state(tmp_path / "a.pth")

    def test_missing_files_and_folders(self, release, tmp_path):
        with refused("no such weights file"):
            read_state(tmp_path / "a.pth")
        with refused("no such checkpoint folder"):
            load_checkpoint(tmp_path / "none", release)
        with refused(r"has no mv_model_unet\.safetensors or mv_model_unet\.pth"):
            load_checkpoint(tmp_path, release)

    def test_safetensors_is_preferred(self, tmp_path):
        for suffix in (".pth", ".safetensors"):
            write_state({"a": torch.ones(1)}, tmp_path / f"recon_model{suffix}")
        assert checkpoint.find_weights(tmp_path, "recon_model").suffix == ".safetensors"
        assert checkpoint.find_weights(tmp_path, "mv_model_unet") is None


class TestSVDFolder:
    @pytest.fixture(scope="class")
    def halves(self, release, tmp_path_factory):
        """An SVD folder that has files of variant fp16 alone."""
        folder = tmp_path_factory.mktemp("svd")
        copy.deepcopy(release.svd.vae).half().save_pretrained(folder / "vae", variant="fp16")
        copy.deepcopy(release.svd.image_encoder).half().save_pretrained(folder / "image_encoder", variant="fp16")
        return folder

    @pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
    def test_the_variant_that_exists_is_found_and_loaded_in_float32(self, release, halves, variant):
        for part, cls in (("vae", AutoencoderKLTemporalDecoder), ("image_encoder", CLIPVisionModelWithProjection)):
            if variant == "bf16":  # neither these nor full ones
                with refused(f"cannot load '{part}' from this folder"):
                    from_pretrained(cls, part, str(halves), variant)
                continue
            loaded = from_pretrained(cls, part, str(halves), variant)
            for name, value in getattr(release.svd, part).state_dict().items():
                assert torch.equal(loaded.state_dict()[name], value.half().float()), name

    def test_full_files_serve_where_a_variant_is_missing(self, release, tmp_path):
        release.svd.vae.save_pretrained(tmp_path / "vae")
        assert_same(from_pretrained(AutoencoderKLTemporalDecoder, "vae", str(tmp_path), "fp16"), release.svd.vae)


class Settings:
    """Stands for what a training framework pickles beside tensors; unpickling it must run nothing."""

    loaded = False

    def __setstate__(self, state: dict) -> None:
        Settings.loaded = True


class TestWhereWeightsLie:
    @pytest.fixture
    def networks(self, release) -> dict[str, torch.Tensor]:
        """As the objective of a training run names them."""
        parts = {"unet": release.unet, "lgm": release.lgm}
        return {f"trained.{n}.{k}": v for n, network in parts.items() for k, v in network.state_dict().items()}

    def loads(self, source: Path | str, release, make_models) -> None:
        other = make_models(seed=1)
        load_checkpoint(source, other)
        assert_same_networks(release, other)

    def test_in_a_training_checkpoint(self, networks, release, make_models, tmp_path):
        write_state(networks, tmp_path / "model.safetensors")
        other = make_models(seed=1)
        load_trained(tmp_path / "model.safetensors", other)
        assert_same_networks(release, other)
        write_state(release.lgm.state_dict(), tmp_path / "lgm.safetensors")
        with refused("not the weights of a training checkpoint"):
            load_trained(tmp_path / "lgm.safetensors", other)

    def test_in_the_release_s_lightning_file(self, release, make_models, tmp_path):
        unet = to_release_names(release.unet.state_dict(), release.unet.config.adapter.res_blocks)
        state = {f"mv_model.{k}": v for k, v in unet.items()}
        state |= {f"recon_model.{k}": v for k, v in release.lgm.state_dict().items()}
        state |= {"lpips_loss.net.weight": torch.ones(2)}  # nothing of ours
        settings = Settings()
        settings.values = {"lr": 1e-5}
        torch.save({"state_dict": state, "hyper_parameters": settings, "epoch": 3}, tmp_path / "last.ckpt")
        self.loads(tmp_path / "last.ckpt", release, make_models)
        assert not Settings.loaded

    def test_in_deepspeed_s_folder(self, networks, release, make_models, tmp_path):
        (tmp_path / "pytorch_model").mkdir()
        module = {f"module.{k}": v for k, v in networks.items()}
        torch.save({"module": module, "optimizer": Settings()}, tmp_path / "pytorch_model/mp_rank_00_model_states.pt")
        self.loads(tmp_path, release, make_models)

    def test_in_fsdp_s_shards(self, networks, release, make_models, tmp_path):
        torch.distributed.checkpoint.save({"model": networks}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0")
        self.loads(tmp_path, release, make_models)
        other = make_models(seed=1)
        load_trained(tmp_path, other)  # what export --trained calls
        assert_same(release.lgm, other.lgm)

    def test_in_a_run(self, networks, release, make_models, tmp_path, caplog):
        """export/ where there is one, with a warning of newer checkpoints; else the newest checkpoint."""
        for step in (1, 2):
            factor = 1.0 if step == 2 else 0.0
            folder = tmp_path / "checkpoints" / f"step_{step:08d}"
            write_state({k: v * factor for k, v in networks.items()}, folder / "model.safetensors")
        self.loads(tmp_path, release, make_models)
        save_checkpoint(tmp_path / "export", release)
        assert find_checkpoint(tmp_path) == tmp_path / "export" and not caplog.messages
        export = tmp_path / "export" / "mv_model_unet.safetensors"
        os.utime(export, (0, 0))
        assert find_checkpoint(tmp_path) == tmp_path / "export"
        assert f"export: older than {folder} by the files' times; " in caplog.text

    def test_on_the_hub(self, release, make_models, tmp_path, monkeypatch):
        save_checkpoint(tmp_path, release, ".pth")
        asked = []
        hub = SimpleNamespace(snapshot_download=lambda name: asked.append(name) or str(tmp_path))
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        self.loads("huanngzh/Ouroboros3D-SVD-LGM", release, make_models)
        assert asked == ["huanngzh/Ouroboros3D-SVD-LGM"]

        def fail(_name):
            raise OSError("no connection\nand more")

        hub.snapshot_download = fail
        with refused(r"owner/model: .*\(no connection and more\)"):
            find_checkpoint("owner/model")

    def test_a_run_that_trained_one_network_is_refused(self, networks, release, tmp_path):
        write_state({k: v for k, v in networks.items() if "lgm" in k}, tmp_path / "model.safetensors")
        with refused("was trained without unet"):
            load_checkpoint(tmp_path, release)

    def test_a_damaged_training_checkpoint_is_one_line(self, release, tmp_path):
        (tmp_path / "last.ckpt").write_bytes(b"not a checkpoint")
        with refused("unreadable or truncated"):
            load_checkpoint(tmp_path / "last.ckpt", release)


def test_what_is_loaded_is_built_without_memory_and_has_its_buffers(release, make_config, tmp_path, monkeypatch):
    """Full-size networks are not initialised at random first; what files do not hold is as always."""
    save_checkpoint(tmp_path, release, dtype=torch.float16, frozen=True)
    config = make_config()
    config.model.pretrained.checkpoint = str(tmp_path)
    drawn = []
    original = torch.nn.init.kaiming_uniform_
    monkeypatch.setattr(
        "torch.nn.init.kaiming_uniform_", lambda x, *a, **k: drawn.append(x.is_meta) or original(x, *a, **k)
    )
    models = build_models(config.model)
    assert sum(drawn) > 0.8 * len(drawn)
    for mine, theirs in ((models.unet, release.unet), (models.lgm, release.lgm), (models.svd, release.svd)):
        buffers = dict(theirs.named_buffers())
        assert all(torch.equal(b, buffers[name]) for name, b in mine.named_buffers())
        weights = dict(theirs.named_parameters())
        for name, parameter in mine.named_parameters():
            assert parameter.dtype == torch.float32 and torch.equal(parameter, weights[name].half().float()), name
            assert parameter.requires_grad == weights[name].requires_grad
