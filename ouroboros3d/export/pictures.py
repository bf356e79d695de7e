"""Pictures: the views as a .png and the turntable as an .mp4."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from tqdm.auto import tqdm

from ouroboros3d.export.object3d import Object3D
from ouroboros3d.visualize import save_image, save_video, turntable, view_grid


def write_png(object3d: Object3D, path: Path, columns: int = 4) -> None:
    """The generated views, row by row; of an object without views, its renders."""
    pictures = object3d.views if object3d.views is not None else object3d.renders
    if pictures is None:
        raise ValueError(f"{path}: the object has neither views nor renders to show")
    save_image(path, view_grid(pictures, columns))


def write_mp4(object3d: Object3D, path: Path, progress: bool = False) -> None:
    """One turn around the object, which stands upright."""
    c = object3d.turntable
    tilt = object3d.elevation
    frames = turntable(object3d.gaussians, object3d.renderer, c.size, c.step, c.radius, c.fov, tilt=tilt)
    total = math.ceil(360 / c.step)
    options = {"total": total, "unit": "frame", "leave": False, "file": sys.stderr, "disable": not progress}
    save_video(path, tqdm(frames, desc="turntable", **options), c.fps)
