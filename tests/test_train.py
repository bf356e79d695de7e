"""train.py as a user runs it, on orbits of coloured squares, with networks of a few thousand parameters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LEAN, SMALL
from omegaconf import OmegaConf
from orbit_folders import TO_OPENGL, poses_of, write_frames
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ouroboros3d.cli import call
from ouroboros3d.models.weights import find_weights
from ouroboros3d.training.setup import compile_networks

ROOT = Path(__file__).parent.parent
TINY = OmegaConf.merge(
    SMALL,
    LEAN,
    {
        "model": {"conventions": {"view_selection": "even", "decode_chunk": 0, "time_id": "textbook"}},
        "sampler": {"steps": 2},
        "data": {"workers": 0},
        "train": {
            **{"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "ema_decay": 0.9},
            **{"save_every": 2, "validate_every": 4, "validate_objects": 1, "log_every": 1},
        },
    },
)


def write_orbits(root: Path, count: int = 4) -> None:
    """`count` orbits of 16 frames: a square of the object's colour that moves with the azimuth."""
    for number in range(count):
        pictures = np.zeros((16, 32, 32, 4), np.uint8)
        for frame, picture in enumerate(pictures):
            picture[8:24, 4 + frame : 14 + frame] = [60 * number, 200 - 60 * number, 90, 255]
        write_frames(root / f"object_{number}", pictures, poses_of(10.0 * number) @ TO_OPENGL)
    (root / "train.txt").write_text("".join(f"object_{n}\n" for n in range(1, count)))
    (root / "val.txt").write_text("object_0\n")


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with orbits and tiny.yaml."""
    root = tmp_path_factory.mktemp("train")
    write_orbits(root / "orbits")
    config = OmegaConf.merge(TINY, {"data": {"root": str(root / "orbits")}})
    (root / "tiny.yaml").write_text(OmegaConf.to_yaml(config))
    return root


def train(setting: Path, run: str, *overrides: str) -> Path:
    """train.main() in this process; returns the output folder."""
    from ouroboros3d.cli.train import main

    out = setting / run
    main(["--config", str(setting / "tiny.yaml"), "--device", "cpu", f"train.output_dir={out}", *overrides])
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    newest = sorted((out / "checkpoints").iterdir())[-1]
    return load_file(newest / "model.safetensors")


def rows(out: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, open(out / "metrics.jsonl")) if row["kind"] == kind]


@pytest.fixture(scope="module")
def joint(setting) -> Path:
    return train(setting, "joint")


def test_a_run_leaves_everything_a_user_looks_for(joint):
    assert (joint / "config.yaml").is_file()
    names = [f"0000004_{name}" for name in ("lgm.png", "lgm_turntable.mp4", "loop.png", "loop_turntable.mp4")]
    assert sorted(p.name for p in (joint / "validation").iterdir()) == names
    logged = EventAccumulator(str(next(joint.glob("**/events.out.tfevents*")).parent)).Reload().Tags()
    assert {"validation/lgm", "validation/lgm_turntable", "validation/loop_turntable"} <= set(logged["images"])
    assert {"train/total", "validation/render_psnr"} <= set(logged["scalars"])
    for name in ("mv_model_unet", "recon_model", "vae", "image_encoder"):
        assert find_weights(joint / "export", name), name
    losses, validation = rows(joint, "train"), rows(joint, "validation")
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    assert {"diffusion", "reconstruction", "total", "gradient_norm", "learning_rate"} <= set(losses[0])
    parts = ("data", "encode", "unet", "decode", "reconstruct", "render", "backward", "optimizer")
    assert {"samples_per_second", "memory_gib", *(f"seconds_{part}" for part in parts)} <= set(losses[0])
    assert {"views_psnr", "render_psnr", "delta_psnr", "lgm_unseen_psnr"} <= set(validation[0])


def test_both_networks_are_trained_and_the_vae_is_not(joint, setting):
    start = train(setting, "start", "train.steps=1", "train.validate_every=9", "train.learning_rate=1e-12")
    before, after = weights(start), weights(joint)
    assert before.keys() == after.keys()
    moved = {k for k in after if (after[k] - before[k]).abs().max() > 1e-5}
    assert any("unet.unet" in k for k in moved) and any("lgm.conv" in k for k in moved)
    assert not any("vae" in k or "image_encoder" in k for k in after)
    frozen = [load_file(run / "export" / "vae.safetensors") for run in (start, joint)]
    assert all(torch.equal(frozen[0][k], frozen[1][k]) for k in frozen[0])


def test_an_interrupted_joint_run_resumes_exactly(joint, setting):
    train(setting, "parts", "train.steps=2")
    parts = train(setting, "parts")
    whole, resumed = weights(joint), weights(parts)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert [r["total"] for r in rows(joint, "train")] == [r["total"] for r in rows(parts, "train")]
    one, other = (sorted((run / "checkpoints" / "step_00000004").iterdir()) for run in (joint, parts))
    files = {a.name: a.read_bytes() == b.read_bytes() for a, b in zip(one, other, strict=True)}
    assert files.pop("config.yaml") is False and files.pop("trainer.json") is False  # the folder's name, the seconds
    assert "random_states_0.pkl" in files and all(files.values()), files


@pytest.mark.slow
def test_two_processes_equal_one(setting):
    common = ["train.steps=2", "train.validate_every=9", "train.ema_decay=0"]  # tensorboard too
    one = train(setting, "one", "train.batch_size=1", "train.gradient_accumulation=2", *common)
    out = setting / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += ["--config", str(setting / "tiny.yaml"), "--device", "cpu", f"train.output_dir={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "train.batch_size=1", *common], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    a, b = weights(one), weights(out)
    assert max((a[k] - b[k]).abs().max() for k in a) < 2e-5


def test_an_export_is_a_checkpoint_that_training_starts_from(joint, setting):
    out = train(
        setting, "from_export", f"model.pretrained.checkpoint={joint / 'export'}", "train.steps=1",
        "train.validate_every=9", "train.learning_rate=1e-12",
    )  # fmt: skip
    exported, again = (load_file(run / "export" / "recon_model.safetensors") for run in (joint, out))
    assert all(torch.allclose(exported[k].float(), again[k].float(), atol=1e-3) for k in exported)


def test_the_best_is_an_export_with_its_scores(joint):
    scores = json.loads((joint / "best" / "validation.json").read_text())
    assert scores["step"] == 4 and scores["render_psnr"] == rows(joint, "validation")[0]["render_psnr"]
    best, last = (load_file(joint / name / "recon_model.safetensors") for name in ("best", "export"))
    assert best.keys() == last.keys() and all(torch.equal(best[k], last[k]) for k in best)  # step 4 is the last too


def test_a_run_of_another_configuration_is_not_resumed_and_not_touched(joint, setting, capsys):
    from ouroboros3d.cli.train import main

    before = (joint / "config.yaml").read_text()
    arguments = [
        "--config",
        str(setting / "tiny.yaml"),
        "--device",
        "cpu",
        f"train.output_dir={joint}",
        "train.steps=5",
    ]
    assert call(main, [*arguments, "train.seed=5", "model.lgm.time_channels=16"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "of another configuration: model.lgm.time_channels 8 -> 16, train.seed 0 -> 5; set these back" in last
    assert (joint / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["train.stepz"]),
        (["train.steps=many"], ["train.steps", "many"]),
        (["data.root=MISSING"], ["MISSING", "no such folder"]),
        (["model.pretrained.checkpoint=MISSING"], ["MISSING", "no such checkpoint folder"]),
        (["objective.lpips_weight=1"], ["objective.lpips_weight"]),
        (["objective.diffusion=false", "objective.reconstruction=none"], ["objective.diffusion", "nothing"]),
        (["train.resume=MISSING"], ["train.resume", "MISSING"]),
        (["--resume", "MISSING"], ["train.resume", "MISSING"]),
        (["data.val=train.txt"], ["data.val = train.txt", "3 of its 3", "object_1, object_2, object_3"]),
        (["train.batch_size=4"], ["train.batch_size", "4 samples per step", "has 3"]),
        (["train.optimizer=sgd"], ["train.optimizer", "sgd", "adamw_8bit"]),
        (["train.spike_factor=0.5"], ["train.spike_factor", "0.5", "more than 1"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(setting, capsys, tmp_path, overrides, words):
    from ouroboros3d.cli.train import main

    arguments = ["--config", str(setting / "tiny.yaml"), "--device", "cpu", f"train.output_dir={setting / 'bad'}"]
    missing = str(tmp_path / "missing")
    assert call(main, [*arguments, *(text.replace("MISSING", missing) for text in overrides)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word.replace("MISSING", missing) in last for word in words), last


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_so_to_a_script(setting, monkeypatch, number, status):
    from ouroboros3d.cli import train as script

    monkeypatch.setattr(
        "ouroboros3d.training.trainer.Trainer.run", lambda trainer: setattr(trainer, "stopped_by", number)
    )
    arguments = ["--config", str(setting / "tiny.yaml"), "--device", "cpu", f"train.output_dir={setting / 'stopped'}"]
    assert call(script.main, arguments) == status


def test_compiled_networks_keep_their_names_and_values():
    """With torch.compile's eager backend; state dicts, and so checkpoints and exports, have no `_orig_mod`."""
    objective = nn.Module()
    objective.trained = nn.ModuleDict({"unet": nn.Sequential(nn.Linear(3, 3), nn.SiLU())})
    x = torch.ones(1, 3)
    before, names = objective.trained["unet"](x), list(objective.state_dict())
    compile_networks(objective, 1, backend="eager")
    assert objective.trained["unet"]._compiled_call_impl is not None
    assert list(objective.state_dict()) == names
    assert torch.equal(objective.trained["unet"](x), before)


def test_a_config_that_compiles_calls_for_it(setting, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "ouroboros3d.training.setup.compile_networks",
        lambda objective, _accumulation: compiled.extend(objective.trained),
    )
    train(setting, "compiled", "train.compile=true", "train.steps=1", "train.validate_every=9")
    assert compiled == ["unet", "lgm"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(setting, tmp_path, capsys):
    from ouroboros3d.cli.train import main

    arguments = ["--config", str(setting / "tiny.yaml"), "--device", "cuda", f"train.output_dir={tmp_path / 'run'}"]
    assert call(main, arguments) == 2
    assert "cuda" in capsys.readouterr().err.lower()
