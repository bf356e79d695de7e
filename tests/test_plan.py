"""The plan of a run: counts and bytes equal those of real networks, and a dry run leaves nothing behind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_train import TINY, write_orbits

from ouroboros3d.build import build_models
from ouroboros3d.cli import call
from ouroboros3d.objective import Objective
from ouroboros3d.training.dry_run import (
    GIB,
    AliveBytes,
    Parameters,
    _drop_gradient,
    _flat_renderer,
    activation_bytes,
    blank_batch,
    count_parameters,
    estimate_memory,
    follow_step,
)
from ouroboros3d.training.optimization import make_optimizer
from ouroboros3d.training.setup import prepare_training


@pytest.fixture(scope="module")
def config(make_config):
    return make_config({"train": {"batch_size": 1}}, lean=True)


@pytest.fixture(scope="module")
def activations(config) -> int:
    return activation_bytes(config)


@pytest.fixture(scope="module")
def objective(config) -> Objective:
    models = build_models(config.model)
    prepare_training(models, config)
    return Objective(models.unet, models.svd, models.lgm, _flat_renderer, config)


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


class TestParameters:
    def test_of_every_part(self, config):
        counted, models = count_parameters(config), build_models(config.model)
        assert counted.all == {n: sum(p.numel() for p in m.parameters()) for n, m in models.parts.items()}
        assert counted.trained == counted.all | {"vae": 0, "image_encoder": 0}
        assert counted.total_trained + counted.total_frozen == sum(counted.all.values())

    def test_frozen_ones_are_not_trained(self, make_config):
        counted = count_parameters(make_config({"objective": {"freeze": ["unet", "rays"]}}, lean=True))
        assert counted.trained["unet"] == counted.trained["rays"] == 0 < counted.trained["adapters"]


class TestMemory:
    def test_weights_gradients_and_optimizer_are_those_of_a_real_step(self, config, objective):
        optimizer = make_optimizer(objective.parameters(), config.train)
        for parameter in objective.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        estimate = estimate_memory(config, count_parameters(config), 0)
        assert estimate.weights == nbytes(objective.parameters())
        assert estimate.gradients == nbytes(p.grad for p in objective.parameters())
        states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        assert estimate.optimizer == nbytes(states)
        assert estimate.frozen == nbytes(objective.svd.parameters())
        objective.zero_grad()

    def test_activations_are_those_of_a_real_step(self, config, objective, activations):
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in objective.parameters()]
        assert follow_step(objective, blank_batch(config)) == pytest.approx(activations, rel=0.02)
        for hook in hooks:
            hook.remove()

    def test_checkpointing_half_precision_and_a_larger_batch_show(self, make_config):
        """On the reconstructor alone, which is quick."""

        def changed(**changes) -> int:
            objective = {"diffusion": False, "reconstruction": "clean"}
            return activation_bytes(make_config({"objective": objective, "train": changes}, lean=True))

        plain = changed(batch_size=1)
        assert changed(batch_size=1, gradient_checkpointing=True) < 0.9 * plain
        assert 0.4 * plain < changed(batch_size=1, mixed_precision="bf16") < 0.95 * plain
        assert changed(batch_size=2) == pytest.approx(2 * plain, rel=0.1)

    def test_what_strategies_share_out(self, make_config):
        parameters = Parameters({"unet": 1000, "vae": 50}, {"unet": 1000, "vae": 0})
        half = make_config({"train": {"mixed_precision": "bf16", "ema_decay": 0.9}}, lean=True)
        one, many = (estimate_memory(half, parameters, 7, "ddp", n) for n in (1, 8))
        assert dataclasses.astuple(one) == (4000, 200, 4000, 8000, 4000, 7) and one.total == 20207
        assert many.gradients == 8000  # and buckets
        zero2 = estimate_memory(half, parameters, 7, "zero2", 8)
        assert dataclasses.astuple(zero2) == (2000, 200, 2250, 1500, 4000, 7)
        fsdp2 = estimate_memory(half, parameters, 7, "fsdp2", 8)
        assert dataclasses.astuple(fsdp2) == (500, 200, 500, 1000, 0, 7)
        with pytest.raises(ValueError, match="ddp, zero2, fsdp2"):
            estimate_memory(half, parameters, 7, "zero9")

    def test_alive_bytes_counts_views_once_and_what_is_gone_no_more(self):
        with AliveBytes() as alive:
            x = torch.zeros(1000)
            y = x.view(10, 100) * 2
            del x
            z = y + 1
        assert (alive.now, alive.peak) == (8000, 8000) and z.shape == y.shape


class TestDryRun:
    @pytest.fixture(scope="class")
    def setting(self, tmp_path_factory) -> Path:
        root = tmp_path_factory.mktemp("plan")
        write_orbits(root / "orbits", 4)
        (root / "orbits" / "train.txt").write_text("object_1\nobject_2\nobject_3")
        config = OmegaConf.merge(
            TINY, {"data": {"root": str(root / "orbits")}, "train": {"output_dir": str(root / "out")}}
        )
        (root / "tiny.yaml").write_text(OmegaConf.to_yaml(config))
        return root

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr("ouroboros3d.training.dry_run.activation_bytes", lambda _config: 3 * GIB)

    def run(self, setting: Path, capsys, *overrides: str) -> tuple[int, str, str]:
        from ouroboros3d.cli.train import main

        status = call(main, ["--config", str(setting / "tiny.yaml"), "--dry_run", *overrides])
        out, error = capsys.readouterr()
        return status, " ".join(out.split()), error.removeprefix("loading libraries\n")

    def test_it_says_what_would_happen_and_leaves_nothing(self, setting, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "1")
        before = sorted(setting.rglob("*"))
        status, out, error = self.run(setting, capsys, "train.gradient_accumulation=1", "objective.freeze=[unet]")
        assert status == 0 and error == ""
        assert "2 a process x 1 accumulated x 1 processes = 2 samples per step" in out
        assert "4 = 8 samples, 2.7 epochs" in out
        assert "3 orbits in train.txt, 8 x 3 x 32 x 32 of each; 1 orbits in val.txt" in out
        assert f"{setting / 'out'}: is new" in out and "activations 3.00" in out
        assert sorted(setting.rglob("*")) == before

    def test_it_names_the_checkpoint_it_would_resume_from(self, setting, capsys):
        for step in (2, 10):
            (setting / "out" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
        assert "resumes from " + str(setting / "out/checkpoints/step_00000010") in self.run(setting, capsys)[1]
        assert "starts over" in self.run(setting, capsys, "train.resume=never")[1]

    def test_it_refuses_to_go_on_with_another_training(self, setting, capsys):
        out, checkpoint = f"train.output_dir={setting / 'other'}", setting / "other" / "checkpoints" / "step_00000002"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer.json").write_text("{}")
        (checkpoint / "config.yaml").write_text("objective: {image_loss: huber}")
        status, text, error = self.run(setting, capsys, out)
        assert status == 2 and f"resumes from {checkpoint}" in text
        assert "another configuration: objective.image_loss huber -> l1;" in error and error.count("\n") == 1
        assert self.run(setting, capsys, out, f"train.resume={checkpoint}")[0] == 0
        for damaged in ("[]", "objective: {image_loss"):  # the run would take the checkpoint before it
            (checkpoint / "trainer.json").write_text("[]")
            (checkpoint / "config.yaml").write_text(damaged)
            assert self.run(setting, capsys, out)[0] == 0

    def test_it_asks_for_the_device_of_the_run(self, setting, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        status, out, error = self.run(setting, capsys, "--device", "cuda")
        assert status == 2 and "problem --device cuda" in out and "no CUDA; use --device cpu" in error
        assert self.run(setting, capsys, "--device", "cpu")[0] == 0

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["data.root=MISSING"], "MISSING: no such folder"),
            (["data.val=train.txt"], "3 of its 3 objects are in data.train"),
            (["model.pretrained.lgm=MISSING.pth"], "model.pretrained.lgm = MISSING.pth: is not there"),
            (["train.batch_size=4"], "4 samples per step, and the training set has 3"),
        ],
    )
    def test_what_would_stop_it_is_one_line_and_status_2(self, setting, capsys, tmp_path, overrides, words):
        *overrides, words = (text.replace("MISSING", str(tmp_path / "missing")) for text in (*overrides, words))
        status, out, error = self.run(setting, capsys, *overrides)
        assert status == 2 and words in out
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
