"""Cuts objects out of their backgrounds: which alpha channels are masks, what is dust, which network cuts out.

Masks are boolean [H, W] arrays.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ouroboros3d.errors import one_line
from ouroboros3d.inference.colour import ImageError, with_alpha

log = logging.getLogger(__name__)

FAINT = 12  # of 255: alpha up to here is haze of a background removal, not foreground
WHITE = 240  # of 255: a product photo's background is at least this bright in every channel
U2NETP = Path(__file__).with_name("u2netp.onnx")
U2NETP_SHA256 = "309c8469258dda742793dce0ebea8e6dd393174f89934733ecc8b14c76f4ddd8"
U2NETP_SIZE = 320  # pixels per side of the network's input
WAY_OUT = "give the picture a transparent background or pass --no_remove_bg"


def has_mask(picture: Image.Image) -> bool:
    """Whether the alpha channel of an RGBA picture is a mask of an object: what it hides is more than dust.

    A photo with a few stray transparent pixels, or with rounded corners, is not cut out.
    """
    alpha = picture.getchannel("A")
    if alpha.getextrema()[0] > 255 - FAINT:
        return False
    hidden = np.asarray(alpha) <= 255 - FAINT
    return bool(without_dust(hidden, hidden.size).any())


def foreground_box(picture: Image.Image) -> tuple[int, int, int, int] | None:
    """The bounding box (left, top, right, bottom) of the object without haze and dust; None if nothing is left."""
    visible = np.asarray(picture.getchannel("A")) > FAINT
    if not visible.any():
        return None
    return Image.fromarray(without_dust(visible)).getbbox()


def without_dust(mask: np.ndarray, whole: int | None = None) -> np.ndarray:
    """The mask without its dust: connected pieces of up to 1/500 of `whole` pixels (None: of the largest piece), and of
    up to 4 pixels where the whole has at least 200. Pieces that touch at a corner are connected."""
    from scipy import ndimage

    pieces, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return mask
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    whole = int(sizes.max()) if whole is None else whole
    return (sizes > max(whole // 500, min(4, whole // 50)))[pieces]


def remove_background(picture: Image.Image, name: str) -> Image.Image:
    """Cuts the object out of an opaque RGBA picture: by rembg where that is installed and works, else by U2-Net's small
    network, which comes with this package. Raises ImageError if nothing is found."""
    mask = _rembg_mask(picture, name)
    if mask is None:
        mask = u2netp_mask(picture)
    if mask.getextrema()[1] <= FAINT:
        raise ImageError(f"{name}: the background removal found no object; {WAY_OUT}")
    return with_alpha(picture, mask)


def remove_white(picture: Image.Image, name: str) -> Image.Image:
    """Cuts the object out of a product photo: white that is connected to the picture's edge goes, white within the
    object stays. Raises ImageError if nothing or everything is white."""
    from scipy import ndimage

    white = np.asarray(picture.convert("RGB")).min(-1) >= WHITE
    pieces, _ = ndimage.label(white)
    edge = np.unique(np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]]))
    background = np.isin(pieces, edge[edge > 0])
    if background.all() or not background.any():
        what = "is white all over" if background.any() else "has no white background"
        raise ImageError(f"{name}: {what}; leave out --white_background")
    return with_alpha(picture, Image.fromarray(np.where(background, 0, 255).astype(np.uint8)))


def u2netp_mask(picture: Image.Image) -> Image.Image:
    """The soft mask (mode L, the picture's size) of what stands out, by U2-Net's small network (Qin et al. 2020)."""
    session = _u2netp()
    small = picture.convert("RGB").resize((U2NETP_SIZE, U2NETP_SIZE), Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.float32)
    values = (values / max(values.max(), 1.0) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    batch = values.transpose(2, 0, 1)[None].astype(np.float32)
    mask = session.run(None, {session.get_inputs()[0].name: batch})[0][0, 0]
    sure = mask.max() >= 0.5  # else stretching would make an object of noise
    mask = (mask - mask.min()) / max(mask.max() - mask.min(), 1e-6) * sure
    return Image.fromarray(np.rint(mask * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)


def _rembg_mask(picture: Image.Image, name: str) -> Image.Image | None:
    """rembg's mask; None without rembg, or where it fails (its first use downloads a network)."""
    try:
        import rembg
    except (ImportError, SystemExit):  # it exits the interpreter when onnxruntime is missing
        return None
    try:
        cut = rembg.remove(picture.convert("RGB"), session=_rembg_session()).convert("RGBA")
    except Exception as error:  # among them every way in which its first download can fail
        log.warning("%s: rembg could not remove the background (%s); using u2netp instead", name, one_line(error))
        return None
    return cut.getchannel("A")


@lru_cache(maxsize=1)
def _rembg_session():
    import rembg

    return rembg.new_session("u2net")  # the release's model; the newest rembg defaults to a non-commercial one


@lru_cache(maxsize=1)
def _u2netp():
    if not U2NETP.is_file():
        raise ImageError(f"{U2NETP}: the network that removes backgrounds is missing; python scripts/get_u2netp.py")
    try:
        import onnxruntime
    except ImportError as error:
        raise ImageError(f"removing a background needs onnxruntime: pip install onnxruntime, or {WAY_OUT}") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(str(U2NETP), options, providers=["CPUExecutionProvider"])
