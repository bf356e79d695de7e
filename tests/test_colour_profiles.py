"""Colour profiles: pictures become sRGB, and a profile that cannot be used is a warning."""

import struct

import numpy as np
import pytest
from photos import RED, saved
from PIL import Image, ImageCms

from ouroboros3d.inference.photo import as_picture, open_picture


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
