"""Evaluation examples from orbits: one input, true pictures at several cameras, and simple baselines.

Shapes: V views. Pictures are on [0, 1]. docs/evaluation.md says what each set of cameras is for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ouroboros3d.cameras import Cameras, intrinsics_from_fov, opengl_to_opencv, relative_to_first
from ouroboros3d.config.schema import BACKGROUNDS, Config
from ouroboros3d.data.orbit_files import DataError, read_meta, read_rgba
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.errors import one_line
from ouroboros3d.evaluation.bootstrap import spread_evenly
from ouroboros3d.evaluation.score_tables import object_name
from ouroboros3d.tensors import Tensors

POINTS = 20_000  # at most, of either side of a Chamfer distance


@dataclass(frozen=True)
class Target(Tensors):
    """V true pictures and where they were taken from."""

    images: Tensor  # [V, 3, H, W] in [0, 1]
    alpha: Tensor  # [V, 1, H, W] in [0, 1]
    cameras: Cameras  # one scene


@dataclass(frozen=True)
class Example:
    """An orbit as the evaluation sees it. Poses are in the model's frame, in which frame 0 is the first camera."""

    item: dict  # the dataset's
    object: str
    targets: dict[str, Target]  # "generated" (the model's cameras), "between", "other": what there is of them
    elevation: float  # degrees, of the condition camera
    other_elevation: float  # degrees, of the object's other orbit, NaN without one
    to_world: Tensor  # [4, 4] float64: the model's frame to that of meta.json and points.npz
    points: Tensor | None  # [N, 3] of the true surface, in the frame of meta.json


def load_example(dataset: OrbitDataset, index: int, points: Path | None = None) -> Example:
    """Item `index` with its extra cameras: "between" are the orbit's frames that are not generated, "other" as many
    frames as are generated, of an orbit of the same object at another elevation (ids are <object>_<orbit>).

    points: where <id>/points.npz is looked for. Raises DataError.
    """
    item = dataset[index]
    folder = dataset.root / item["id"]
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; the evaluation reads orbits as folders, not from shards")
    meta = read_meta(folder / "meta.json", dataset.frames)
    used = item["frames"].tolist()
    first = opengl_to_opencv(meta.c2w[used[0]])
    cameras = Cameras(item["c2w"][None].float(), item["K"][None])
    targets = {"generated": Target(item["images"] * 0.5 + 0.5, item["alpha"], cameras)}
    rest = [k for k in range(dataset.frames) if k not in used]
    if rest:
        targets["between"] = _read_target(folder, rest, dataset, first, item["background"])
    other, other_elevation = other_orbit(folder) if has_orbits(dataset.root) else None, math.nan
    if other is not None:
        frames = [k * dataset.frames // dataset.num_views for k in range(dataset.num_views)]
        targets["other"] = _read_target(other, frames, dataset, first, item["background"])
        other_elevation = _elevation(read_meta(other / "meta.json", dataset.frames).c2w[0])
    to_model = relative_to_first(torch.stack([first, torch.eye(4, dtype=first.dtype)]))[1]
    surface = None if points is None else read_points(points, item["id"])
    return Example(
        item,
        object_of(dataset.root, item["id"]),
        targets,
        _elevation(meta.c2w[used[0]]),
        other_elevation,
        torch.linalg.inv(to_model),
        surface,
    )


def has_orbits(root: Path) -> bool:
    """Whether ids are <object>_<orbit>, as scripts/render_orbits.py writes them. scripts/render_eval.py writes one
    orbit per object and a protocol.json; its ids are the objects' names."""
    return not (root / "protocol.json").is_file()


def object_of(root: Path, orbit: str) -> str:
    """The object that an id of the set in `root` stands for."""
    return object_name(orbit) if has_orbits(root) else Path(orbit).name


def other_orbit(folder: Path) -> Path | None:
    """The folder of the object's next orbit: <object>_1 of <object>_0, <object>_0 of the last one."""
    name, _, number = folder.name.rpartition("_")
    if not name or not number.isdigit():
        return None
    own = int(number)
    candidates = [folder.with_name(f"{name}_{k}") for k in (own + 1, *range(own))]
    return next((c for c in candidates if (c / "meta.json").is_file()), None)


def read_points(root: Path, name: str) -> Tensor | None:
    """`points` [N, 3] of <root>/<id>/points.npz, at most 20,000 spread evenly; None if there is no such file.
    Raises DataError for a damaged one."""
    path = next((p for n in (name, Path(name).name) if (p := root / n / "points.npz").is_file()), None)
    if path is None:
        return None
    try:
        with np.load(path) as file:
            points = torch.from_numpy(np.asarray(file["points"], np.float32))
        if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0 or not points.isfinite().all():
            raise ValueError(f"`points` has shape {tuple(points.shape)} or values that are not finite")
    except Exception as error:  # zipfile, zlib and numpy all have their own
        reason = one_line(error)
        raise DataError(f"{path}: cannot be used ({reason}); want `points` [N, 3]") from error
    return spread_points(points)


def _read_target(folder: Path, frames: list[int], dataset: OrbitDataset, first: Tensor, background: Tensor) -> Target:
    """Frames of any orbit of the object; `first` [4, 4] is the pose, in the same world, of the model's first camera."""
    meta = read_meta(folder / "meta.json", dataset.frames)
    rgba = torch.stack([read_rgba(folder / meta.names[k], dataset.size) for k in frames]).permute(0, 3, 1, 2) / 255
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    c2w = relative_to_first(torch.cat([first[None], opengl_to_opencv(meta.c2w[frames])]))[1:]
    K = intrinsics_from_fov(torch.full((len(frames),), meta.fov))
    colour = background[:, None, None]
    return Target(rgb * alpha + colour * (1 - alpha), alpha, Cameras(c2w.float()[None], K[None]))


def _elevation(c2w: Tensor) -> float:
    """Degrees above the horizon of a camera of meta.json, whose world is z-up."""
    return math.degrees(math.asin(float(c2w[2, 3] / c2w[:3, 3].norm())))


def spread_points(points: Tensor) -> Tensor:
    """At most 20,000 of points [N, 3], spread evenly."""
    return points[torch.linspace(0, len(points) - 1, min(len(points), POINTS)).round().long()]


class Baselines:
    """What costs nothing: a picture for each generated camera, by name.

    repeat: the input view. nearest: the views of the training orbit whose frame 0 looks most like the input (mean
    squared error at 32 pixels or less). mean: the mean of training views. background: no object at all.
    """

    def __init__(self, config: Config, objects: int = 2000, averaged: int = 100) -> None:
        """Looks at up to `objects` training orbits for the nearest and `averaged` for the mean, spread evenly over
        the training list, each from its frame 0. A list with an absolute path is that of another set, whose orbits
        lie beside it. Raises DataError."""
        self.background = torch.tensor(BACKGROUNDS[config.data.background])
        path = Path(config.data.train)
        root = str(path.parent) if path.is_absolute() else config.data.root
        data = replace(config.data, root=root, val=path.name if path.is_absolute() else config.data.train, cache="none")
        self._training = build_dataset(replace(config, data=data), "val")
        single = build_dataset(replace(config, data=data, cameras=replace(config.cameras, num_views=1)), "val")
        self._index = spread_evenly(range(len(single)), objects)
        bar = tqdm(
            self._index, desc="training set", unit="orbit", leave=False, disable=not PartialState().is_main_process
        )
        self._thumbnails = torch.stack([_thumbnail(single[i]["images"][0]) for i in bar])
        views = [self._training[i]["images"].mean(0) * 0.5 + 0.5 for i in spread_evenly(self._index, averaged)]
        self._mean = torch.stack(views).mean(0)

    def __call__(self, example: Example) -> dict[str, Tensor]:
        """[V, 3, H, W] in [0, 1] by name."""
        images = example.targets["generated"].images
        distance = (self._thumbnails - _thumbnail(example.item["images"][0])).square().flatten(1).mean(1)
        # If the list holds training objects, an object is not its own neighbour.
        same = torch.tensor([object_name(self._training.ids[i]) == example.object for i in self._index])
        nearest = self._training[self._index[int(distance.masked_fill(same, math.inf).argmin())]]
        return {
            "repeat": images[:1].expand_as(images),
            "nearest": nearest["images"] * 0.5 + 0.5,
            "mean": self._mean.expand_as(images),
            "background": self.background[:, None, None].expand_as(images),
        }


def _thumbnail(image: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(image, min(32, image.shape[-1]))
