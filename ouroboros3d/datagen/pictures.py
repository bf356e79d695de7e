"""Finds, decodes and reduces the pictures that a mesh file names, or says why not."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

MAX_PIXELS = 150_000_000  # 0.6 GB decoded; JPEG files of more are reduced as they are read
_KTX2 = b"\xabKTX 20\xbb\r\n\x1a\n"


class PictureError(Exception):
    """A picture is missing or cannot be decoded. The message is the reason."""


class Pictures:
    """Pictures of one asset, each decoded once: [h, w, 4] uint8 RGBA, at most `most` pixels per side."""

    def __init__(self, asset: Path, most: int) -> None:
        self.asset, self.most = asset, most
        self._decoded: dict[object, np.ndarray | PictureError] = {}

    def named(self, name: str) -> np.ndarray:
        """The picture that the asset calls `name`. Raises PictureError, which says the name."""
        try:
            return self.get(name, lambda: _read(self.asset, name))
        except PictureError as error:
            raise PictureError(f"'{name}' {error}") from error

    def get(self, key: object, data: Callable[[], bytes]) -> np.ndarray:
        """The picture of encoded `data`, which is asked for once. Raises PictureError."""
        if key not in self._decoded:
            try:
                self._decoded[key] = decode(data(), self.most)
            except PictureError as error:
                self._decoded[key] = error
        found = self._decoded[key]
        if isinstance(found, PictureError):
            raise found
        return found


def _read(asset: Path, name: str) -> bytes:
    if is_address(name):
        raise PictureError("is an address; nothing is fetched")
    path = find_texture(asset, name)
    if path is None:
        raise PictureError("is missing")
    try:
        return path.read_bytes()
    except OSError as error:
        raise PictureError(f"cannot be read ({error.strerror})") from error


def is_address(name: str) -> bool:
    """Whether a name is a URL, which is never fetched."""
    return re.match(r"[A-Za-z][\w+.-]+:(?!\\)", name) is not None


def find_file(folder: Path, name: str) -> Path | None:
    """The file `name` in `folder` or below, if need be in other capitals; None if it is not there or leads out."""
    try:
        path = folder / name
        if not path.is_file():
            parts = Path(name).parts
            path = folder
            for part in parts:
                same = [p for p in path.iterdir() if p.name.casefold() == part.casefold()] if path.is_dir() else []
                if part == ".." or len(same) != 1:
                    return None
                path = same[0]
        return path if path.is_file() and path.resolve().is_relative_to(folder.resolve()) else None
    except (OSError, ValueError):  # names that no file can have
        return None


def find_texture(asset: Path, name: str) -> Path | None:
    """The file that `asset` calls `name`, or None.

    Looked for where the name says, beside the asset, in its folder textures and in ../textures, and, for Google
    Scanned Objects, in ../materials/textures; a name never leads out of these folders.
    """
    name, folder = name.replace("\\", "/"), asset.parent
    base = name.rsplit("/", 1)[-1]
    places = [(folder, name), (folder, base), (folder / "textures", base)]
    places += [(folder.parent / inside, base) for inside in ("textures", "materials/textures")]
    return next((path for place in places if (path := find_file(*place))), None)


def decode(data: bytes, most: int) -> np.ndarray:
    """An encoded picture as [h, w, 4] uint8 RGBA of at most `most` pixels per side. Raises PictureError."""
    if data.startswith(_KTX2):
        image = _decode_ktx2(data)
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data))
                if image.format == "EPS":
                    raise PictureError("is PostScript, a program, and is not run")
                if image.format == "JPEG":
                    image.draft("RGB", (most, most))
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height}")
                image.load()
        except Image.DecompressionBombError as error:
            raise PictureError(f"has too many pixels ({error})") from error
        except Image.UnidentifiedImageError as error:
            raise PictureError("is no picture that can be read") from error
        except (MemoryError, PictureError):
            raise
        except Exception as error:  # a decoder raises whatever it trips over
            raise PictureError(f"is broken ({error})") from error
    if image.mode[0] in "IF":  # 16 bits a pixel, or floats
        values = np.asarray(image, np.float32)
        image = Image.fromarray((values * 255 if image.mode == "F" else values / 257).round().clip(0, 255).astype("u1"))
    image = image.convert("RGBA")
    image.thumbnail((most, most))
    return np.asarray(image)


def optional(module: str) -> ModuleType:
    """A decoder that need not be installed. Raises ImportError that says how to get it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"needs the package {module}: pip install {module}") from error


def _decode_ktx2(data: bytes) -> Image.Image:
    """By opengl_basisu, where it is installed."""
    try:
        basisu = optional("opengl_basisu")
        return Image.fromarray(basisu.open(data).transcode(basisu.Target.RGBA8).data)
    except ImportError as error:
        raise PictureError(f"is KTX2, which {error}") from error
    except Exception as error:
        raise PictureError(f"is KTX2 that cannot be decoded ({error})") from error
