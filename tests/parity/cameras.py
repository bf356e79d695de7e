"""Cameras, rays, the dataset and the coordinates map."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from ouroboros3d import geometry
from ouroboros3d.cameras import Cameras, frame_indices, opengl_to_opencv, relative_to_first
from ouroboros3d.config.schema import CamerasConfig, Config, DataConfig
from ouroboros3d.data.orbit_files import DataError, read_ids, read_meta
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.feedback import coordinates_map
from ouroboros3d.models.lgm import LGM
from tests.parity.fixtures import FAR, NEAR, Arrays, Case, FixtureError, Fixtures, close, projection_matrix


def check_cameras(f: Fixtures) -> Iterator[Case]:
    """Dataset item, renderer cameras, rays of both networks, position maps (quirks 3, 7, 8, 9, 16)."""
    a = f.arrays("cameras")
    yield from _check_dataset(f, a)

    cameras = Cameras(a["inputs.c2w_f32"], a["inputs.intrinsics"])
    size = f.config.model.lgm.input_size
    for view in a.numbers(r"get_rays\.view(\d+)\."):
        origins, directions = geometry.camera_rays(cameras.views([view]), size)
        for name, value in (("origins", origins), ("directions", directions)):
            name = f"get_rays.view{view}.{name}"
            yield close(name, value[0, 0], a[name], 1e-6)
    if "get_rays.lgm_plucker" in a:
        rays = LGM(f.config.model.lgm).encode_cameras(cameras)  # has no weights
        yield close("get_rays.lgm_plucker", rays[0], a["get_rays.lgm_plucker"], 1e-6)

    octaves = f.config.model.multiview.ray_octaves
    for size in a.numbers(r"mv_rays\.(\d+)\."):
        origins, directions = geometry.release_rays(cameras, size)
        values = {
            "origins": origins,
            "directions": directions,
            "plucker": geometry.plucker(origins, directions),
            # Of the recorded rays: the highest octave multiplies their rounding by 2^(octaves - 1).
            "plucker_harmonic": geometry.harmonic_embedding(a[f"mv_rays.{size}.plucker"], octaves),
        }
        for name, value in values.items():
            yield close(f"mv_rays.{size}.{name}", value, a[f"mv_rays.{size}.{name}"], 1e-6)
    embedded = geometry.harmonic_embedding(a["harmonic.input"], octaves)
    yield close("harmonic.output", embedded, a["harmonic.output"], 1e-6)
    for size in a.numbers(r"position_map\.(\d+)\."):
        position = coordinates_map(a[f"position_map.{size}.depth"], cameras)
        yield close(f"position_map.{size}", position, a[f"position_map.{size}.output"], 1e-6)


def _check_dataset(f: Fixtures, a: Arrays) -> Iterator[Case]:
    views, size = len(a["dataset.c2w"]), a["dataset.condition_image"].shape[-1]
    orbit = f.folder / "orbit"
    try:
        scene = read_ids(orbit / "ids.txt")[0]
    except DataError as error:
        raise FixtureError(str(error)) from error
    total = len(f.scalars(f"orbit/{scene}/meta")["locations"])
    config = Config(data=DataConfig(root=str(orbit)), cameras=CamerasConfig(num_views=views, orbit_frames=total))
    config.model.image_size = size
    starts = {f"dataset_start{n}": n for n in a.numbers(r"dataset_start(\d+)\.")}
    for tag, start in ({"dataset": 0} | starts).items():
        dataset = OrbitDataset(config, "ids.txt", start_view=start)
        item = dataset[0]
        meta = read_meta(orbit / scene / "meta.json", total)
        exact = relative_to_first(opengl_to_opencv(meta.c2w[item["frames"]]))
        yield close(f"{tag}.c2w (float64)", exact, a[f"{tag}.c2w"], 1e-9)
        yield close(f"{tag}.c2w (item)", item["c2w"], a[f"{tag}.c2w"], 1e-6)
        if tag == "dataset":
            indices = frame_indices(total, views)
            yield close("dataset.select_indices", torch.tensor(indices), a["dataset.select_indices"], 0)
            yield close("dataset.frames", item["frames"], a["dataset.select_indices"], 0)
            yield close("dataset.intrinsics", item["K"], a["dataset.intrinsics"], 1e-6)
            # Another Pillow may round the resize differently by one 8-bit level.
            for name, value in (("diffusion_images", item["images"]), ("condition_image", item["images"][0])):
                if f"dataset.{name}" in a:
                    yield close(f"dataset.{name}", value, a[f"dataset.{name}"], 2 / 255 + 1e-6)
            cameras = Cameras(a["dataset.c2w"][None], item["K"].double()[None])
            yield from _check_camera_fields(cameras, a.under("dataset.cameras"), a["dataset.fov"])
        else:
            loaded = a[f"{tag}.loaded_renders"]
            numbers = [int(re.search(r"(\d+)", meta.names[i])[1]) for i in item["frames"]]
            yield close(f"{tag}.loaded_renders", torch.tensor(numbers), loaded, 0)


def _check_camera_fields(cameras: Cameras, fields: dict[str, Tensor], fov: Tensor) -> Iterator[Case]:
    """The renderer cameras' fields, derived from ours: everything is in c2w and K."""
    w2c, K = cameras.w2c[0], cameras.K[0]
    width, height = fields["width"], fields["height"]
    view = w2c.transpose(-1, -2)
    projection = projection_matrix(K, NEAR, FAR)
    half_fov_y = torch.atan(0.5 / K[:, 1, 1])
    derived = {
        "R": cameras.c2w[0, :, :3, :3],
        "T": w2c[:, :3, 3],
        "fx": K[:, 0, 0] * width,
        "fy": K[:, 1, 1] * height,
        "fov_x": torch.deg2rad(cameras.fov[0]),
        "fov_y": 2 * half_fov_y,
        "cx": K[:, 0, 2] * width,
        "cy": K[:, 1, 2] * height,
        "world_to_camera": view,
        "projection": projection,
        "full_projection": view @ projection,
        "camera_center": cameras.centers[0],
    }
    for name, value in derived.items():
        unit = max(1.0, fields[name].abs().max().item())  # fields in pixels are as exact as float32 is there
        yield close(f"dataset.cameras.{name}", value, fields[name], 1e-6 * unit)
    yield close("dataset.fov (degrees)", cameras.fov[0], fov, 1e-6 * fov.abs().max().item())
