"""The inference front end: any photo to the square, recentred picture that conditions the recursion."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ouroboros3d.errors import one_line
from ouroboros3d.inference.colour import ImageError, to_srgb, with_alpha
from ouroboros3d.inference.cutout import foreground_box, has_mask, remove_background, remove_white

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 178_956_970  # where PIL refuses too: it would take 0.7 GB to open
MIN_FOREGROUND = 2  # pixels per side


class ConditionImage(NamedTuple):
    """What the networks see of a picture."""

    picture: Image.Image  # RGBA, size x size: cut out and recentred (alpha 255 everywhere if nothing was cut)
    tensor: Tensor  # [3, size, size] float32 in [-1, 1]: the picture on the background colour


def load_condition_image(
    picture: str | Path | Image.Image | np.ndarray,
    size: int,
    remove_bg: bool | str = True,
    border: float = 0.2,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> ConditionImage:
    """Reads a picture, cuts out its foreground and centres it on a square of `background` (rgb in [0, 1]).

    It is a file, a PIL image or an array [H, W], [H, W, 3] or [H, W, 4], uint8 or float in [0, 1].
    An alpha channel is the mask if it hides more than dust (`cutout.has_mask`). Without one `cut_out` removes the
    background; `remove_bg="white"` removes the white of a product photo instead, and `remove_bg=False` takes the
    picture as it is, padded to a square. The longer side of the foreground's bounding box covers (1 - border) of the
    square, as in LGM; a picture without a mask fills it. Colours are converted to sRGB (`colour.to_srgb`). Of an
    animated picture the first frame is used, with a warning. Raises ImageError.
    """
    if size < 1 or not 0 <= border < 1:
        raise ValueError(f"size must be positive and border in [0, 1), got {size} and {border}")
    name = str(picture) if isinstance(picture, (str, Path)) else "picture"
    picture = open_picture(picture) if isinstance(picture, (str, Path)) else as_picture(picture)
    picture = cut_out(picture, name, remove_bg)
    masked = bool(remove_bg) or has_mask(picture)
    # Premultiplied, so that the colour hidden under transparent pixels never bleeds into the edges.
    premultiplied = recentre(picture, size, border if masked else 0.0, name)
    rgba = torch.from_numpy(np.array(premultiplied)).permute(2, 0, 1).float() / 255
    rgb = rgba[:3] + (1 - rgba[3:]) * torch.tensor(background, dtype=torch.float32)[:, None, None]
    return ConditionImage(premultiplied.convert("RGBA"), rgb.clamp(0, 1) * 2 - 1)


def open_picture(path: str | Path) -> Image.Image:
    """Reads a png, jpg, webp, bmp, tiff or gif of any colour mode, upright (EXIF), as 8-bit RGBA.

    Raises ImageError.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageError(f"{path}: is a folder; name one picture in it")
    if not path.exists():
        raise ImageError(f"{path}: no such file; check the path")
    if not path.is_file():
        raise ImageError(f"{path}: is not a regular file; save the picture to disk first")
    if path.stat().st_size == 0:
        raise ImageError(f"{path}: the file is empty; save or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at half of MAX_PIXELS
            opened = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: not a picture in a known format; convert it to png, jpg or webp") from None
    except PermissionError:
        raise ImageError(f"{path}: no permission to read it; change the file's permissions") from None
    except Exception as error:  # a decoder raises whatever its parser trips over
        raise _unreadable(path, error) from error
    with opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise _too_large(path)
        try:
            if getattr(opened, "is_animated", False) and opened.format != "MPO":  # a .jpg with previews
                log.warning("%s: has %d frames; using the first", path, opened.n_frames)
                opened.seek(0)
            opened.load()
            profile = opened.info.get("icc_profile")  # turning the picture may lose it
            picture = ImageOps.exif_transpose(opened)
        except Exception as error:
            raise _unreadable(path, error) from error
    return to_srgb(picture, str(path), profile)


def cut_out(picture: Image.Image, name: str = "picture", how: bool | str = True) -> Image.Image:
    """An RGBA picture whose alpha channel says where its object is: its own, if that is a mask, else as `how` says:
    True removes the background, "white" removes a product photo's white, False keeps everything. Raises ImageError, and
    ValueError for another `how`."""
    if how not in (True, False, "white"):
        raise ValueError(f"remove_background must be True, False or 'white', got {how!r}")
    if has_mask(picture):
        return picture
    picture = with_alpha(picture, 255)  # stray transparent pixels are no hole
    if not how:
        return picture
    return (remove_white if how == "white" else remove_background)(picture, name)


def as_picture(picture: Image.Image | np.ndarray) -> Image.Image:
    """A PIL image or an array as 8-bit RGBA. Raises ImageError."""
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    return to_srgb(ImageOps.exif_transpose(picture), "picture", picture.info.get("icc_profile"))


def _from_array(values: np.ndarray) -> Image.Image:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)) or values.size == 0:
        raise ImageError(f"picture: an array must be [H, W], [H, W, 3] or [H, W, 4], got {list(values.shape)}")
    if np.issubdtype(values.dtype, np.floating):
        if not (values.min() >= 0 and values.max() <= 1):  # written so that NaN fails too
            raise ImageError("picture: a float array must lie in 0 to 1; divide by 255 or convert to uint8")
        values = np.rint(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise ImageError(f"picture: an array must be uint8 or float, got {values.dtype}")
    return Image.fromarray(values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values)


def recentre(picture: Image.Image, size: int, border: float, name: str = "picture") -> Image.Image:
    """The foreground of an RGBA picture, centred on a transparent square of size x size pixels.

    The longer side of its bounding box (haze and dust left out) becomes (1 - border) * size. Returns premultiplied
    alpha (PIL's mode RGBa). Raises ImageError if there is no foreground or next to none.
    """
    box = foreground_box(picture)
    if box is None:
        raise ImageError(f"{name}: is fully transparent; use a picture with a visible object")
    width, height = box[2] - box[0], box[3] - box[1]
    if min(width, height) < MIN_FOREGROUND:
        raise ImageError(f"{name}: its foreground is only {width} x {height} pixels; use a larger picture")
    scale = round(size * (1 - border)) / max(width, height)
    new_size = max(1, round(width * scale)), max(1, round(height * scale))
    # Neither filter rings where it is used, which would draw a halo around the object.
    resample = Image.Resampling.HAMMING if scale < 1 else Image.Resampling.BILINEAR
    foreground = picture.crop(box).convert("RGBa").resize(new_size, resample)
    square = Image.new("RGBa", (size, size))
    square.paste(foreground, ((size - new_size[0]) // 2, (size - new_size[1]) // 2))
    return square


def _too_large(path: Path) -> ImageError:
    return ImageError(f"{path}: has more than {MAX_PIXELS / 1e6:.0f} million pixels; scale it down first")


def _unreadable(path: Path, error: Exception) -> ImageError:
    return ImageError(f"{path}: is damaged or cut short ({one_line(error)}); save or download it again")
