"""Scores of a model on held-out orbits: the loop from one view, and the reconstructor alone on true views.

`score_images` is the one place where pictures are compared; `Validation` looks at a few fixed objects during
training, `Evaluator` scores every orbit with its extra cameras and baselines, `evaluate` runs it over a list,
resumable and on several processes. docs/evaluation.md defines every column.
Shapes: B batch, V views. Pictures are compared on [0, 1].
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ouroboros3d.build import Models, build_dataset, build_renderer, build_sampler
from ouroboros3d.cameras import Cameras, intrinsics_from_fov, opengl_to_opencv, relative_to_first
from ouroboros3d.config import Config, as_kwargs
from ouroboros3d.data.orbits import BACKGROUNDS, DataError, OrbitDataset, read_ids, read_meta, read_rgba
from ouroboros3d.errors import ConfigError, UserError
from ouroboros3d.files import check_writable_dir
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.metrics import gradient_distance, iou, make_lpips, point_scores, psnr, ssim
from ouroboros3d.objective import OrbitBatch
from ouroboros3d.sampler import last_step
from ouroboros3d.scores import Row, check_settings, key, object_name, read_rows, rounded, write_rows
from ouroboros3d.statistics import spread_evenly
from ouroboros3d.visualize import labelled_grid, save_image

BASELINES = ("repeat", "nearest", "mean", "background")
SOLID = 0.5  # alpha of a silhouette, and opacity of a Gaussian that counts as surface
VISIBLE = 0.1  # a picture without alpha shows the object where a channel differs by more from the background
POINTS = 20_000  # at most, of either side of a Chamfer distance
Lpips = Callable[[Tensor, Tensor], Tensor]


# ---------------------------------------------------------------- scores of pictures


def score_images(
    made: Tensor, truth: Tensor, alpha: Tensor | None = None, shape: Tensor | None = None, lpips: Lpips | None = None
) -> dict[str, Tensor]:
    """Metric -> [B], each the mean over views of its value in each picture.

    made, truth [B, V, 3, H, W] in [0, 1]; alpha [B, V, 1, H, W] the truth's (without it there is no foreground PSNR
    and no IoU); shape [B, V, 1, H, W] boolean, the silhouette of `made`; lpips [N, 3, H, W] twice -> [N].
    A view in which the object cannot be seen has no foreground PSNR.
    """
    views = made.shape[:2]
    made, truth = made.flatten(0, 1), truth.flatten(0, 1)
    values = {"psnr": psnr(made, truth)}
    if alpha is not None:
        solid = alpha.flatten(0, 1) > SOLID
        foreground = psnr(made, truth, solid)
        values["psnr_foreground"] = foreground.masked_fill(~solid.flatten(1).any(1), math.nan)
    values["ssim"] = ssim(made, truth)
    if lpips is not None:
        values["lpips"] = lpips(made, truth)
    values["gradient_distance"] = gradient_distance(made, truth)
    if alpha is not None and shape is not None:
        values["iou"] = iou(shape.flatten(0, 1), solid)
    return {name: value.unflatten(0, views).nanmean(1) for name, value in values.items()}


def picture_silhouette(images: Tensor, background: Sequence[float]) -> Tensor:
    """Where pictures [..., 3, H, W] in [0, 1] show something other than the background: boolean [..., 1, H, W]."""
    colour = images.new_tensor(background)[:, None, None]
    return ((images - colour).abs() > VISIBLE).any(-3, keepdim=True)


# ---------------------------------------------------------------- validation during training


def first_batch(dataset: Dataset | list[dict], count: int) -> OrbitBatch:
    """`count` items spread evenly over the dataset."""
    return OrbitBatch.collate([dataset[i] for i in spread_evenly(range(len(dataset)), count)])


class Validation:
    """`validation()` returns metrics and pictures by name.

    Of the reconstructor on true views: scores at the input views and at the unseen ones between them. Of the loop
    (where the diffusion model is trained): scores of the generated novel views and of the 3D renders there, and the
    gap of their PSNR, the paper's delta. View 0 shows the input and is left out.
    """

    def __init__(
        self,
        models: Models,
        config: Config,
        dataset: Dataset | list[dict],
        device: torch.device,
        objects: int | None = None,
    ) -> None:
        """`objects` of the dataset are looked at, by default `train.validate_objects`."""
        self.models, self.config, self.device = models, config, device
        self.batch = first_batch(dataset, objects or config.train.validate_objects).to(device)
        self.renderer = build_renderer(config)

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], dict[str, Image.Image]]:
        values, pictures = {}, {}
        if self.config.objective.reconstruction != "none":
            scores, pictures["lgm"] = self._reconstructor()
            values |= scores
        if self.config.objective.diffusion:
            scores, pictures["loop"] = self._loop()
            values |= scores
        return values, pictures

    def _reconstructor(self) -> tuple[dict[str, float], Image.Image]:
        batch, lgm = self.batch, self.models.lgm
        gaussians = lgm(batch.images, batch.cameras, batch.images.new_zeros(()))
        rendering = self.renderer(gaussians, batch.cameras, batch.images.shape[-1])
        rendered, shape = rendering.rgb.clamp(0, 1), rendering.alpha > SOLID
        inputs = lgm.select(batch.images.shape[1])
        unseen = [v for v in range(batch.images.shape[1]) if v not in inputs]
        values = self._scores("lgm_input", rendered, shape, inputs)
        return values | self._scores("lgm_unseen", rendered, shape, unseen), self._picture({"3D": rendered})

    def _loop(self) -> tuple[dict[str, float], Image.Image]:
        batch = self.batch
        sampler = build_sampler(self.models, self.config)
        seeds = [noise_seed(0, name) for name in batch.ids]
        noise = sampler.draw_noise(seeds, batch.images.shape[1]).to(self.device)
        step = last_step(sampler(batch.images[:, 0], batch.cameras, noise))
        views, rendered = (step.views * 0.5 + 0.5).clamp(0, 1), step.rendering.rgb.clamp(0, 1)
        novel = list(range(1, views.shape[1]))
        background = BACKGROUNDS[self.config.data.background]
        values = self._scores("views", views, picture_silhouette(views, background), novel)
        values |= self._scores("render", rendered, step.rendering.alpha > SOLID, novel)
        values["delta_psnr"] = abs(values["views_psnr"] - values["render_psnr"])
        return values, self._picture({"views": views, "3D": rendered})

    def _scores(self, name: str, images: Tensor, shape: Tensor, index: list[int]) -> dict[str, float]:
        """Means over objects of the chosen views, [B, V, 3, H, W] in [0, 1]."""
        truth, alpha = self.batch.images * 0.5 + 0.5, self.batch.alpha
        alpha = None if alpha is None else alpha[:, index]
        scores = score_images(images[:, index], truth[:, index], alpha, shape[:, index])
        return {f"{name}_{metric}": value.nanmean().item() for metric, value in scores.items()}

    def _picture(self, made: dict[str, Tensor]) -> Image.Image:
        """Truth and what was made, [B, V, 3, H, W] in [0, 1] by name, of every validation object below each other."""
        kinds = {"truth": self.batch.images * 0.5 + 0.5, **made}
        rows = [(name, list(images[i])) for i in range(len(self.batch.ids)) for name, images in kinds.items()]
        return _table(rows, self.batch.images.shape[-1])


def _table(rows: list[tuple[str, list[Tensor]]], size: int) -> Image.Image:
    return labelled_grid(rows, [f"view {v}" for v in range(len(rows[0][1]))], cell=min(size, 128))


# ---------------------------------------------------------------- an orbit to evaluate


@dataclass(frozen=True)
class Target:
    """V true pictures and where they were taken from."""

    images: Tensor  # [V, 3, H, W] in [0, 1]
    alpha: Tensor  # [V, 1, H, W] in [0, 1]
    cameras: Cameras  # one scene

    def to(self, device: torch.device) -> Target:
        return Target(self.images.to(device), self.alpha.to(device), self.cameras.to(device))


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
    """Whether ids are <object>_<orbit>, as scripts/render_orbits.py writes them; in a set of scripts/render_eval.py,
    which has a protocol.json, an id is an object, whatever its name ends in."""
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
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be used ({reason}); want `points` [N, 3]") from error
    return _thin(points)


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


def _thin(points: Tensor) -> Tensor:
    return points[torch.linspace(0, len(points) - 1, min(len(points), POINTS)).round().long()]


# ---------------------------------------------------------------- baselines


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


# ---------------------------------------------------------------- scores of orbits


def noise_seed(seed: int, name: str) -> int:
    """Of an object's sampling noise: follows from the seed and the orbit's own name alone, so that neither the batch
    nor the list nor the number of processes changes what an object is sampled from."""
    return zlib.crc32(f"{seed} {Path(name).name}".encode())


class Evaluator:
    """One model on one device: examples in, rows of scores and pictures out."""

    def __init__(
        self,
        models: Models,
        config: Config,
        device: torch.device,
        lpips: Lpips | None = None,
        baselines: Callable[[Example], dict[str, Tensor]] | None = None,
    ) -> None:
        self.models, self.config, self.device = models, config, device
        self.lpips, self.baselines = lpips, baselines
        self.sampler, self.renderer = build_sampler(models, config), build_renderer(config)
        self.background = BACKGROUNDS[config.data.background]

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example], seed: int) -> list[tuple[Row, dict[str, Tensor]]]:
        """A row, and its pictures [V, 3, H, W] in [0, 1] by name, of each example. Raises NumericalError."""
        batch = OrbitBatch.collate([example.item for example in examples]).to(self.device)
        noise = self.sampler.draw_noise([noise_seed(seed, name) for name in batch.ids], batch.images.shape[1])
        step = last_step(self.sampler(batch.images[:, 0], batch.cameras, noise.to(self.device)))
        clean = self.models.lgm(batch.images, batch.cameras, batch.images.new_zeros(()))
        views = (step.views.float() * 0.5 + 0.5).clamp(0, 1)
        return [
            self._row(example, seed, views[i], scene(step.gaussians, i), scene(clean, i))
            for i, example in enumerate(examples)
        ]

    def _row(
        self, example: Example, seed: int, views: Tensor, loop: Gaussians, clean: Gaussians
    ) -> tuple[Row, dict[str, Tensor]]:
        targets = {name: target.to(self.device) for name, target in example.targets.items()}
        truth = targets["generated"]
        values: dict[str, float] = {
            "elevation": example.elevation,
            "other_elevation": example.other_elevation,
        }
        shapes = picture_silhouette(views, self.background)
        values |= self._scores("views_all", views, shapes, truth)
        values |= self._scores("views_novel", views[1:], shapes[1:], truth, skip=1)
        pictures = {"truth": truth.images, "views": views}
        for name, gaussians in (("render", loop), ("clean", clean)):
            for place, target in targets.items():
                rendering = self._render(gaussians, target.cameras)
                rgb, shape = rendering.rgb[0], rendering.alpha[0] > SOLID
                if place != "generated":
                    values |= self._scores(f"{name}_{place}", rgb, shape, target)
                    continue
                if name == "render":
                    pictures["3D"] = rgb
                    values |= self._scores("render_all", rgb, shape, target)
                values |= self._scores(f"{name}_novel", rgb[1:], shape[1:], target, skip=1)
        for name in [c.removeprefix("views_novel_") for c in values if c.startswith("views_novel_")]:
            values[f"delta_{name}"] = values[f"views_novel_{name}"] - values[f"render_novel_{name}"]
        values["agreement_psnr"] = psnr(pictures["3D"][1:], views[1:]).mean().item()
        if example.points is not None:
            solid = loop.means[0][loop.opacities[0] > SOLID].double().cpu()
            world = solid @ example.to_world[:3, :3].T + example.to_world[:3, 3]
            values |= point_scores(_thin(world.float()), example.points)
        for name, images in self.baselines(example).items() if self.baselines else ():
            images = images.to(self.device)
            values |= self._scores(name, images[1:], picture_silhouette(images[1:], self.background), truth, skip=1)
        row: Row = {"object": example.object, "id": example.item["id"], "seed": seed}
        return row | {name: rounded(value) for name, value in values.items()}, pictures

    def _render(self, gaussians: Gaussians, cameras: Cameras) -> Rendering:
        rendering = self.renderer(gaussians, cameras, self.config.model.image_size)
        return replace(rendering, rgb=rendering.rgb.clamp(0, 1))

    def _scores(self, name: str, images: Tensor, shape: Tensor, truth: Target, skip: int = 0) -> dict[str, float]:
        """Of one object's pictures [V, 3, H, W]; `skip` of the truth's first views are left out."""
        scores = score_images(
            images[None], truth.images[None, skip:], truth.alpha[None, skip:], shape[None], self.lpips
        )
        return {f"{name}_{metric}": value.item() for metric, value in scores.items()}


def scene(gaussians: Gaussians, index: int) -> Gaussians:
    """One scene of a batch."""
    return Gaussians.from_tensor(gaussians.to_tensor()[index : index + 1].float())


# ---------------------------------------------------------------- a whole list


@dataclass(frozen=True)
class Options:
    """What to evaluate, beside the configuration (whose `data.val` names the list)."""

    objects: int = 0  # spread evenly over the list's; 0 = all
    every_orbit: bool = False  # look at an object from the first frame of each of its orbits, not of the first alone
    seeds: tuple[int, ...] = (0,)  # of the sampling noise
    batch: int = 4
    baselines: bool = True
    points: Path | None = None  # where <id>/points.npz are
    out: Path | None = None  # objects.csv, settings.json, pictures/
    worst: int = 2  # objects of each kind in the grid


def evaluate(models: Models, config: Config, device: torch.device, options: Options) -> tuple[list[Row], list[str]]:
    """The rows of all asked orbits and seeds, in every process, and notes on what could not be measured.

    With `options.out` finished rows are kept as they come and not made again; under torchrun every process takes its
    share. Raises UserError.
    """
    state = PartialState()
    dataset = build_dataset(replace(config, data=replace(config.data, cache="none")), "val")
    lpips, notes = _try_lpips()
    training = _training_list(config)
    baselines = options.baselines and training is not None
    if options.baselines and not baselines:
        notes.append(f"the baselines are absent: {config.data.root} has no {config.data.train}")
    objects = [object_of(dataset.root, name) for name in dataset.ids]
    chosen = choose_orbits(objects, options.objects, options.every_orbit)
    notes += _overlap(training, {objects[i] for i in chosen})
    size = batch_size(config, options.batch)
    batches = [(seed, part) for seed in options.seeds for part in _chunks(chosen, size, config)]

    store = Store(options.out, settings(models, config, options, lpips, baselines)) if options.out else Store()
    finished = store.start(state)
    whole = config.sampler.feedback_of == "another"  # then the batch belongs to the result
    pending = []
    for seed, part in batches:
        missing = [i for i in part if (dataset.ids[i], seed) not in finished]
        if missing:
            pending.append((seed, part if whole else missing))
    evaluator = Evaluator(models.eval(), config, device, lpips, Baselines(config) if baselines and pending else None)
    rows: list[Row] = []
    bar = tqdm(pending[state.process_index :: state.num_processes], unit="batch", disable=not state.is_main_process)
    for seed, part in bar:
        made = evaluator([load_example(dataset, i, options.points) for i in part], seed)
        if seed == options.seeds[0]:
            for row, pictures in made:
                store.picture(row, pictures)
        rows += [row for row, _ in made]
        store.add([row for row, _ in made])
    everything = {key(row): row for row in [*finished.values(), *gather_object(rows)]}
    store.finish(state, list(everything.values()))
    wanted = [(dataset.ids[i], seed) for seed, part in batches for i in part]
    asked = [everything[k] for k in wanted]
    if options.points is not None and not any("chamfer" in row for row in asked):
        notes.append(f"{options.points}: has no <id>/points.npz of any evaluated orbit; no Chamfer distance")
    if options.out and state.is_main_process:
        first = [row for row in asked if row["seed"] == options.seeds[0]]
        if (picture := store.extremes(first, options.worst)) is not None:
            save_image(options.out / "grid.png", picture)
    state.wait_for_everyone()
    return asked, notes


def choose_orbits(objects: Sequence[str], count: int = 0, every_orbit: bool = False) -> list[int]:
    """Indices into a list of orbits, of which `objects` are the objects: of `count` objects spread evenly (0 = all),
    the first orbit or every one of each."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(objects):
        groups.setdefault(name, []).append(index)
    return [i for group in spread_evenly(list(groups.values()), count) for i in (group if every_orbit else group[:1])]


def batch_size(config: Config, asked: int) -> int:
    """1 where the conventions mix the samples of a batch (the release's context order and decoding in chunks)."""
    conventions = config.model.conventions
    mixes = conventions.temporal_context == "release" or conventions.decode_chunk > 0
    if config.sampler.feedback_of == "another":
        if mixes:
            raise ConfigError(
                "sampler.feedback_of = another: needs a batch, which the release's conventions would mix; set "
                "model.conventions.temporal_context=textbook model.conventions.decode_chunk=0"
            )
        return max(asked, 2)
    return 1 if mixes else max(asked, 1)


def _chunks(chosen: list[int], size: int, config: Config) -> list[list[int]]:
    parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    if config.sampler.feedback_of == "another" and len(parts[-1]) == 1:
        if len(parts) == 1:
            raise UserError("sampler.feedback_of = another: there is no second object; evaluate two or more")
        last = parts.pop()
        parts[-1] = parts[-1] + last
    return parts


def _try_lpips() -> tuple[Lpips | None, list[str]]:
    """LPIPS and a note if it cannot be had."""
    try:
        return make_lpips(reduce=False), []
    except ConfigError:
        return None, ["LPIPS is absent: it needs torchvision and its VGG weights, which cannot be had here"]


def _training_list(config: Config) -> Path | None:
    path = Path(config.data.root) / config.data.train
    return path if path.is_file() else None


def _overlap(training: Path | None, seen: set[str]) -> list[str]:
    """A note if evaluated objects are in the training list."""
    trained = {object_name(name) for name in read_ids(training)} if training else set()
    both = len(seen & trained)
    return [f"WARNING: {both} of {len(seen)} objects are in {training}: these are not held out"] if both else []


def settings(models: Models, config: Config, options: Options, lpips: Lpips | None, baselines: bool) -> dict:
    """What the rows depend on: rows of other settings do not belong into the same table. Objects and seeds are not
    among them, so that a table can grow."""
    model = as_kwargs(config.model)
    del model["pretrained"]  # where the weights lay says nothing: their values do
    sampler = as_kwargs(config.sampler)
    del sampler["seed"]
    return {
        "weights": weights_digest(models),
        "dtype": str(models.unet.unet.dtype),
        "model": model,
        "sampler": sampler,
        "views": config.cameras.num_views,
        "frames": config.cameras.orbit_frames,
        "data": {"root": str(config.data.root), "background": config.data.background},
        "lpips": "vgg" if lpips else None,
        "baselines": config.data.train if baselines else None,
        "points": str(options.points) if options.points else None,
        "batch": options.batch if config.sampler.feedback_of == "another" else "any",
    }


def weights_digest(models: Models) -> str:
    """16 hexadecimal digits that change with any network's weights, from the sums of each tensor (a hash of every
    byte would take a minute at full size)."""
    digest = hashlib.sha256()
    for module in (models.unet, models.lgm, models.svd):
        for name, tensor in sorted(module.state_dict().items()):
            x = tensor.double()
            digest.update(f"{name} {tuple(x.shape)} {x.sum().item():.9e} {x.abs().sum().item():.9e}".encode())
    return digest.hexdigest()[:16]


class Store:
    """The folder of an evaluation: rows as they finish, pictures, the settings they belong to. Without a folder it
    keeps nothing."""

    def __init__(self, folder: Path | None = None, settings: dict | None = None) -> None:
        self.folder, self.settings = folder, settings
        self._rows: list[Row] = []

    def start(self, state: PartialState) -> dict[tuple[str, int], Row]:
        """The rows that are there already, by orbit and seed. Raises UserError for those of other settings."""
        if self.folder is None:
            return {}
        if state.is_main_process:
            check_writable_dir(self.folder / "pictures")
            check_settings(self.folder, self.settings, occupied=bool(self._tables()))
        state.wait_for_everyone()
        rows = {key(row): row for path in self._tables() for row in read_rows(path)}
        state.wait_for_everyone()  # nobody writes before everybody has read
        self._part = self.folder / (f"part{state.process_index}.csv" if state.num_processes > 1 else "objects.csv")
        self._rows = list(rows.values()) if state.num_processes == 1 else []
        return rows

    def add(self, rows: list[Row]) -> None:
        self._rows += rows
        if self.folder is not None:
            write_rows(self._part, self._rows)

    def picture(self, row: Row, pictures: dict[str, Tensor]) -> None:
        if self.folder is not None:
            size = pictures["truth"].shape[-1]
            save_image(self._picture_path(row), _table([(n, list(p)) for n, p in pictures.items()], size))

    def finish(self, state: PartialState, rows: list[Row]) -> None:
        """Everybody's rows in one table."""
        if self.folder is not None and state.is_main_process:
            write_rows(self.folder / "objects.csv", rows)
            for path in self.folder.glob("part*.csv"):
                path.unlink()

    def extremes(self, rows: list[Row], count: int) -> Image.Image | None:
        """The pictures of the objects with the best, median and worst 3D at novel cameras (PSNR), below each other;
        None if none of them has a picture."""
        ranked = sorted((r for r in rows if self._picture_path(r).is_file()), key=lambda r: -r["render_novel_psnr"])
        count = min(count, max(1, len(ranked) // 3))
        middle = (len(ranked) - count + 1) // 2
        parts = {"best": ranked[:count], "median": ranked[middle : middle + count], "worst": ranked[-count:]}
        entries, seen = [], set()
        for kind, group in parts.items():
            for row in group:
                if key(row) not in seen:
                    seen.add(key(row))
                    entries.append((f"{kind}: {row['object']}, 3D {row['render_novel_psnr']:.1f} dB", row))
        return stacked([(text, Image.open(self._picture_path(row))) for text, row in entries]) if entries else None

    def _picture_path(self, row: Row) -> Path:
        return self.folder / "pictures" / f"{Path(str(row['id'])).name}_{row['seed']}.png"

    def _tables(self) -> list[Path]:
        """The whole table first, then what an interrupted run of several processes has left."""
        whole = self.folder / "objects.csv"
        return [*([whole] if whole.is_file() else []), *sorted(self.folder.glob("part*.csv"))]


def stacked(entries: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each under its heading."""
    line = 22
    width = max(picture.width for _, picture in entries)
    sheet = Image.new("RGB", (width, sum(picture.height + line for _, picture in entries)), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(14), 0
    for text, picture in entries:
        draw.text((4, top + line // 2), text, fill="black", font=font, anchor="lm")
        sheet.paste(picture, (0, top + line))
        top += picture.height + line
    return sheet
