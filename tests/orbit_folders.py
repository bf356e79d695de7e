"""Orbits for the tests: what is rendered to them, and a dataset of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ouroboros3d.camera_defaults import DISTANCE, FOV
from ouroboros3d.cameras import Cameras, intrinsics_from_fov, orbit_poses
from ouroboros3d.cli import call, render_orbits
from ouroboros3d.config.schema import Config
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.datagen import procedural
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.rendering import render

QUICK = ("--size", 16, "--orbits", 1, "--samples", 1, "--workers", 1)
SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"  # of an .obj file, without faces


def run(*arguments) -> int:
    """scripts/render_orbits.py: its status."""
    return call(render_orbits.main, [str(a) for a in arguments])


def box_file(folder: Path) -> Path:
    """box.obj and box.mtl: 0.4 x 0.6 x 0.8, red above (+y in the file) and blue below."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "box.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    text, (corners, faces, _) = "mtllib box.mtl\n", procedural.box()
    for half, (name, middle) in enumerate((("red", 0.2), ("blue", -0.2))):
        text += "".join("v {} {} {}\n".format(*row) for row in corners * [0.2, 0.2, 0.3] + [0, middle, 0])
        text += f"usemtl {name}\n" + "".join("f {} {} {}\n".format(*row) for row in faces + 1 + half * len(corners))
    (folder / "box.obj").write_text(text)
    return folder / "box.obj"


def orbit_dataset(
    root: str | Path,
    list_file: str = "train.txt",
    size: int = 512,
    num_views: int = 8,
    frames: int = 16,
    view_selection: str = "release",
    extra_views: int = 0,
    seed: int = 0,
    start_view: int | None = None,
    **data,
) -> OrbitDataset:
    """The defaults with these settings; `data` are keys of the configuration's section of that name. Unchecked."""
    config = Config()
    config.model.image_size, config.model.conventions.view_selection = size, view_selection
    config.cameras.num_views, config.cameras.orbit_frames = num_views, frames
    config.objective.extra_views, config.train.seed = extra_views, seed
    for key, value in {"root": str(root), "workers": 0, **data}.items():
        setattr(config.data, key, value)
    return OrbitDataset(config, list_file, start_view)


TO_Z_UP = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
TO_OPENGL = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
SIZE = 8  # of the pictures of noise


def poses_of(elevation: float, start: float = 0.0) -> Tensor:
    """c2w [16, 4, 4] of an orbit's frames, with OpenCV's axes, in the z-up world of meta.json."""
    return TO_Z_UP @ orbit_poses([start + 22.5 * k for k in range(16)], elevation, DISTANCE)


def write_frames(folder: Path, pictures, poses, **meta) -> None:
    """RGBA pictures [h, w, 4] of OpenGL's poses [4, 4], and meta.json, as scripts/render_orbits.py writes them."""
    folder.mkdir(parents=True)
    locations = []
    for k, (picture, pose) in enumerate(zip(pictures, poses, strict=True)):
        name = f"render_{k:04d}.webp"
        Image.fromarray(picture).save(folder / name, lossless=True)
        locations.append({"transform_matrix": pose.tolist(), "frames": [{"name": name}]})
    (folder / "meta.json").write_text(json.dumps({"camera_angle_x": math.radians(FOV), "locations": locations} | meta))


def write_noise(folder: Path, elevation: float = 20.0) -> None:
    """An orbit of noise whose first pixel tells the frame, as the columns of its depth do."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, SIZE, SIZE, 4), dtype=np.uint8)
    pixels[:, 0, 0, 0] = 10 * np.arange(16)
    pixels[..., 3] = 255
    write_frames(folder, pixels, poses_of(elevation, 33.0) @ TO_OPENGL)
    depth = np.zeros((16, 4, 4), np.float16)
    depth[:, :, 0] = np.arange(16)[:, None] + 1
    np.savez(folder / "depth.npz", depth=depth)


def scene_of(number: int) -> Gaussians:
    """Thirty coloured balls, in the z-up world of meta.json."""
    g = torch.Generator().manual_seed(number)
    return Gaussians(
        means=(torch.rand(1, 30, 3, generator=g) - 0.5) * torch.tensor([0.6, 0.3, 0.8]),
        quats=torch.tensor([1.0, 0, 0, 0]).expand(1, 30, 4),
        scales=torch.full((1, 30, 3), 0.05),
        opacities=torch.full((1, 30), 0.95),
        rgb=torch.rand(1, 30, 3, generator=g) * 0.8,
    )


def write_scene(folder: Path, scene: Gaussians, elevation: float, start: float) -> None:
    """An orbit around a scene, and its points.npz."""
    c2w = poses_of(elevation, start)
    cameras = Cameras(c2w.float()[None], intrinsics_from_fov(torch.full((1, 16), FOV)))
    rendering = render(scene, cameras, 32, background=(0.0, 0.0, 0.0))
    alpha = rendering.alpha[0]
    rgba = torch.cat([rendering.rgb[0] / alpha.clamp(min=1e-4), alpha], 1).clamp(0, 1)
    write_frames(folder, (rgba * 255).round().byte().permute(0, 2, 3, 1).numpy(), c2w @ TO_OPENGL)
    np.savez(folder / "points.npz", points=scene.means[0].numpy())


class Epoch(Dataset):
    """The items of a dataset in one epoch."""

    def __init__(self, data: OrbitDataset, epoch: int) -> None:
        self.data, self.epoch = data, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict:
        return self.data.example(self.epoch, index)


def same(one: dict, two: dict) -> bool:
    """Two items of a dataset."""
    assert one.keys() == two.keys()
    return all(torch.equal(v, two[k]) if isinstance(v, Tensor) else v == two[k] for k, v in one.items())
