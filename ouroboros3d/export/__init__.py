"""Files for viewers and other tools: one writer per format, chosen by the file's ending.

    save(object3d, "chair.glb", **options)

`WRITERS` names every format. Each writer is a function `write(object3d, path, **options)` in a module that is imported
when it is needed; it raises OutputError if the file cannot be written and leaves no half of one.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ouroboros3d.errors import UserError

if TYPE_CHECKING:
    from ouroboros3d.export.object3d import Object3D

__all__ = ["FORMATS", "WRITERS", "FormatError", "check_formats", "ending_of", "options_of", "save", "writer"]

# The file's ending -> module of this package and its function.
WRITERS: dict[str, str] = {
    ".ply": "splats:write_ply",
    ".compressed.ply": "splats:write_compressed_ply",
    ".splat": "splats:write_splat",
    ".spz": "splats:write_spz",
    ".glb": "glb:write_glb",
    ".mp4": "pictures:write_turntable",
    ".webp": "pictures:write_turntable",
    ".gif": "pictures:write_turntable",
    ".png": "pictures:write_png",
    ".html": "player:write_html",
    "_transforms": "pictures:write_transforms",  # a folder
}
FORMATS = {ending.lstrip("._"): ending for ending in WRITERS}  # as --formats names them


class FormatError(UserError, ValueError):
    """A file format that is not known; the message names those that are."""


def save(object3d: Object3D, path: str | Path, **options: Any) -> Path:
    """Writes the object in the format of the path's ending and returns the path; `options` are the writer's own.

    Raises FormatError, OutputError.
    """
    path = Path(path)
    writer(ending_of(path))(object3d, path, **options)
    return path


def writer(ending: str) -> Callable[..., None]:
    """The function behind a key of WRITERS."""
    module, _, function = WRITERS[ending].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)


def options_of(ending: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the writer of this ending takes and that are not None."""
    known = inspect.signature(writer(ending)).parameters
    return {name: value for name, value in options.items() if name in known and value is not None}


def check_formats(names: Iterable[str]) -> list[str]:
    """The names without repetition. Raises FormatError for one that no writer has."""
    names = list(dict.fromkeys(name.lower().lstrip("._") for name in names))
    for name in names:
        if name not in FORMATS:
            raise FormatError(f"{name}: not a known format; choose from {', '.join(FORMATS)}")
    return names


def ending_of(path: Path) -> str:
    """The key of WRITERS that the path ends in. Raises FormatError."""
    for ending in sorted(WRITERS, key=len, reverse=True):
        if path.name.lower().endswith(ending) and path.name.lower() != ending:
            return ending
    raise FormatError(f"{path}: no known format; the name must end in {', '.join(WRITERS)}")
