"""Pictures for the tests of what reads them."""

from pathlib import Path

import pytest
from PIL import Image

from ouroboros3d.inference.colour import ImageError
from ouroboros3d.inference.photo import load_condition_image

RED = (200, 30, 40)


def cut_out(width=100, height=100, box=(20, 40, 60, 50), colour=RED, hidden=(0, 0, 0)) -> Image.Image:
    """A box of `colour` on transparent pixels whose hidden colour is `hidden`."""
    picture = Image.new("RGBA", (width, height), (*hidden, 0))
    picture.paste((*colour, 255), box)
    return picture


def toy() -> Image.Image:
    return cut_out(40, 30, (8, 4, 30, 26), (200, 60, 40))


def saved(picture: Image.Image, path: Path, **options) -> Path:
    picture.save(path, **options)
    return path


def huge(path: Path) -> Path:
    """A PNG of 200 megapixels in a few kilobytes: black, one bit per pixel."""
    return saved(Image.new("1", (20_000, 10_000)), path)


def refused(path: Path, *words: str, **options) -> None:
    with pytest.raises(ImageError) as caught:
        load_condition_image(path, 32, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: "), message
    for word in words:
        assert word in message, message
