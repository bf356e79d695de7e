"""Faithfulness: every number recorded from the release, against this implementation.

A folder of fixtures holds tiny random weights and what the release computes with them; its README describes
each array. Whatever may differ between such folders (dimensions, steps, views, draws) is read from its files.
`SUITES` has one function per fixture file, which yields `Case`s; `scripts/check_parity.py` prints them and
`tests/test_parity.py` asserts them. "Quirk n" is the README's numbering, as in docs/faithfulness.md.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ouroboros3d import diffusion, geometry
from ouroboros3d.build import Models
from ouroboros3d.cameras import Cameras, frame_indices, intrinsics_from_fov, opengl_to_opencv, relative_to_first
from ouroboros3d.config.loading import config_from_dict
from ouroboros3d.config.schema import MAPS, CamerasConfig, Config, DataConfig
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.data.orbit_files import DataError, read_ids, read_meta
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.errors import UserError
from ouroboros3d.feedback import Feedback, coordinates_map, feedback_maps
from ouroboros3d.gaussians import Gaussians, load_ply, save_ply
from ouroboros3d.interfaces import Rendering
from ouroboros3d.models.lgm import LGM
from ouroboros3d.models.multiview_unet import MultiViewUNet
from ouroboros3d.models.svd import SVDParts, make_image_encoder, make_vae
from ouroboros3d.models.weights import CheckpointError, fit_state, from_release_names, to_release_names
from ouroboros3d.objective import Draws, Objective
from ouroboros3d.rendering import RULES, render
from ouroboros3d.rendering.dense import project, tile_boxes
from ouroboros3d.sampler import Noise, Sampler
from ouroboros3d.visualize import turntable_cameras

NEAR, FAR = 0.01, 100.0  # planes of the renderer's projection matrix (quirk 9); its kernel ignores them
KERNEL_NEAR = 0.2
LGM_KEYS = (
    *("input_size", "splat_size", "down_channels", "down_attention", "mid_attention"),
    *("up_channels", "up_attention"),
)


class FixtureError(UserError, ValueError):
    """The folder is not one of fixtures; the message is one line."""


@dataclass(frozen=True)
class Case:
    """One comparison. `error` is the largest absolute one unless the name says otherwise."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Arrays(dict):
    """Named arrays of one file, float16 as float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FixtureError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
        super().__init__({k: v.float() if v.dtype == torch.float16 else v for k, v in arrays.items()})

    def __missing__(self, name: str) -> Tensor:
        raise FixtureError(f"{self.path}: has no array {name}")

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The arrays below `prefix.`, by the rest of their names."""
        return {k.removeprefix(f"{prefix}."): v for k, v in self.items() if k.startswith(f"{prefix}.")}

    def numbers(self, pattern: str) -> list[int]:
        """The distinct numbers matched by the group of a regex over the names, e.g. the sizes of a case."""
        return sorted({int(m[1]) for k in self if (m := re.match(pattern, k))})


class Fixtures:
    """A folder of fixtures, its files and the networks they are for, loaded as they are needed."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FixtureError(f"{folder}: no such folder of fixtures")
        self.spec = self.scalars("config")
        try:
            self.config = config_of(self.spec)
        except (KeyError, TypeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else error
            raise FixtureError(f"{self.folder / 'config.json'}: {what}") from error

    @functools.lru_cache(maxsize=4)  # noqa: B019 - as long as the process, like the object itself
    def arrays(self, name: str) -> Arrays:
        return Arrays(self.folder / f"{name}.safetensors")

    def scalars(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise FixtureError(f"{path}: cannot be read ({reason})") from error

    @functools.cached_property
    def models(self) -> Models:
        config = self.config.model
        unet = MultiViewUNet(config)
        # The release fixes these two widths in its code, so that config.json has no entry for them.
        time_embed_dim, time_channels = self.arrays("weights_recon_model")["unet.time_embed.0.weight"].shape
        widths = {"time_embed_dim": time_embed_dim, "time_channels": time_channels}
        lgm = LGM(replace(config.lgm, **widths), config.conventions.rotation)
        processor = self.spec["image_processor"]
        svd = SVDParts(
            make_vae(config.vae),
            make_image_encoder(config.image_encoder),
            config.conventions.decode_chunk,
            processor["image_mean"],
            processor["image_std"],
        )
        parts = {"mv_model_unet": unet, "recon_model": lgm, "vae": svd.vae, "image_encoder": svd.image_encoder}
        for name, module in parts.items():
            weights = self.arrays(f"weights_{name}")
            if module is unet:
                weights = from_release_names(weights, config.multiview.adapter.res_blocks)
            try:
                fit_state(module, weights, self.folder / f"weights_{name}", may_miss="position_ids")
            except CheckpointError as error:
                raise FixtureError(str(error)) from error
        return Models(unet, lgm, svd).eval()

    @property
    def kept(self) -> list[int]:
        """The views whose image-space arrays are stored."""
        return self.spec["kept_views"]

    def render(self, gaussians: Gaussians, cameras: Cameras, size: int) -> Rendering:
        return render(gaussians, cameras, size, rules="release")


def config_of(spec: dict[str, Any]) -> Config:
    """config.json in our terms. Raises ValueError for what this implementation has no setting for."""
    unet, vae, encoder, adapter = spec["unet"], spec["vae"], spec["image_encoder"], spec["adapter"]
    lgm, scheduler = spec["lgm"], spec["scheduler"]
    *micro_conditions, noise_augmentation = spec["added_time_ids"]
    config = config_from_dict(
        {
            "model": {
                "image_size": spec["image_size"],
                "multiview": {
                    "unet": unet,
                    "adapter": {"res_blocks": adapter["nums_rb"]},
                    "feedback": list(MAPS[: spec["num_adapters"]]),
                    "ray_octaves": (spec["plucker_input_dim"] // 6 - 1) // 2,
                    "micro_conditions": micro_conditions,
                },
                "vae": _without(vae, "down_block_types", "in_channels", "out_channels"),
                "image_encoder": _without(encoder, "num_channels"),
                "lgm": {key: lgm[key] for key in LGM_KEYS} | {"num_input_views": spec["lgm_num_frames"]},
            },
            "sampler": {
                "steps": spec["num_inference_steps"],
                "guidance": spec["guidance"],
                "feedback": list(MAPS[: spec["num_adapters"]]),
                "noise_augmentation": noise_augmentation,
                "scheduler": {key: scheduler[key] for key in ("sigma_min", "sigma_max")},
            },
            "cameras": {"num_views": spec["num_frames"], "orbit_frames": max(16, spec["num_frames"])},
            "objective": {"lpips_weight": 0.0},  # LPIPS is replaced by 0 in the recorded runs
        }
    )
    widths = unet["block_out_channels"]
    ours = diffusion.euler_schedule(config.sampler.scheduler, 1).config
    derived = {
        "adapter.channels": (adapter["channels"], widths),
        "adapter.cin": (adapter["cin"], 3 * config.model.vae.downscale**2),
        "plucker_input_dim": (spec["plucker_input_dim"], 6 * (2 * config.model.multiview.ray_octaves + 1)),
        "plucker_widths.down": (spec["plucker_widths"]["down"], [widths[0], *widths[:-1]]),
        "plucker_widths.mid": (spec["plucker_widths"]["mid"], widths[-1]),
        "plucker_widths.up": (spec["plucker_widths"]["up"], [widths[-1], *reversed(widths[1:])]),
        "vae.in_channels": (vae["in_channels"], 3),
        "image_encoder.num_channels": (encoder["num_channels"], 3),
    } | {f"scheduler.{key}": (value, ours[key]) for key, value in scheduler.items() if key in ours}
    for key, (value, want) in derived.items():
        if value != want:
            raise ValueError(f"{key} = {value}: this implementation has {want}")
    return config


def _without(values: dict, *keys: str) -> dict:
    return {k: v for k, v in values.items() if k not in keys}


# ---------------------------------------------------------------- comparisons


def close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> Case:
    """Largest absolute difference."""
    return Case(name, _difference(actual, expected).max().item() if expected.numel() else 0.0, tolerance)


def pictures(name: str, actual: Tensor, expected: Tensor, most: float = 1e-4, every: float = 5e-3) -> Iterator[Case]:
    """[..., C, H, W]: tolerance `most` for 99.9 % of the pixels, `every` for all: next to 1/255 a
    contribution may flip."""
    per_pixel = _difference(actual, expected)
    if per_pixel.ndim >= 3:
        per_pixel = per_pixel.amax(-3)
    quantile = per_pixel.flatten().kthvalue(math.ceil(0.999 * per_pixel.numel())).values.item()
    yield Case(f"{name} (99.9 %)", quantile, most)
    yield Case(f"{name} (all)", per_pixel.max().item(), every)


def relative(name: str, actual: Tensor | float, expected: float, tolerance: float) -> Case:
    error = abs(float(torch.as_tensor(actual).detach()) - expected)
    return Case(f"{name} (relative)", error / max(abs(expected), 1e-12), tolerance)


def _difference(actual: Tensor, expected: Tensor) -> Tensor:
    if actual.shape != expected.shape:  # a wrong shape is a wrong result
        return torch.full((1,), math.inf)
    return (actual.detach().double() - expected.double()).abs().nan_to_num(math.inf, math.inf)


def recorded_cameras(arrays: dict[str, Tensor]) -> Cameras:
    """[1, V] cameras from the fields of the release's renderer cameras."""
    c2w = torch.linalg.inv(arrays["world_to_camera"].double().transpose(-1, -2))
    K = intrinsics_from_fov(torch.rad2deg(arrays["fov_x"].double()))
    K[..., 1, 1] = 0.5 / torch.tan(arrays["fov_y"] / 2)
    return Cameras(c2w.float()[None], K[None])


def projection_matrix(K: Tensor, near: float, far: float) -> Tensor:
    """[..., 4, 4] the renderer's projection of centred intrinsics, transposed for row vectors."""
    out = K.new_zeros(*K.shape[:-2], 4, 4)
    out[..., 0, 0], out[..., 1, 1] = 2 * K[..., 0, 0], 2 * K[..., 1, 1]
    out[..., 2, 2], out[..., 3, 2] = far / (far - near), -far * near / (far - near)
    out[..., 2, 3] = 1
    return out


# ---------------------------------------------------------------- cameras.safetensors


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


# ---------------------------------------------------------------- mv_unet.safetensors


def check_mv_unet(f: Fixtures) -> Iterator[Case]:
    """`MVModel.forward` and a feedback adapter alone (quirks 2 to 6)."""
    a, info, unet = f.arrays("mv_unet"), f.scalars("mv_unet"), f.models.unet
    for tag in (k.removesuffix(".output") for k in a if k.endswith(".output")):
        sample = a[f"{tag}.sample"]
        cameras = Cameras(a[f"{tag}.extrinsics"], a[f"{tag}.intrinsics"])
        maps = None
        if info[tag]["uses_cond"]:
            maps = {name: a[f"{tag}.cond_{name}_u8"].float() / 255 for name in unet.config.feedback}
        with torch.no_grad():
            output = unet(
                sample,
                a[f"{tag}.timestep"],
                a[f"{tag}.encoder_hidden_states"],
                a[f"{tag}.added_time_ids"],
                unet.encode_cameras(cameras, sample.shape[-1]),
                unet.encode_feedback(maps),
            )
        yield close(tag, output, a[f"{tag}.output"], 1e-4)
    for index in a.numbers(r"adapter(\d+)\."):
        with torch.no_grad():
            features = unet.cond_encoder[index](a[f"adapter{index}.cond"].flatten(0, 1))
        for level, feature in enumerate(features):
            name = f"adapter{index}.feature{level}"
            yield close(name, feature, a[name], 1e-4)


# ---------------------------------------------------------------- lgm.safetensors


def check_lgm(f: Fixtures) -> Iterator[Case]:
    """`LGM.forward_gaussians` at several noise levels and batches; then rendered (quirks 16 to 18)."""
    a, info, lgm = f.arrays("lgm"), f.scalars("lgm"), f.models.lgm
    for tag in (k.removesuffix(".gaussians") for k in a if k.endswith(".gaussians")):
        images, c2w, K = (a.get(f"{tag}.{name}", a[name]) for name in ("images", "c2w", "intrinsics"))
        if f"{tag}.view_ids" in a:
            index = a[f"{tag}.view_ids"]
            images, c2w, K = images[:, index], c2w[:, index], K[:, index]
        with torch.no_grad():
            gaussians = lgm(images, Cameras(c2w, K), a[f"{tag}.timestep"])
        yield close(f"{tag}.gaussians", gaussians.to_tensor(), a[f"{tag}.gaussians"], 1e-4)

    views = info["view_ids_of_forward"]
    cameras = Cameras(a["c2w"], a["intrinsics"])
    # In float64: depths magnify the rounding of float32 kernels, which differs between processors.
    with torch.no_grad():
        gaussians = copy.deepcopy(lgm).double()(a["images"], cameras, a["t_float_scalar.timestep"])
    rendering = f.render(gaussians, cameras.views(views), a["forward.images_pred"].shape[-1])
    yield from pictures("forward.images_pred", rendering.rgb.clamp(0, 1), a["forward.images_pred"])
    yield from pictures("forward.alphas_pred", rendering.alpha, a["forward.alphas_pred"])
    yield from pictures("forward.depths_pred", rendering.depth, a["forward.depths_pred"])


# ---------------------------------------------------------------- render.safetensors


def check_render(f: Fixtures) -> Iterator[Case]:
    """The renderer, its gradient and the turntable (quirks 17 and 19)."""
    a = f.arrays("render")
    cameras, view_ids = recorded_cameras(a.under("cameras")), a["view_ids"]
    size = int(a["cameras.height"][0])
    unit, columns = (
        Gaussians.from_tensor(a[f"{kind}_quaternions.gaussians"]) for kind in ("unit", "column_normalised")
    )
    for tag, gaussians in (("unit_quaternions", unit), ("column_normalised_quaternions", columns)):
        rendering = f.render(gaussians, cameras.views(view_ids), size)
        values = {"image": rendering.rgb.clamp(0, 1), "alpha": rendering.alpha, "depth": rendering.depth}
        for name in sorted(a.under(tag).keys() & values.keys()):
            yield from pictures(f"{tag}.{name}", values[name], a[f"{tag}.{name}"])

    if "coloured_background.image" in a:
        smaller = replace(columns, scales=0.6 * columns.scales)  # scale_modifier
        rendering = render(smaller, cameras.views(view_ids), size, (0.2, 0.0, 0.7), rules="release")
        image = rendering.rgb.clamp(0, 1)
        yield from pictures("coloured_background.image", image, a["coloured_background.image"])

    for view in a.numbers(r"raw_view(\d+)\."):
        rendering = f.render(unit, cameras.views([view]), size)
        for name, value in (("color", rendering.rgb), ("depth", rendering.depth), ("alpha", rendering.alpha)):
            yield from pictures(f"raw_view{view}.{name}", value[0, 0], a[f"raw_view{view}.{name}"])
        radii = _radii(unit, cameras.views([view]), size)
        yield close(f"raw_view{view}.radii", radii, a[f"raw_view{view}.radii"], 0)

    yield from _check_render_gradient(f, a, cameras, size)
    yield from _check_video(f, a, columns)


def _check_video(f: Fixtures, a: Arrays, gaussians: Gaussians) -> Iterator[Case]:
    lgm = f.spec["lgm"]
    turntable = turntable_cameras(step=1.0, radius=lgm["cam_radius"], fov=lgm["fovy"])
    turntable = turntable.views(a["video.azimuths"])
    yield close("video.cam_view", turntable.w2c[0].transpose(-1, -2), a["video.cam_view"], 1e-6)
    projection = projection_matrix(turntable.K[0, 0], lgm["znear"], lgm["zfar"])
    # LGM's own entry; no pixel depends on it.
    projection[2, 2] = (lgm["zfar"] + lgm["znear"]) / (lgm["zfar"] - lgm["znear"])
    yield close("video.proj_matrix", projection, a["video.proj_matrix"], 1e-6)
    rendering = f.render(gaussians, turntable, f.spec["render_size"])
    yield from pictures("video.image", rendering.rgb.clamp(0, 1), a["video.image"])
    yield from pictures("video.alpha", rendering.alpha, a["video.alpha"])


def _check_render_gradient(f: Fixtures, a: Arrays, cameras: Cameras, size: int) -> Iterator[Case]:
    x = a["gradient.gaussians"].clone().requires_grad_()
    rendering = f.render(Gaussians.from_tensor(x), cameras.views([int(a["gradient.view_id"])]), size)
    # The image is the clamped one, as `GaussianRenderer.render` returns it.
    terms = {"image": rendering.rgb.clamp(0, 1), "alpha": rendering.alpha, "depth": rendering.depth}
    loss = sum((terms[name] * a[f"gradient.weight_{name}"]).sum() for name in terms)
    loss.backward()
    yield relative("gradient.loss", loss, a["gradient.loss"].item(), 1e-4)
    expected = a["gradient.d_gaussians"]
    yield Case(
        "gradient.d_gaussians (relative to its largest)",
        _difference(x.grad, expected).max().item() / expected.abs().max().item(),
        1e-4,
    )


def _radii(gaussians: Gaussians, cameras: Cameras, size: int) -> Tensor:
    """[N] the kernel's radii in pixels: 3 sigma of the longer axis, 0 for what touches no tile."""
    rules, gaussians, cameras = RULES["release"], gaussians.to(torch.float64), cameras.to(torch.float64)
    splats = project(gaussians, cameras, size, rules, KERNEL_NEAR, math.inf)
    xx, xy, yy = splats.covariances[0, 0].unbind(-1)
    middle = 0.5 * (xx + yy)
    longest = middle + (middle**2 - (xx * yy - xy * xy)).clamp_min(0.1).sqrt()
    x0, x1, y0, y1 = tile_boxes(splats, gaussians.opacities, size, rules)[0, 0].unbind(-1)
    return (3 * longest.sqrt()).ceil() * (splats.visible[0, 0] & (x1 > x0) & (y1 > y0))


# ---------------------------------------------------------------- ply.safetensors, *.ply


def check_ply(f: Fixtures) -> Iterator[Case]:
    """Both flavours of the .ply: header byte for byte, values, and what reading gives back (quirk 20)."""
    a = f.arrays("ply")
    gaussians = Gaussians.from_tensor(a["gaussians"])
    with tempfile.TemporaryDirectory() as folder:
        for flavour, compatible in (("compatible", True), ("plain", False)):
            recorded, written = f.folder / f"ply_{flavour}.ply", Path(folder) / f"{flavour}.ply"
            save_ply(written, gaussians, compatible)
            (header, rows), (our_header, our_rows) = _split_ply(recorded), _split_ply(written)
            yield Case(f"{flavour}.header (differs)", float(header != our_header), 0)
            yield close(f"{flavour}.values", our_rows, rows, 1e-5)
            for name, path in (("loaded", recorded), ("written and loaded", written)):
                loaded = load_ply(path, compatible).to_tensor()[0]
                yield close(f"{flavour}.{name}", loaded, a[f"loaded_{flavour}"], 1e-5)


def _split_ply(path: Path) -> tuple[bytes, Tensor]:
    """Header and the float32 values after it."""
    try:
        header, _, body = path.read_bytes().partition(b"end_header\n")
    except OSError as error:
        raise FixtureError(f"{path}: cannot be read ({error.strerror})") from error
    return header, torch.frombuffer(bytearray(body), dtype=torch.float32)


# ---------------------------------------------------------------- sampler.safetensors


def check_sampler(f: Fixtures) -> Iterator[Case]:
    """`generate_images` of inference.py, stage by stage on recorded inputs, then free (quirks 10 to 15)."""
    a = f.arrays("sampler")
    cameras = Cameras(a["input.c2w"], a["input.intrinsics"])
    image = resize_condition(a["input.condition_image"], f.config.model.image_size)
    yield close("pieces.condition_resized", image, a["pieces.condition_resized"], 1e-6)
    yield from _check_stages(f, a, cameras, a["pieces.condition_resized"])
    noise = Noise(a["noise.condition_image"], a["noise.initial_latents"])
    yield from _check_free_run(f, "free", a, image, cameras, noise, f.config)


def resize_condition(image: Tensor, size: int) -> Tensor:
    """The release's resize of a condition image [B, 3, H, W] that does not come at the model's size, bilinear
    without antialiasing. Our front end delivers the right size, so only this check needs it."""
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False)


@torch.no_grad()
def _check_stages(f: Fixtures, a: Arrays, cameras: Cameras, image: Tensor) -> Iterator[Case]:
    """Every stage of every step, fed what the release's stage was fed."""
    models, config, kept = f.models, f.config, f.kept
    unet, batch = models.unet, cameras.batch_size
    latent_size = a["noise.initial_latents"].shape[-1]
    yield close("pieces.clip_embedding", models.svd.embed_image(image), a["pieces.clip_embedding"], 1e-4)
    noised = image + config.sampler.noise_augmentation * a["noise.condition_image"]
    yield close("pieces.condition_latent", models.svd.encode(noised), a["pieces.condition_latent"], 1e-4)

    schedule = diffusion.euler_schedule(config.sampler.scheduler, len(a["timesteps"]))
    for name in ("sigmas", "timesteps"):
        expected = a[name]
        scale = expected.abs().clamp(min=1e-6)
        yield close(f"{name} (relative)", getattr(schedule, name) / scale, expected / scale, 1e-6)
    yield relative("init_noise_sigma", schedule.init_noise_sigma, a["init_noise_sigma"].item(), 1e-6)

    rays = unet.encode_cameras(cameras, latent_size).repeat(2)
    scale = diffusion.guidance_ramp(*config.sampler.guidance, cameras.num_views)
    condition = a["steps.unet_input"][0, :, :, config.model.vae.latent_channels :]
    x = a["noise.initial_latents"] * schedule.init_noise_sigma
    size = config.model.image_size
    maps: Feedback = {name: torch.zeros(batch, cameras.num_views, 3, size, size) for name in unet.config.feedback}
    results: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        results.setdefault(name, []).append(value)

    for i, t in enumerate(schedule.timesteps):
        keep("timestep", t)
        keep("unet_input", torch.cat([schedule.scale_model_input(x, t).repeat(2, 1, 1, 1, 1), condition], dim=2))
        features = unet.encode_feedback(maps).repeat(2)
        given = (a["steps.unet_input"][i], a["steps.timestep"][i], a["encoder_hidden_states"], a["added_time_ids"])
        keep("unet_output", unet(*given, rays, features))
        keep("cfg_prediction", diffusion.guided(a["steps.unet_output"][i], scale))
        step = schedule.step(a["steps.cfg_prediction"][i], t, x)
        keep("pred_x0_latent", step.pred_original_sample)
        keep("prev_sample", step.prev_sample)
        decoded = models.svd.decode(a["steps.pred_x0_latent"][i])
        keep("decoded_x0", decoded[:, kept])
        keep("gaussians", models.lgm(decoded, cameras, a["steps.timestep"][i]).to_tensor())
        rendering = f.render(Gaussians.from_tensor(a["steps.gaussians"][i]), cameras, size)
        maps = feedback_maps(rendering, cameras, config.model.conventions.coordinates_map)
        maps = {name: maps[name] for name in unet.config.feedback}
        keep("render_rgb", rendering.rgb.clamp(0, 1)[:, kept])
        keep("render_depth", rendering.depth[:, kept])
        keep("position_map", coordinates_map(a["steps.render_depth"][i], cameras.views(kept)))
        x = a["steps.prev_sample"][i]

    for name, values in results.items():
        actual, expected = torch.stack(values), a[f"steps.{name}"]
        if name.startswith("render_"):
            yield from pictures(f"stage.{name}", actual, expected)
            continue
        # x starts at sigma_max times a unit normal, where float32 itself is coarser than 1e-4.
        unit = max(1.0, expected.abs().max().item()) if name == "prev_sample" else 1.0
        tolerance = {"gaussians": 2e-4, "position_map": 1e-6}.get(name, 1e-4)
        yield close(f"stage.{name}", actual, expected, tolerance * unit)


def _check_free_run(
    f: Fixtures, tag: str, recorded: dict[str, Tensor], image: Tensor, cameras: Cameras, noise: Noise, config: Config
) -> Iterator[Case]:
    """One whole run. Tolerance per array and step: ten times the recorded effect of scaling the noise by
    1 + 1e-6, at least 1e-4. Of an array's steps the one nearest to its tolerance is reported."""
    models, kept, sensitivity = f.models, f.kept, f.scalars("sensitivity")
    sampler = Sampler(models.unet, models.svd, models.lgm, f.render, config.model, config.sampler)
    calls: list[tuple] = []

    def note_call(_module, args: tuple, output: Tensor) -> None:
        calls.append((*args, output))

    hook = models.unet.register_forward_hook(note_call)
    try:
        steps = list(sampler(image, cameras, noise))
    finally:
        hook.remove()
    arrays = {
        "timestep": [c[1] for c in calls],
        "unet_input": [c[0] for c in calls],
        "unet_output": [c[-1] for c in calls],
        "cfg_prediction": [s.v for s in steps],
        "pred_x0_latent": [s.x0 for s in steps],
        "prev_sample": [s.latents for s in steps],
        "decoded_x0": [s.views[:, kept] for s in steps],
        "gaussians": [s.gaussians.to_tensor() for s in steps],
        "render_rgb": [s.feedback["rgb"][:, kept] for s in steps],
        "render_depth": [s.rendering.depth[:, kept] for s in steps],
        "position_map": [s.feedback["ccm"][:, kept] for s in steps],
    }
    for name, values in arrays.items():
        if f"steps.{name}" not in recorded:
            continue
        bound = sensitivity[f"steps.{name}"]
        cases = []
        for i, (value, expected) in enumerate(zip(values, recorded[f"steps.{name}"], strict=True)):
            per_step = bound["max_per_step"]
            tolerance = max(1e-4, 10 * (per_step[i] if i < len(per_step) else bound["max"]))
            cases.append(close(f"{tag}.{name} (step {i})", value, expected, tolerance))
        yield max(cases, key=lambda case: case.error / case.tolerance)
    for name, value in (("encoder_hidden_states", calls[0][2]), ("added_time_ids", calls[0][3])):
        if name in recorded:
            yield close(f"{tag}.{name}", value, recorded[name], 1e-4)

    finals = {
        "final_images": (steps[-1].views * 0.5 + 0.5).clamp(0, 1),
        "final_render": steps[-1].feedback["rgb"],
        "final_gaussians": steps[-1].gaussians.to_tensor(),
    }
    for name, value in finals.items():
        if name not in recorded:
            continue
        expected, bound = recorded[name], sensitivity[name]
        if value.ndim == 5 and expected.shape[1] != value.shape[1]:
            value = value[:, kept]
        least = {"final_images": (2e-3, 2e-4)}.get(name, (1e-4, 1e-4))
        yield close(f"{tag}.{name}", value, expected, max(10 * bound["max"], least[0]))
        mean = _difference(value, expected).mean().item()
        yield Case(f"{tag}.{name} (mean)", mean, max(10 * bound["mean"], least[1]))


# ---------------------------------------------------------------- sampler_system.safetensors


def check_sampler_system(f: Fixtures) -> Iterator[Case]:
    """`_generate_images` of the training system: the condition latent is a posterior sample (quirk 13), and
    feedback may skip steps or lack a map."""
    a = f.arrays("sampler_system")
    cameras = Cameras(a["input.c2w"], a["input.intrinsics"])
    image = f.arrays("cameras")["dataset.condition_image"].expand(cameras.batch_size, -1, -1, -1)
    noise = Noise(a["noise.condition_image"], a["noise.initial_latents"], a["noise.vae_condition"])
    sampler = replace(f.config.sampler, steps=len(a["steps.timestep"]))
    variants = {"": {}, "rgb_only": {"feedback": ["rgb"]}} | {
        f"every{n}": {"feedback_every": n} for n in a.numbers(r"every(\d+)\.")
    }
    for tag, changes in variants.items():
        recorded = a.under(tag) if tag else a
        if recorded:
            config = replace(f.config, sampler=replace(sampler, **changes))
            yield from _check_free_run(f, tag or "free", recorded, image, cameras, noise, config)


# ---------------------------------------------------------------- train_step.safetensors


def check_train_step(f: Fixtures) -> Iterator[Case]:
    """`training_step`: losses, intermediates and the gradient norm of every parameter (quirks 21 to 23)."""
    a = f.arrays("train_step")
    for run, numbers in f.scalars("train_step").items():
        yield from _check_training_run(f, a, run, numbers)


def _check_training_run(f: Fixtures, a: Arrays, run: str, numbers: dict[str, Any]) -> Iterator[Case]:
    models, kept = f.models, f.kept
    objective = Objective(models.unet, models.svd, models.lgm, f.render, f.config)
    cameras = Cameras(a["input.c2w"], a["input.intrinsics"])
    images = f.arrays("cameras")["dataset.diffusion_images"].expand(cameras.batch_size, -1, -1, -1, -1)
    batch = OrbitBatch(images, cameras, ["scene"] * len(images))
    draws = Draws(
        vae_images=a[f"{run}.draw.vae_images"].unflatten(0, images.shape[:2]),
        latents=a[f"{run}.draw.latents"],
        condition_image=a[f"{run}.draw.condition_image"],
        vae_condition=a[f"{run}.draw.vae_condition"],
        condition_sigma=a[f"{run}.draw.cond_sigma_uniform"].flatten(),
        sigma=a[f"{run}.draw.sigma_uniform"].flatten(),
        dropout=a[f"{run}.draw.dropout_uniform"].flatten(),
        feedback=a[f"{run}.draw.feedback_uniform"].flatten()[0],
    )
    calls = {"unet": 0, "recon": 0}

    def counter(name: str) -> Callable:
        def count(*_args) -> None:
            calls[name] += 1

        return count

    networks = {"mv_model": models.unet, "recon_model": models.lgm}
    hooks = [models.unet.register_forward_hook(counter("unet")), models.lgm.register_forward_hook(counter("recon"))]
    keep: dict[str, Tensor] = {}
    try:
        with torch.set_grad_enabled("gradient_norms" in numbers):
            objective.record = keep.__setitem__
            losses = objective(batch, draws)
    finally:
        for hook in hooks:
            hook.remove()
    for name, count in calls.items():
        yield Case(f"{run}.{name}_calls (differs)", float(count != numbers[f"{name}_calls"]), 0)

    # Feedback passes through rendered pixels, of which one next to 1/255 may flip.
    loose = 1e-3 if "model_pred_1" in keep else 1e-4
    target = images * 0.5 + 0.5
    ours = {
        "train_loss": losses["diffusion"],
        "recon_loss": losses["reconstruction"],
        "recon_loss0": F.l1_loss(keep["render_x0"].clamp(0, 1), target),
        "recon_loss1": F.l1_loss(keep["render_x1"].clamp(0, 1), target),
        "total": losses["total"],
    }
    for name, value in ours.items():
        yield relative(f"{run}.{name}", value, numbers[name], loose)

    scaling = f.config.model.vae.scaling_factor
    tensors = {
        "latents": (keep["clean"], 1e-4),
        "conditional_latents_scaled": (keep["condition_latent"] * scaling, 1e-4),
        "unet_input": (keep["unet_input"], 1e-4),
        "timesteps": (keep["c_noise"], 1e-5),
        "encoder_hidden_states": (keep["context"], 1e-4),
        "added_time_ids": (keep["time_ids"], 1e-5 * keep["time_ids"].abs().max().item()),
        "model_pred_0": (keep["model_pred_0"], 1e-4),
        "model_pred_1": (keep.get("model_pred_1"), 1e-3),
        "decoded_x0": (keep["decoded_x0"][:, kept], 1e-4),
        "total": (losses["total"], loose * abs(numbers["total"])),
    }
    for name, (value, tolerance) in tensors.items():
        if f"{run}.{name}" in a:
            yield close(f"{run}.{name}", value, a[f"{run}.{name}"], tolerance)
    for name in ("render_x1", "render_x0", "position_map"):
        if f"{run}.{name}" in a:
            # Up to three float32 networks come before: changing x0 by 1e-6 moves 0.1 % of the pixels by 1e-4.
            value = keep[name][:, kept].clamp(0, 1)
            yield from pictures(f"{run}.{name}", value, a[f"{run}.{name}"], most=1e-3, every=2e-2)

    if "gradient_norms" in numbers:
        parameters = [p for m in networks.values() for p in m.parameters()]
        gradients = iter(torch.autograd.grad(losses["total"], parameters, allow_unused=True))
        norms = {}
        for prefix, module in networks.items():
            own = {
                name: torch.zeros(()) if g is None else g.norm()
                for (name, _), g in zip(module.named_parameters(), gradients, strict=False)
            }
            own = to_release_names(own, f.config.model.multiview.adapter.res_blocks)
            norms |= {f"{prefix}.{name}": norm.item() for name, norm in own.items()}
        yield from _check_norms(run, norms, numbers["gradient_norms"])


def _check_norms(run: str, norms: dict[str, float], expected: dict[str, float]) -> Iterator[Case]:
    yield Case(f"{run}.gradient_norms (names that differ)", float(len(norms.keys() ^ expected.keys())), 0)
    # Below this is rounding: gradients that are zero in exact arithmetic, as of biases before a norm.
    rounding = 1e-5 * max(expected.values())
    errors = {name: abs(norms.get(name, math.inf) - e) / max(e, rounding) for name, e in expected.items()}
    worst = max(errors, key=errors.get)
    yield Case(f"{run}.gradient_norms (relative, {worst})", errors[worst], 0.02)


SUITES: dict[str, Callable[[Fixtures], Iterator[Case]]] = {
    "cameras": check_cameras,
    "mv_unet": check_mv_unet,
    "lgm": check_lgm,
    "render": check_render,
    "ply": check_ply,
    "sampler": check_sampler,
    "sampler_system": check_sampler_system,
    "train_step": check_train_step,
}
