"""The front end: every colour mode, every bad file, where the foreground lands, what its edges look like."""

import numpy as np
import pytest
import torch
from photos import RED, cut_out, huge, refused, saved
from PIL import Image

from ouroboros3d.inference.cutout import FAINT
from ouroboros3d.inference.photo import load_condition_image, open_picture


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
    packing = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}  # plain, Pillow 12 cannot read its own
    path = saved(Image.new(mode, (4, 4), colour), tmp_path / "a.tiff", **packing)
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
    refused(huge(tmp_path / "a.png"), "179 million pixels", "scale it down", remove_bg=False)


def test_values_without_a_known_range(tmp_path):
    refused(saved(Image.new("F", (4, 4), 300.0), tmp_path / "a.tiff"), "300", "8-bit")
    refused(saved(Image.new("F", (4, 4), float("nan")), tmp_path / "b.tiff"), "8-bit")
    refused(saved(Image.new("I", (4, 4), 1 << 20), tmp_path / "c.tiff"), "8-bit")


def test_bad_arguments_are_the_callers_fault(tmp_path):
    path = saved(cut_out(), tmp_path / "a.png")
    for options in ({"size": 0}, {"size": 8, "border": 1.0}, {"size": 8, "border": -0.1}):
        with pytest.raises(ValueError, match="size must be positive"):
            load_condition_image(path, **options)
