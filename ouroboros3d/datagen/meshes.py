"""From a mesh file to a surface: glTF, OBJ, PLY, OFF and STL, read as their specifications say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ouroboros3d.errors import one_line

from .assets import AssetError, Findings, Unsupported
from .gltf import read_gltf
from .obj import read_obj
from .pictures import Pictures
from .polygon_files import read_off, read_ply, read_stl
from .surface import OBJECT_RADIUS, Surface, make_surface

READERS = {
    ".gltf": read_gltf,
    ".glb": read_gltf,
    ".obj": read_obj,
    ".ply": read_ply,
    ".off": read_off,
    ".stl": read_stl,
}
MAX_BYTES = 4_000_000_000
Z_UP = {"y": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), "z": np.eye(3)}  # from files with that up axis


def load_surface(
    path: str | Path,
    up: str = "y",
    max_texture: int = 512,
    radius: float = OBJECT_RADIUS,
    max_faces: int | None = None,
    findings: Findings | None = None,
    stretch: Sequence[float] = (1.0, 1.0, 1.0),
) -> Surface:
    """Load a mesh file and fit it into a sphere.

    up: the file's up axis, "y" (obj and glTF by custom) or "z". max_texture: larger textures are reduced to this many
    pixels per side. findings: takes the warnings and features met. stretch: factors of x, y and z, with z up. Of
    several scenes in a glTF file the default one counts, or the first if none is. A texture that is missing leaves the
    plain colour, and a warning.
    Raises AssetError when the file is missing, unreadable, empty or too large, or needs what is not supported.
    """
    path, findings = Path(path), Findings() if findings is None else findings
    try:
        if not path.is_file():
            raise AssetError("no such file")
        suffix = path.suffix.lower()
        if suffix not in READERS:
            raise Unsupported(suffix[1:] or "this format", "is not read by the light backend; try --backend blender")
        if path.stat().st_size > MAX_BYTES:
            raise AssetError(f"has more than {MAX_BYTES:,} bytes")
        parts = READERS[suffix](path, Pictures(path, max_texture), findings, max_faces)
        turn = np.eye(4)
        turn[:3, :3] = np.diag(stretch) @ Z_UP[up]
        return make_surface([part.moved(turn) for part in parts], radius, max_faces)
    except AssetError as error:
        if isinstance(error, Unsupported):
            findings.met(error.feature, "refused")
        lost = f" ({'; '.join(findings.warnings)})" if str(error) == "no triangles" and findings.warnings else ""
        raise AssetError(f"{path}: {error}{lost}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what a file that breaks its format's rules makes of the readers
        raise AssetError(f"{path}: cannot be read ({type(error).__name__}: {one_line(error)})") from error
