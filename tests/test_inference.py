"""inference.py as a user runs it, with a tiny random model: what it writes, skips, repeats and keeps."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import full_disk
from inference_runs import RESULTS, files, infer, model_folder, refused
from PIL import Image

from ouroboros3d import files as files_module
from ouroboros3d.build import build_cameras
from ouroboros3d.cli import call
from ouroboros3d.cli.inference import configure, main, parse
from ouroboros3d.cli.options import SMALL_CONFIG
from ouroboros3d.config.loading import load_config, save_config
from ouroboros3d.gaussians import load_ply
from ouroboros3d.models.lgm import LGM

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_config, make_models) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), make_config, make_models)


@pytest.fixture(scope="module")
def results(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert infer(model, out, "--save_steps", "--seed", "3") == 0
    return out


def test_the_results_stand_next_to_each_other(results):
    kinds = ("views.png", "rgb.png", "ccm.png")
    steps = {f"toy_steps/{i:02d}{end}" for i in (0, 1) for end in (".ply", *(f"_{k}" for k in kinds))}
    assert files(results) == RESULTS | {"toy_steps.png"} | steps
    assert Image.open(results / "toy.png").size == (4 * 32, 2 * 32)
    assert Image.open(results / "toy_input.png").size == (32, 32)
    assert Image.open(results / "toy_steps" / "01_ccm.png").size == (4 * 32, 2 * 32)


def test_the_video_decodes_and_the_ply_loads(results):
    reader = imageio_ffmpeg.read_frames(str(results / "toy.mp4"))
    assert next(reader)["size"] == (16, 16)
    assert sum(1 for _ in reader) == 4
    gaussians = load_ply(results / "toy.ply")
    assert gaussians.means.shape == (1, 4 * 8**2, 3) and gaussians.means.abs().max() <= 1
    last = load_ply(results / "toy_steps" / "01.ply")  # in the canonical frame, which load_ply finds back to
    torch.testing.assert_close(gaussians.means, last.means, atol=1e-6, rtol=0)
    torch.testing.assert_close(gaussians.covariances(), last.covariances(), atol=1e-7, rtol=1e-3)


def test_the_seed_makes_the_result_also_among_other_pictures(model, results, tmp_path):
    other = tmp_path / "other.png"
    shutil.copy(model / "toy.png", other)
    assert infer(model, tmp_path / "a", "--seed", "3", "--input_img", other, model / "toy.png") == 0
    assert files(tmp_path / "a") == RESULTS | {name.replace("toy", "other") for name in RESULTS}
    for name in ("toy.ply", "toy.png", "toy_input.png"):
        assert (tmp_path / "a" / name).read_bytes() == (results / name).read_bytes()
    assert infer(model, tmp_path / "b", "sampler.seed=4") == 0
    assert (tmp_path / "b" / "toy.ply").read_bytes() != (results / "toy.ply").read_bytes()


def test_a_second_run_replaces_the_first(model, results, tmp_path):
    shutil.copytree(results, tmp_path / "out")
    assert infer(model, tmp_path / "out", "--save_steps", "--steps", "1") == 0
    found = files(tmp_path / "out")
    assert "toy_steps/00.ply" in found and "toy_steps/01.ply" not in found
    assert (tmp_path / "out" / "toy.ply").read_bytes() != (results / "toy.ply").read_bytes()


def test_overrides_act_and_may_follow_the_pictures(model, tmp_path, capsys):
    picture = str(model / "toy.png")
    changes = ["cameras.num_views=5", "sampler.steps=1", "turntable.size=24", "sampler.guidance=[1,2]"]
    assert infer(model, tmp_path, "--input_img", picture, *changes) == 0
    assert Image.open(tmp_path / "toy.png").size == (4 * 32, 2 * 32)
    assert np.all(np.asarray(Image.open(tmp_path / "toy.png"))[32:, 32:] == 255)
    assert next(imageio_ffmpeg.read_frames(str(tmp_path / "toy.mp4")))["size"] == (24, 24)
    captured = capsys.readouterr()
    assert "sigma 80" in captured.err and "1/1" in captured.err
    assert "unet" in captured.out and str(tmp_path / "toy.mp4") in captured.out


def test_the_elevation_moves_the_cameras(model):
    def cameras(*flags: str):
        arguments = ["--input_img", "x", "--config", str(model / "tiny.yaml"), *flags]
        return build_cameras(configure(parse(arguments)))

    level, above = cameras(), cameras("--elevation", "30")
    assert torch.allclose(level.centers[0, 4], torch.tensor([0, 0, -1.7417]), atol=1e-5)
    assert torch.allclose(level.c2w[0, 0], above.c2w[0, 0], atol=1e-6)  # the first is always the canonical one
    angle = torch.rad2deg(torch.acos((level.centers[0, 4] @ above.centers[0, 4]) / 1.7417**2))
    assert angle.item() == pytest.approx(60, abs=1e-2)


def test_a_picture_seen_from_above_gives_another_object(model, results, tmp_path):
    assert infer(model, tmp_path, "--seed", "3", "--elevation", "-10.5") == 0
    assert (tmp_path / "toy.ply").read_bytes() != (results / "toy.ply").read_bytes()


def test_half_precision_runs_and_stays_close(model, results, tmp_path):
    assert infer(model, tmp_path, "--steps", "1", "--dtype", "fp16", "turntable.step=360") == 0
    assert infer(model, tmp_path, "--seed", "3", "--dtype", "bf16", "turntable.step=360") == 0
    exact, half = (np.asarray(Image.open(f / "toy.png"), float) for f in (results, tmp_path))
    assert 0 < np.abs(exact - half).mean() < 10


def test_the_defaults_are_the_small_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = parse(["--input_img", "x.png"])
    assert options.config == SMALL_CONFIG
    assert options.output_dir == "outputs" and configure(options).model.image_size == 64


def test_weights_are_also_looked_up_in_the_repository(model, tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "ROOT", model)
    monkeypatch.chdir(tmp_path)
    assert infer(model, tmp_path, "model.pretrained.checkpoint=ckpt", "--steps", "1") == 0


def test_weights_bring_their_configuration(model, tmp_path, capsys):
    """A folder's own config.yaml, and for export/ of a run the run's; --config comes first."""
    run = tmp_path / "run"
    shutil.copytree(model / "ckpt", run / "export")
    config = load_config(model / "tiny.yaml", ["sampler.steps=1", "turntable.step=360"])
    config.model.pretrained.vae = "moved/vae.safetensors"  # of another machine; the weights have their own
    save_config(config, run / "config.yaml")
    common = ["--input_img", str(model / "toy.png"), "--device", "cpu", "--formats", "ply"]
    for number, weights in enumerate((["--ckpt", f"{run}"], [f"model.pretrained.checkpoint={run / 'export'}"])):
        assert call(main, [*common, *weights, "--output_dir", str(tmp_path / f"{number}")]) == 0
        assert f"configuration: {run / 'config.yaml'}\n" in capsys.readouterr().err
        record = json.loads((tmp_path / f"{number}" / "toy.json").read_text())
        assert record["settings"]["sampler"]["steps"] == 1
    assert parse([*common, "--ckpt", str(run), "--config", "other.yaml"]).config == "other.yaml"
    assert parse([*common, "--ckpt", str(model / "ckpt")]).config == SMALL_CONFIG


def test_every_kind_of_picture_works(model, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    colour = Image.fromarray(values)
    folder = tmp_path / "pictures"
    folder.mkdir()
    colour.convert("L").save(folder / "grey.png")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.convert("P").save(folder / "palette.gif")
    Image.fromarray(values[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    colour.save(folder / "moving.webp", save_all=True, append_images=[Image.new("RGB", (24, 20))])
    pictures = sorted(folder.iterdir())
    arguments = ("--input_img", *pictures, "--no_remove_bg", "--steps", "1")
    assert infer(model, tmp_path / "out", *arguments) == 0
    assert files(tmp_path / "out") >= {f"{p.stem}.ply" for p in pictures}
    grey, deep = (np.asarray(Image.open(tmp_path / "out" / f"{n}_input.png")) for n in ("grey", "deep"))
    assert np.all(grey[..., 0] == grey[..., 1]) and np.all(deep[..., 0] == deep[..., 2])


def test_finished_pictures_are_skipped(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert infer(model, out, "--steps", "1") == 0
    stamp = (out / "toy.ply").stat().st_mtime_ns
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(LGM, "forward", None)  # nothing runs
        assert infer(model, out, "--steps", "1") == 0
    captured = capsys.readouterr()
    assert "1 of 1 pictures are finished" in captured.out and str(out / "toy.ply") in captured.out
    assert "loading libraries" not in captured.err
    for changed in (["--overwrite"], ["--seed", "1"], ["--border", "0.3"], ["--formats", "ply", "--seed", "1"]):
        assert infer(model, out, "--steps", "1", *changed) == 0
        assert (out / "toy.ply").stat().st_mtime_ns > stamp, changed
        stamp = (out / "toy.ply").stat().st_mtime_ns


@pytest.mark.slow
def test_processes_divide_the_pictures(model, tmp_path):
    """As torchrun starts them: two processes that know their rank, gloo between them."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(model / "toy.png", folder / f"{name}.png")
    (folder / "d.png").write_text("not a picture")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "inference.py", "--input_img", folder, "--config", model / "tiny.yaml"]
    command += ["--output_dir", tmp_path / "out", "--steps", "1", "--summary", "--device", "cpu", "turntable.step=360"]
    processes = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(list(map(str, command)), env=env, **pipes))
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    assert files(tmp_path / "out") == {n.replace("toy", x) for n in RESULTS for x in "abc"} | {"index.html"}
    assert "1 of 4 pictures failed" in said[0][1] and "failed" not in said[1][1]
    assert "d.png: not a picture" in (tmp_path / "out" / "index.html").read_text()


def test_candidates_and_formats(model, tmp_path, capsys):
    assert infer(model, tmp_path, "--candidates", "2", "--elevation", "auto", "--formats", "ply") == 0
    assert files(tmp_path) == {"toy_input.png", "toy.ply", "toy.json"}
    record = json.loads((tmp_path / "toy.json").read_text())
    assert record["seed"] in (0, 1) and -5 <= record["elevation"] <= 30
    assert record["files"] == ["toy.ply", "toy_input.png"]
    assert f"seed {record['seed']}, elevation {record['elevation']:.0f}" in capsys.readouterr().out


def test_the_player_and_the_release_s_ply(model, tmp_path):
    """The steps' .ply are written as the object's is: upright, or as the release has them."""
    written = []
    for options in (["--html", "--raw"], ["--elevation", "20"]):
        assert infer(model, tmp_path, "--formats", "ply", "--save_steps", *options) == 0
        written.append((tmp_path / "toy.ply").read_bytes())
        assert (tmp_path / "toy_steps" / "01.ply").read_bytes() == written[-1]
    assert written[0] != written[1] and (tmp_path / "toy.html").is_file()


def test_a_disk_that_fills_up_keeps_earlier_results_and_no_halves(model, results, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(results, out)
    with full_disk(80_000):  # enough for all but the .ply
        status = infer(model, out, "--steps", "1", "model.lgm.input_size=64", "model.lgm.splat_size=32")
    refused(status, capsys, f"cannot write {out / 'toy.ply'}: File too large", lines=2)
    assert files(out) == files(results)
    assert (out / "toy.ply").read_bytes() == (results / "toy.ply").read_bytes()


def test_an_interruption_leaves_nothing_and_has_its_own_status(model, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LGM, "forward", interrupted)
    assert infer(model, tmp_path, "--save_steps") == 130
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1].startswith("interrupted") and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
