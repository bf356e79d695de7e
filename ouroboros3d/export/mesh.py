"""A coloured triangle mesh of the Gaussians: the surface of their density, decimated, with colours fitted to renders.

What a splat shows by transparency a mesh can only show by where its surface lies, so the density at which it is cut
(`iso`) decides more than anything else: 13 to 25 dB on one object. It is chosen by measurement: candidates are coloured
from a few pictures and compared with the Gaussians at others. The final colours are fitted to a third set of pictures;
check.py measures at a fourth.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import partial

import numpy as np

from ouroboros3d.export.colours import Mesh, Pictures, fit_texture, fit_vertex_colours, render_mesh
from ouroboros3d.export.density import Density, density, surface
from ouroboros3d.export.frames import ExportError
from ouroboros3d.export.views import psnr
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Renderer
from ouroboros3d.rendering import render

RESOLUTION = 192  # voxels along the longest side
ISOS = (0.1, 0.2, 0.3, 0.4, 0.55)  # candidates; then the best one plus and minus FINE
FINE = 0.05
SIZE = 256  # pixels of the pictures
FIT_VIEWS, TRIAL_VIEWS, CHOICE_VIEWS = 40, 10, 4
PACKAGES = {"scipy": "scipy", "skimage": "scikit-image", "fast_simplification": "fast-simplification"}


def build_mesh(gaussians: Gaussians, faces: int = 40_000, texture: int = 0, renderer: Renderer = render) -> Mesh:
    """The mesh of one scene (B = 1, on the CPU) with at most `faces` triangles.

    With `texture` > 0 the colours lie in a texture of that many pixels per side, which is sharper than vertices can be
    on a mesh of few faces. Raises ExportError.
    """
    require(PACKAGES | ({"xatlas": "xatlas"} if texture else {}))
    if faces < 100:
        raise ExportError(f"faces {faces}: a mesh wants at least 100")
    field = density(gaussians, RESOLUTION)
    vertices, triangles = decimate(*surface(field, choose_iso(gaussians, field, faces, renderer)), faces)
    pictures = Pictures.around(gaussians, renderer, FIT_VIEWS, SIZE, offset=0.0)
    if not texture:
        return Mesh(vertices, triangles, fit_vertex_colours(vertices, triangles, pictures))
    vertices, triangles, uv = unwrap(vertices, triangles)
    return Mesh(vertices, triangles, uv=uv, texture=fit_texture(vertices, triangles, uv, texture, pictures))


def choose_iso(gaussians: Gaussians, field: Density, faces: int, renderer: Renderer = render) -> float:
    """The density whose surface looks most like the Gaussians. Raises ExportError if there is no surface at all."""
    trial = Pictures.around(gaussians, renderer, TRIAL_VIEWS, SIZE, offset=20.0)
    choice = Pictures.around(gaussians, renderer, CHOICE_VIEWS, SIZE, offset=100.0)
    score = partial(_score, field, faces, trial, choice)
    scores = {iso: score(iso) for iso in ISOS if field.values.max() > iso}
    if not scores:
        raise ExportError("the Gaussians are too faint for a mesh: nowhere is their density above 0.1")
    best = max(scores, key=scores.__getitem__)
    scores |= {iso: score(iso) for iso in (best - FINE, best + FINE) if field.values.max() > iso}
    return max(scores, key=scores.__getitem__)


def _score(field: Density, faces: int, trial: Pictures, choice: Pictures, iso: float) -> float:
    """dB of the mesh at this iso."""
    vertices, triangles = decimate(*surface(field, iso), faces)
    mesh = Mesh(vertices, triangles, fit_vertex_colours(vertices, triangles, trial))
    return psnr(render_mesh(mesh, choice.cameras, SIZE, supersampling=2), choice.images)


def decimate(vertices: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mesh with at most `count` faces, by quadric edge collapses (fast_simplification)."""
    if len(faces) <= count:
        return vertices, faces
    import fast_simplification

    points, triangles = vertices.astype(np.float32), faces.astype(np.int32)
    points, triangles = fast_simplification.simplify(points, triangles, target_count=count)
    return points.astype(np.float64), triangles.astype(np.int64)


def unwrap(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(vertices, faces, uv): the mesh cut into charts, vertices on a cut repeated (xatlas)."""
    import xatlas

    source, triangles, uv = xatlas.parametrize(vertices.astype(np.float32), faces.astype(np.uint32))
    return vertices[source], triangles.astype(np.int64), uv.astype(np.float64)


def require(packages: dict[str, str]) -> None:
    """Raises ExportError, with the command that installs them, if one of the modules is missing."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ExportError(f"a mesh needs {', '.join(missing)}: pip install {' '.join(missing)}")
