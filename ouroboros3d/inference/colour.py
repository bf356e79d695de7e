"""Any picture as 8-bit sRGB with alpha: colour modes, deep greyscale and embedded colour profiles."""

from __future__ import annotations

import io
import logging

import numpy as np
from PIL import Image, ImageCms

from ouroboros3d.errors import UserError, one_line

log = logging.getLogger(__name__)

# Colour space of a profile -> the picture's modes that hold values of it, and the one lcms reads.
SPACES = {"RGB": (("RGB", "L"), "RGB"), "GRAY": (("L",), "L"), "CMYK": (("CMYK",), "CMYK")}


class ImageError(UserError, ValueError):
    """A picture cannot be used. The message is one line: the file, what is wrong, what to do."""


def to_srgb(picture: Image.Image, name: str, profile: bytes | None = None) -> Image.Image:
    """8-bit RGBA in sRGB of any PIL mode. The values are those of the picture's ICC profile (`profile`, else its own),
    converted relative-colorimetrically; without a profile, or with one that cannot be used, they are sRGB, and a
    warning says so. Raises ImageError for values of unknown range."""
    profile = profile if profile is not None else picture.info.get("icc_profile")
    colours, alpha = _split(picture, name)
    rgb = _converted(colours, profile, name) if profile else None
    rgb = colours.convert("RGB") if rgb is None else rgb
    rgb.putalpha(alpha if alpha is not None else 255)
    return rgb


def with_alpha(picture: Image.Image, alpha: Image.Image | int) -> Image.Image:
    """A copy of an RGBA picture with this alpha channel."""
    copy = picture.copy()
    copy.putalpha(alpha)
    return copy


def _split(picture: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """(colours as L, RGB, CMYK or LAB, alpha or None for opaque)."""
    if picture.mode.startswith(("I", "F")):
        return _from_deep(picture, name)
    if picture.mode in ("CMYK", "LAB"):
        return picture, None
    rgba = picture.convert("RGBA")
    return (rgba.convert("L") if picture.mode in ("1", "L", "LA") else rgba.convert("RGB")), rgba.getchannel("A")


def _from_deep(picture: Image.Image, name: str) -> tuple[Image.Image, Image.Image]:
    """16-bit and float greyscale; PIL already reads deep colour as 8-bit."""
    values = np.asarray(picture, dtype=np.float32)
    white = 1.0 if picture.mode == "F" else 65535.0
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # written so that NaN fails too
        raise ImageError(f"{name}: its values, {low:g} to {high:g}, leave 0 to {white:g}; save it as 8-bit")
    alpha = np.where(values == picture.info.get("transparency"), 0, 255).astype(np.uint8)
    return Image.fromarray(np.rint(values / white * 255).astype(np.uint8)), Image.fromarray(alpha)


def _converted(colours: Image.Image, profile: bytes, name: str) -> Image.Image | None:
    """The colours in sRGB, None if the profile cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        modes, mode = SPACES.get(space, ((), ""))
        if colours.mode not in modes:
            reason = f"it is for {space or 'unknown'} values, the picture has {colours.mode}"
        else:
            intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(colours.convert(mode), source, srgb, intent, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        reason = one_line(error)
    log.warning("%s: colour profile ignored (%s); the values are taken as sRGB", name, reason)
    return None
