"""Pictures: the views as a .png, a turntable as .mp4, .webp or .gif, and posed pictures for other 3D methods."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ouroboros3d.cameras import Cameras, opengl_to_opencv, orbit, turn_about_x
from ouroboros3d.export.frames import ExportError, turn_degrees
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.files import staged, write_lines
from ouroboros3d.visualize import save_image, save_video, turntable, view_grid

VIEWS = 8  # of an object that has none of its own: rendered level with it, on the training orbit
MAX_FRAMES, MAX_SIZE = 3600, 4096


def write_png(object3d: Object3D, path: Path, columns: int = 4, size: int | None = None) -> None:
    """The generated views, row by row; of an object without views, its renders or new ones of `size` pixels."""
    save_image(path, view_grid(posed_pictures(object3d, size)[1], columns))


def write_turntable(
    object3d: Object3D,
    path: Path,
    size: int | None = None,
    frames: int | None = None,
    fps: int | None = None,
    progress: bool = False,
) -> None:
    """One turn around the object, which stands upright, as .mp4, .webp or .gif; defaults from `object3d.turntable`.

    size: pixels per side; frames: of the whole turn; fps: frames per second. Raises ExportError out of range.
    """
    c = object3d.turntable
    count = math.ceil(360 / c.step) if frames is None else frames
    size, fps = size or c.size, fps or c.fps
    if not 1 <= count <= MAX_FRAMES or not 2 <= size <= MAX_SIZE or not 1 <= fps <= 60:
        raise ExportError(
            f"a turntable of {count} frames of {size} pixels, {fps} per second: frames lie in 1 .. {MAX_FRAMES}, "
            f"size in 2 .. {MAX_SIZE}, fps in 1 .. 60"
        )
    step = c.step if frames is None else 360 / count
    pictures = turntable(object3d.gaussians, object3d.renderer, size, step, c.radius, c.fov, tilt=object3d.elevation)
    bar = {"total": count, "unit": "frame", "leave": False, "file": sys.stderr, "disable": not progress}
    save_video(path, tqdm(pictures, desc="turntable", **bar), fps)


def write_transforms(object3d: Object3D, path: Path, up: str = "z", size: int | None = None) -> None:
    """A folder with the views as PNGs and their cameras as NeRF's transforms.json.

    `transform_matrix` is camera-to-world with Blender's camera axes (x right, y up, looking along -z), in a world in
    which the object stands upright, by NeRF's convention with z up.
    """
    cameras, pictures = posed_pictures(object3d, size)
    poses = cameras.c2w[0].double().cpu()
    poses = opengl_to_opencv(turn_about_x(turn_degrees(up, object3d.elevation), poses) @ poses)  # its own inverse
    pixels, (height, width) = pictures.shape[-1], pictures.shape[-2:]
    fx, fy, cx, cy = (float(cameras.K[0, 0, i, j]) * pixels for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    frames = [{"file_path": f"images/{i:03d}.png", "transform_matrix": pose.tolist()} for i, pose in enumerate(poses)]
    document = {
        "camera_model": "OPENCV",
        "camera_angle_x": math.radians(float(cameras.fov[0, 0])),
        **{"w": width, "h": height, "fl_x": fx, "fl_y": fy, "cx": cx, "cy": cy},
        "frames": frames,
    }
    path = Path(path)
    with staged(path.parent) as stage:
        folder = stage / path.name
        (folder / "images").mkdir(parents=True)
        for frame, picture in zip(frames, pictures, strict=True):
            save_image(folder / frame["file_path"], picture)
        write_lines(folder / "transforms.json", [json.dumps(document, indent=1)])


def posed_pictures(object3d: Object3D, size: int | None = None) -> tuple[Cameras, Tensor]:
    """Cameras [1, V] and what they see, [V, 3, H, W] in [0, 1]: the object's views, else its renders, else new ones of
    `size` pixels (default: the turntable's)."""
    pictures = object3d.views if object3d.views is not None else object3d.renders
    if pictures is not None and object3d.cameras is not None and size is None:
        return object3d.cameras, pictures
    cameras = object3d.cameras
    if cameras is None:
        azimuths = [360 * i / VIEWS for i in range(VIEWS)]
        cameras = orbit(azimuths, object3d.elevation).to(object3d.gaussians.means.device)
    with torch.no_grad():
        rendered = object3d.renderer(object3d.gaussians, cameras, size or object3d.turntable.size).rgb[0]
    return cameras, rendered.clamp(0, 1).cpu()
