"""What inference.py says of pictures, weights, arguments and folders that it cannot use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from inference_runs import RESULTS, files, infer, model_folder, refused
from photos import huge
from PIL import Image

from ouroboros3d.build import build_models
from ouroboros3d.cli import call
from ouroboros3d.cli.inference import main
from ouroboros3d.config.loading import load_config
from ouroboros3d.models.weights import read_state, save_checkpoint, write_state


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_config, make_models) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), make_config, make_models)


def truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])


BAD = {  # how a picture is made, and what is said of it
    "missing": (lambda path: None, "no such file"),
    "folder": (Path.mkdir, "a folder without pictures"),
    "empty": (Path.touch, "is empty"),
    "text": (lambda path: path.write_text("not a picture"), "not a picture"),
    "truncated": (truncated, "damaged"),
    "transparent": (Image.new("RGBA", (16, 16)).save, "fully transparent"),
    "pixel": (Image.new("RGB", (1, 1)).save, "1 x 1 pixels"),
    "huge": (huge, "million pixels"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_picture_is_named_before_any_work(model, tmp_path, capsys, kind):
    (make, words), path, out = BAD[kind], tmp_path / f"{kind}.png", tmp_path / "out"
    make(path)
    refused(infer(model, out, "--no_remove_bg", "--input_img", path), capsys, str(path), words)
    assert not out.exists()


def test_bad_pictures_among_others_are_listed_at_the_end(model, tmp_path, capsys):
    """Names that do not exist or hold nothing are wrong arguments; what only opening shows does not end the run."""
    bad = {tmp_path / f"{kind}.png": words for kind, (_, words) in list(BAD.items())[2:]}
    for path in bad:
        BAD[path.stem][0](path)
    (tmp_path / "list.txt").write_text("\n".join(map(str, [*bad, model / "toy.png", "gone.png"])))
    arguments = ["--input_img", tmp_path / "list.txt", "--no_remove_bg", "--steps", "1", "--summary"]
    assert infer(model, tmp_path / "out", *arguments) == 1
    assert files(tmp_path / "out") == RESULTS | {"index.html"}
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-8:]
    assert last[0] == "7 of 8 pictures failed:" and "Traceback" not in captured.err
    for (path, words), line in zip(bad.items(), last[1:], strict=False):
        assert line.startswith(f"{path}: ") and words in line
    assert last[7] == "gone.png: no such file; check the path"
    page = (tmp_path / "out" / "index.html").read_text()
    assert "toy.ply" in page and "gone.png: no such file" in page
    assert str(tmp_path / "out" / "toy.ply") in captured.out


def test_results_never_overwrite_pictures_or_each_other(model, tmp_path, capsys):
    toy = shutil.copy(model / "toy.png", tmp_path / "toy.png")
    refused(infer(model, tmp_path, "--input_img", toy), capsys, str(toy), "output folder")
    refused(infer(model, tmp_path / "out", "--input_img", toy, model / "toy.png"), capsys, "same name")
    shutil.copy(toy, tmp_path / "toy_input.png")
    refused(infer(model, tmp_path / "out", "--input_img", toy, tmp_path / "toy_input.png"), capsys, "same name")
    assert files(tmp_path) == {"toy.png", "toy_input.png"}


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def as_broken_pickle(path: Path) -> None:
    path.unlink()
    path.with_suffix(".pth").write_bytes(b"PK\x03\x04 and no more")


def wider(path: Path) -> None:
    changes = ["model.pretrained.checkpoint=null", "model.lgm.time_embed_dim=32"]
    save_checkpoint(path.parent, build_models(load_config(path.parents[1] / "tiny.yaml", changes).model), frozen=True)


@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (lambda path: shutil.rmtree(path.parent), "vae", ["no such checkpoint folder"]),
        (shorter, "mv_model_unet", ["mv_model_unet.safetensors", "truncated"]),
        (as_broken_pickle, "recon_model", ["recon_model.pth"]),
        (Path.unlink, "recon_model", ["has no recon_model"]),
        (Path.unlink, "vae", ["has no vae", "model.pretrained.svd"]),
        (wider, "recon_model", ["recon_model", "does not fit", "--config"]),
    ],
)
def test_a_bad_checkpoint_is_named(model, tmp_path, capsys, damage, name, words):
    shutil.copytree(model, tmp_path / "model")
    ckpt = tmp_path / "model" / "ckpt"
    damage(ckpt / f"{name}.safetensors")
    refused(infer(model, tmp_path / "out", "--ckpt", ckpt), capsys, str(ckpt), *words)
    assert files(tmp_path / "out") == set()


def test_nan_in_the_loop_ends_it(model, tmp_path, capsys):
    ckpt = shutil.copytree(model / "ckpt", tmp_path / "ckpt")
    state = read_state(ckpt / "recon_model.safetensors")
    state["conv.bias"][5] = float("nan")  # only the scales
    write_state(state, ckpt / "recon_model.safetensors")
    status = infer(model, tmp_path / "out", "--ckpt", ckpt, "--save_steps")
    refused(status, capsys, "NaN", "step 0", lines=2)
    assert list((tmp_path / "out").iterdir()) == []


without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sampler.steps=many"], ["sampler.steps", "many"]),
        (["sampler.steps=[1"], ["sampler.steps=[1"]),
        (["sampler=3"], ["sampler=3", "SamplerConfig"]),
        (["sampler.steps="], ["sampler.steps"]),
        (["model.conventions.rays=odd"], ["model.conventions.rays", "textbook"]),
        (["--elevation", "95"], ["cameras.elevation = 95"]),
        (["--elevation", "nan"], ["cameras.elevation = nan"]),
        (["--seed", "-1"], ["sampler.seed = -1"]),
        (["turntable.size=1"], ["turntable.size = 1"]),
        (["model.pretrained.checkpoint=null"], ["--ckpt"]),  # nothing is made up
        (["model.pretrained.svd=/nowhere/missing"], ["model.pretrained.svd=/nowhere/missing", "no such folder"]),
        pytest.param(["--device", "cuda"], ["--device cuda", "--device cpu"], marks=without_cuda),
    ],
)
def test_what_cannot_be_done_is_named(model, tmp_path, capsys, arguments, words):
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


def test_a_file_in_the_way_of_the_folder_is_named(model, tmp_path, capsys):
    (tmp_path / "out").touch()
    refused(infer(model, tmp_path / "out"), capsys, str(tmp_path / "out"), "another output folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(model, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    refused(infer(model, tmp_path / "out"), capsys, str(tmp_path / "out"), "Permission denied")
