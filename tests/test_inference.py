"""inference.py as a user runs it, with a tiny random model: what it writes, what it says when it cannot."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from ouroboros3d import files as files_module
from ouroboros3d.build import build_cameras, build_models
from ouroboros3d.cli import call
from ouroboros3d.cli.inference import configure, main, parse
from ouroboros3d.cli.options import SMALL_CONFIG
from ouroboros3d.config.loading import load_config, save_config
from ouroboros3d.gaussians import load_ply
from ouroboros3d.models.lgm import LGM
from ouroboros3d.models.weights import read_state, save_checkpoint, write_state

ROOT = Path(__file__).parents[1]
RESULTS = {"toy_input.png", "toy.png", "toy.ply", "toy.mp4", "toy.json"}


@pytest.fixture(scope="session")
def model(tmp_path_factory, make_config, make_models) -> Path:
    """A folder with ckpt/ (random weights), tiny.yaml and toy.png (a cut-out)."""
    folder = tmp_path_factory.mktemp("model")
    changes = {"sampler": {"steps": 2}, "turntable": {"size": 16, "step": 90}}
    config = make_config(changes | {"model": {"pretrained": {"checkpoint": str(folder / "ckpt")}}})
    save_checkpoint(folder / "ckpt", make_models(), frozen=True)
    save_config(config, folder / "tiny.yaml")
    toy = Image.new("RGBA", (40, 30))
    toy.paste((200, 60, 40, 255), (8, 4, 30, 26))
    toy.save(folder / "toy.png")
    return folder


def infer(model: Path, out: Path, *arguments: str | Path) -> int:
    """main() on the tiny model; on toy.png unless the arguments name pictures."""
    arguments = [str(a) for a in arguments]
    if "--input_img" not in arguments:
        arguments = ["--input_img", str(model / "toy.png"), *arguments]
    return call(main, [*arguments, "--config", str(model / "tiny.yaml"), "--output_dir", str(out)])


def refused(status: int, capsys, *words: str, lines: int = 1) -> None:
    """The status is 2 and stderr is one line with these words (after the bar of the loop, if it ran)."""
    stderr = capsys.readouterr().err.replace("loading libraries\n", "")
    message = stderr.splitlines()[-1]
    assert status == 2 and message.startswith("error: "), stderr
    assert "Traceback" not in stderr and (lines > 1 or stderr.count("\n") == 1), stderr
    for word in words:
        assert word in message, message


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------- results


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


# ---------------------------------------------------------------- pictures


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


def bad_picture(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "transparent":
        Image.new("RGBA", (16, 16)).save(path)
    elif kind == "pixel":
        Image.new("RGB", (1, 1)).save(path)
    elif kind == "huge":  # its header is enough

        def chunk(name: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    return path


BAD = [
    ("missing", ["no such file"]),
    ("folder", ["a folder without pictures"]),
    ("empty", ["is empty"]),
    ("text", ["not a picture"]),
    ("truncated", ["damaged"]),
    ("transparent", ["fully transparent"]),
    ("pixel", ["1 x 1 pixels"]),
    ("huge", ["million pixels"]),
]


@pytest.mark.parametrize(("kind", "words"), BAD)
def test_a_bad_picture_is_named_before_any_work(model, tmp_path, capsys, kind, words):
    path = bad_picture(kind, tmp_path)
    out = tmp_path / "out"
    refused(infer(model, out, "--no_remove_bg", "--input_img", path), capsys, str(path), *words)
    assert not out.exists()


def test_bad_pictures_among_others_are_listed_at_the_end(model, tmp_path, capsys):
    """Names that do not exist or hold nothing are wrong arguments; what only opening shows does not end the run."""
    bad = {kind: bad_picture(kind, tmp_path) for kind, _ in BAD[2:]}
    (tmp_path / "list.txt").write_text("\n".join(map(str, [*bad.values(), model / "toy.png", "gone.png"])))
    arguments = ["--input_img", tmp_path / "list.txt", "--no_remove_bg", "--steps", "1", "--summary"]
    assert infer(model, tmp_path / "out", *arguments) == 1
    assert files(tmp_path / "out") == RESULTS | {"index.html"}
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-8:]
    assert last[0] == "7 of 8 pictures failed:" and "Traceback" not in captured.err
    for (kind, words), line in zip(BAD[2:], last[1:], strict=False):
        assert line.startswith(f"{bad[kind]}: ") and words[0] in line
    assert last[7] == "gone.png: no such file; check the path"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "toy.ply" in page and "gone.png: no such file" in page
    assert str(tmp_path / "out" / "toy.ply") in captured.out


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
    assert infer(model, tmp_path, "--formats", "ply", "--html", "--raw", "--save_steps") == 0
    assert files(tmp_path) >= {"toy.html", "toy.ply"}
    assert (tmp_path / "toy_steps" / "01.ply").read_bytes() == (tmp_path / "toy.ply").read_bytes()
    assert infer(model, tmp_path, "--formats", "ply") == 0
    assert (tmp_path / "toy_steps" / "01.ply").read_bytes() != (tmp_path / "toy.ply").read_bytes()


def test_results_never_overwrite_pictures_or_each_other(model, tmp_path, capsys):
    toy = shutil.copy(model / "toy.png", tmp_path / "toy.png")
    refused(infer(model, tmp_path, "--input_img", toy), capsys, str(toy), "output folder")
    refused(infer(model, tmp_path / "out", "--input_img", toy, model / "toy.png"), capsys, "same name")
    shutil.copy(toy, tmp_path / "toy_input.png")
    refused(infer(model, tmp_path / "out", "--input_img", toy, tmp_path / "toy_input.png"), capsys, "same name")
    assert files(tmp_path) == {"toy.png", "toy_input.png"}


def test_a_name_that_is_too_long_is_refused_before_work(model, tmp_path, capsys):
    path = shutil.copy(model / "toy.png", tmp_path / f"{'x' * 248}.png")
    refused(infer(model, tmp_path / "out", "--input_img", path), capsys, "over 255 bytes")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- weights


def damaged_checkpoint(model: Path, folder: Path, kind: str) -> Path:
    ckpt = folder / "ckpt"
    if kind == "missing":
        return ckpt
    shutil.copytree(model / "ckpt", ckpt)
    if kind == "truncated":
        file = ckpt / "mv_model_unet.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "truncated pickle":
        (ckpt / "recon_model.safetensors").unlink()
        (ckpt / "recon_model.pth").write_bytes(b"PK\x03\x04 and no more")
    elif kind in ("recon_model", "vae"):
        (ckpt / f"{kind}.safetensors").unlink()
    elif kind == "other dimensions":
        larger = ["model.pretrained.checkpoint=null", "model.lgm.time_embed_dim=32"]
        save_checkpoint(ckpt, build_models(load_config(model / "tiny.yaml", larger).model), frozen=True)
    elif kind == "NaN":
        state = read_state(ckpt / "recon_model.safetensors")
        state["conv.bias"][5] = float("nan")  # only the scales
        write_state(state, ckpt / "recon_model.safetensors")
    return ckpt


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", ["no such checkpoint folder"]),
        ("truncated", ["mv_model_unet.safetensors", "truncated"]),
        ("truncated pickle", ["recon_model.pth"]),
        ("recon_model", ["has no recon_model"]),
        ("vae", ["has no vae", "model.pretrained.svd"]),
        ("other dimensions", ["recon_model", "does not fit", "--config"]),
    ],
)
def test_a_bad_checkpoint_is_named(model, tmp_path, capsys, kind, words):
    ckpt = damaged_checkpoint(model, tmp_path, kind)
    refused(infer(model, tmp_path / "out", "--ckpt", ckpt), capsys, str(ckpt), *words)
    assert files(tmp_path / "out") == set()


def test_without_weights_nothing_is_made_up(model, tmp_path, capsys):
    refused(infer(model, tmp_path, "model.pretrained.checkpoint=null"), capsys, "--ckpt")


def test_a_hub_that_cannot_be_reached_is_named(model, tmp_path, capsys):
    status = infer(model, tmp_path, f"model.pretrained.svd={tmp_path / 'missing'}")
    refused(status, capsys, f"model.pretrained.svd={tmp_path / 'missing'}", "no such folder")


def test_nan_in_the_loop_ends_it(model, tmp_path, capsys):
    ckpt = damaged_checkpoint(model, tmp_path, "NaN")
    status = infer(model, tmp_path / "out", "--ckpt", ckpt, "--save_steps")
    refused(status, capsys, "NaN", "step 0", lines=2)
    assert list((tmp_path / "out").iterdir()) == []


# ---------------------------------------------------------------- arguments, configuration, device


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sampler.step=3"], ["step"]),
        (["sampler.steps=many"], ["sampler.steps", "many"]),
        (["sampler.steps=[1"], ["sampler.steps=[1"]),
        (["sampler=3"], ["sampler=3", "SamplerConfig"]),
        (["sampler.steps="], ["sampler.steps"]),
        (["sampler.steps=0"], ["sampler.steps = 0"]),
        (["model.conventions.rays=odd"], ["model.conventions.rays", "textbook"]),
        (["--elevation", "95"], ["cameras.elevation = 95"]),
        (["--elevation", "nan"], ["cameras.elevation = nan"]),
        (["--seed", "-1"], ["sampler.seed = -1"]),
        (["turntable.size=1"], ["turntable.size = 1"]),
    ],
)
def test_a_wrong_configuration_is_named(model, tmp_path, capsys, arguments, words):
    refused(infer(model, tmp_path, *arguments), capsys, *words)


@pytest.mark.parametrize("text", [None, "sampler: [1, 2", "just words", "samplr: {steps: 3}", "base: nowhere.yaml"])
def test_a_bad_config_file_is_named(model, tmp_path, capsys, text):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    refused(call(main, ["--input_img", str(model / "toy.png"), "--config", str(path)]), capsys, str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input_img", "x", "--speed", "3"], ["--speed"]),
        (["--input_img", "x", "--speed=3"], ["--speed=3"]),
        (["--seed", "0"], ["--input_img"]),
        (["--input_img", "x", "--border", "1.5"], ["--border", "1.5"]),
        (["--input_img", "x", "--seed", "one"], ["--seed", "one"]),
        (["--input_img", "x", "--dtype", "int8"], ["--dtype", "int8"]),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        call(main, arguments)
    refused(stopped.value.code, capsys, *words)


def test_a_device_that_is_not_there_is_named(model, tmp_path, capsys):
    refused(infer(model, tmp_path, "--device", "tpu"), capsys, "--device tpu")
    if not torch.cuda.is_available():
        refused(infer(model, tmp_path, "--device", "cuda"), capsys, "--device cuda", "--device cpu")


# ---------------------------------------------------------------- output and interruption


def test_a_file_in_the_way_of_the_folder_is_named(model, tmp_path, capsys):
    (tmp_path / "out").touch()
    refused(infer(model, tmp_path / "out"), capsys, str(tmp_path / "out"), "another output folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(model, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    refused(infer(model, tmp_path / "out"), capsys, str(tmp_path / "out"), "Permission denied")


def test_a_disk_that_fills_up_keeps_earlier_results_and_no_halves(model, results, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(results, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, hard))  # enough for all but the .ply
    try:
        status = infer(model, out, "--steps", "1", "model.lgm.input_size=64", "model.lgm.splat_size=32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
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
