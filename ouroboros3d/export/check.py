"""Checks that files show the object: reopens every format with another reader and compares, in dB.

Splats and meshes are rendered from cameras that no fit has used; videos are compared with the frames they were made of.
The PSNR is over pictures in [0, 1] on white.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from ouroboros3d.cameras import Cameras, opengl_to_opencv, turn_about_x
from ouroboros3d.errors import UserError
from ouroboros3d.export.frames import ExportError, turn_degrees, visible
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.export.pictures import posed_pictures
from ouroboros3d.export.views import psnr, surround
from ouroboros3d.gaussians import Gaussians, load_ply
from ouroboros3d.visualize import to_uint8, turntable

SIZE, VIEWS, OFFSET = 256, 8, 50.0  # pixels, cameras, and their turn: none is a camera of mesh.py


class CheckError(UserError, RuntimeError):
    """A file does not show its object, or cannot be read."""


class Proof(NamedTuple):
    """How the files of one format are checked."""

    reader: str  # what reopens them
    bound: float  # dB; less is an error
    measure: Callable[..., float]


def check(object3d: Object3D, path: Path, ending: str, **options) -> float:
    """dB between the object and the file that was written with these options. Raises CheckError below the bound."""
    proof = PROOFS[ending]
    value = proof.measure(object3d, Path(path), ending, **options)
    if not value >= proof.bound:
        raise CheckError(f"{path}: {value:.1f} dB from its object, the bound of this format is {proof.bound:g} dB")
    return value


# ---------------------------------------------------------------- splats and meshes


def splats_psnr(object3d: Object3D, path: Path, ending: str, up: str | None = None, raw: bool = False, **_) -> float:
    """GaussForge decodes the file to a plain .ply, which plyfile reads."""
    gaussforge = _module("gaussforge")
    result = gaussforge.GaussForge().convert(path.read_bytes(), ending.removeprefix("."), "ply")
    if "data" not in result:
        raise CheckError(f"{path}: GaussForge cannot read it: {result.get('error')}")
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain.ply"
        plain.write_bytes(bytes(result["data"]))
        gaussians = load_ply(plain)
    turn = 0.0 if raw else turn_degrees(up or ("y" if ending == ".spz" else "-y"), object3d.elevation)
    back = gaussians.turned(-turn) if turn else gaussians
    cameras = surround(visible(object3d.gaussians), VIEWS, OFFSET)
    pictures = [_render(object3d, g, cameras) for g in (back, object3d.gaussians)]
    return psnr(*pictures)


def mesh_psnr(object3d: Object3D, path: Path, ending: str, up: str = "y", **_) -> float:
    """trimesh reads the mesh, which is drawn unlit."""
    from ouroboros3d.export.colours import render_mesh

    mesh = _load_glb(path, turn_degrees(up, object3d.elevation))
    cameras = surround(visible(object3d.gaussians), VIEWS, OFFSET)
    return psnr(render_mesh(mesh, cameras, SIZE), _render(object3d, object3d.gaussians, cameras))


def _render(object3d: Object3D, gaussians: Gaussians, cameras: Cameras) -> Tensor:
    device = object3d.gaussians.means.device
    with torch.no_grad():
        return object3d.renderer(gaussians.to(device), cameras.to(device), SIZE).rgb[0].clamp(0, 1).cpu()


def _load_glb(path: Path, turn: float):
    """The mesh in the canonical frame."""
    from ouroboros3d.export.colours import Mesh, to_srgb

    scene = _module("trimesh").load(path, process=False)
    (loaded,) = scene.geometry.values()
    vertices, faces = torch.from_numpy(np.array(loaded.vertices)), np.array(loaded.faces)
    vertices = (vertices @ turn_about_x(turn, vertices)[:3, :3]).numpy()  # back, by the transpose
    texture = getattr(loaded.visual.material, "baseColorTexture", None) if loaded.visual.kind == "texture" else None
    if texture is not None:
        uv = np.array(loaded.visual.uv) * [1, -1] + [0, 1]  # trimesh counts from the lower edge
        return Mesh(vertices, faces, uv=uv, texture=np.asarray(texture.convert("RGB"), dtype=np.float64) / 255)
    stored = np.array(loaded.visual.vertex_attributes["color"])[:, :3]
    linear = stored / (np.iinfo(stored.dtype).max if stored.dtype.kind == "u" else 1.0)
    return Mesh(vertices, faces, to_srgb(linear))


# ---------------------------------------------------------------- pictures


def video_psnr(
    object3d: Object3D, path: Path, ending: str, size: int | None = None, frames: int | None = None, **_
) -> float:
    """ffmpeg's own decoder reads the .mp4 (x264 wrote it), Pillow the .webp and .gif (ffmpeg wrote them)."""
    c = object3d.turntable
    size, step = size or c.size, c.step if frames is None else 360 / frames
    made = turntable(object3d.gaussians, object3d.renderer, size, step, c.radius, c.fov, tilt=object3d.elevation)
    found = _decoded(path) if ending == ".mp4" else _animation(path)
    errors = []
    for one, other in zip(made, found, strict=True):
        difference = one.astype(np.float64) - other[: one.shape[0], : one.shape[1]]
        errors.append(np.square(difference / 255).mean())
    return -10 * math.log10(max(float(np.mean(errors)), 1e-12))


def _decoded(path: Path) -> Iterator[np.ndarray]:
    """Frames of a video, or the one of a picture, uint8 [H, W, 3]."""
    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    for frame in reader:
        yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)


def _animation(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            yield np.asarray(frame.convert("RGB"))


def png_psnr(object3d: Object3D, path: Path, ending: str, size: int | None = None, columns: int = 4, **_) -> float:
    """ffmpeg reads the .png (Pillow wrote it)."""
    pictures = to_uint8(posed_pictures(object3d, size)[1])
    found = _read_png(path)
    height, width = pictures.shape[1:3]
    columns = min(columns, len(pictures))
    places = [(i // columns * height, i % columns * width) for i in range(len(pictures))]
    cut = np.stack([found[top : top + height, left : left + width] for top, left in places])
    return _pixel_psnr(cut, pictures)


def transforms_psnr(object3d: Object3D, path: Path, ending: str, up: str = "z", size: int | None = None, **_) -> float:
    """The Gaussians rendered from the file's cameras, by the formulas of NeRF, against those of the object; and the
    pictures, read by ffmpeg, against the object's. The worse of the two."""
    document = json.loads((path / "transforms.json").read_text())
    cameras, pictures = posed_pictures(object3d, size)
    poses = torch.tensor([frame["transform_matrix"] for frame in document["frames"]], dtype=torch.float64)
    back = turn_about_x(-turn_degrees(up, object3d.elevation), poses)
    focal = 0.5 / math.tan(document["camera_angle_x"] / 2)
    K = torch.tensor([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]]).expand(1, len(poses), 3, 3)
    read = Cameras((back @ opengl_to_opencv(poses)).float()[None], K)
    seen = [_render(object3d, object3d.gaussians, c) for c in (read, cameras)]
    stored = np.stack([_read_png(path / frame["file_path"]) for frame in document["frames"]])
    return min(psnr(*seen), _pixel_psnr(stored, to_uint8(pictures)))


def _read_png(path: Path) -> np.ndarray:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True)
    size = re.search(rb"Video: png.*?, (\d+)x(\d+)", done.stderr)
    if done.returncode or size is None:
        raise CheckError(f"{path}: ffmpeg cannot read it")
    return np.frombuffer(done.stdout, np.uint8).reshape(int(size[2]), int(size[1]), 3)


def _pixel_psnr(a: np.ndarray, b: np.ndarray) -> float:
    return psnr(torch.from_numpy(a / 255.0), torch.from_numpy(b / 255.0))


def _module(name: str):
    if importlib.util.find_spec(name) is None:
        raise ExportError(f"the check needs {name}: pip install {name}")
    return importlib.import_module(name)


PROOFS = {
    ".ply": Proof("GaussForge", 80, splats_psnr),
    ".compressed.ply": Proof("GaussForge", 50, splats_psnr),
    ".splat": Proof("GaussForge", 50, splats_psnr),
    ".spz": Proof("GaussForge (Niantic's library)", 50, splats_psnr),
    ".glb": Proof("trimesh", 22, mesh_psnr),
    ".mp4": Proof("ffmpeg's h264 decoder", 30, video_psnr),
    ".webp": Proof("Pillow", 30, video_psnr),
    ".gif": Proof("Pillow", 28, video_psnr),
    ".png": Proof("ffmpeg's PNG decoder", 100, png_psnr),
    "_transforms": Proof("NeRF's formulas, ffmpeg's PNG decoder", 80, transforms_psnr),
}
