"""Scores of a model on held-out orbits: the loop from one view, and the reconstructor alone on true views.

`Evaluator` scores every orbit with its extra cameras and baselines (examples.py), `evaluate` runs it over a list,
resumable (result_folder.py) and on several processes. docs/evaluation.md defines every column.
Shapes: B batch, V views. Pictures are compared on [0, 1].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ouroboros3d.build import Models
from ouroboros3d.config.loading import as_kwargs
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.data.orbit_files import read_ids
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.errors import ConfigError, UserError
from ouroboros3d.evaluation.bootstrap import spread_evenly
from ouroboros3d.evaluation.examples import Baselines, Example, Target, load_example, object_of, spread_points
from ouroboros3d.evaluation.metrics import SOLID, grey_casts, point_scores, psnr
from ouroboros3d.evaluation.result_folder import Store
from ouroboros3d.evaluation.score_tables import Row, key, object_name, rounded
from ouroboros3d.evaluation.scorer import Scorer
from ouroboros3d.files import read_list
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.models.lpips import Lpips, make_lpips
from ouroboros3d.visualize import save_image


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
        self.scorer, self.device, self.baselines = Scorer(models, config, lpips), device, baselines

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example], seed: int) -> list[tuple[Row, dict[str, Tensor]]]:
        """A row, and its pictures [V, 3, H, W] in [0, 1] by name, of each example. Raises NumericalError."""
        batch = OrbitBatch.collate([example.item for example in examples]).to(self.device)
        step, views = self.scorer.loop(batch, seed)
        clean = self.scorer.clean(batch)
        return [
            self._row(example, seed, views[i], step.gaussians.scene(i), clean.scene(i))
            for i, example in enumerate(examples)
        ]

    def _row(
        self, example: Example, seed: int, views: Tensor, loop: Gaussians, clean: Gaussians
    ) -> tuple[Row, dict[str, Tensor]]:
        targets = {name: target.to(self.device) for name, target in example.targets.items()}
        truth = targets["generated"]
        values = {"elevation": example.elevation, "other_elevation": example.other_elevation}
        values |= self._scores("views_all", views, truth)
        values |= self._scores("views_novel", views, truth, skip=1)
        pictures = {"truth": truth.images, "views": views}
        for name, gaussians in (("render", loop), ("clean", clean)):
            for place, target in targets.items():
                rgb, shape = (x[0] for x in self.scorer.render(gaussians, target.cameras))
                if place != "generated":
                    values |= self._scores(f"{name}_{place}", rgb, target, shape)
                    continue
                if name == "render":
                    pictures["3D"] = rgb
                    values |= self._scores("render_all", rgb, target, shape)
                values |= self._scores(f"{name}_novel", rgb, target, shape, skip=1)
        for name in [c.removeprefix("views_novel_") for c in values if c.startswith("views_novel_")]:
            values[f"delta_{name}"] = values[f"views_novel_{name}"] - values[f"render_novel_{name}"]
        values["agreement_psnr"] = psnr(pictures["3D"][1:], views[1:]).mean().item()
        casts = grey_casts(pictures["3D"][0], truth.images[0], truth.alpha[0])
        values |= {f"cast_{name}": value for name, value in casts.items()}
        if example.points is not None:
            solid = loop.means[0][loop.opacities[0] > SOLID].double().cpu()
            world = solid @ example.to_world[:3, :3].T + example.to_world[:3, 3]
            values |= point_scores(spread_points(world.float()), example.points)
        for name, images in self.baselines(example).items() if self.baselines else ():
            values |= self._scores(name, images.to(self.device), truth, skip=1)
        row: Row = {"object": example.object, "id": example.item["id"], "seed": seed}
        return row | {name: rounded(value) for name, value in values.items()}, pictures

    def _scores(
        self, name: str, images: Tensor, truth: Target, shape: Tensor | None = None, skip: int = 0
    ) -> dict[str, float]:
        """Of one object's pictures [V, 3, H, W]; the `skip` first views are left out."""
        made, pictures, alpha = (x[None, skip:] for x in (images, truth.images, truth.alpha))
        scores = self.scorer.scores(name, made, pictures, alpha, None if shape is None else shape[None, skip:])
        return {metric: value.item() for metric, value in scores.items()}


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
    lpips, notes = _try_lpips(config.objective.lpips_network)
    training = _training_list(config)
    baselines = options.baselines and training is not None
    if options.baselines and not baselines:
        notes.append(f"the baselines are absent: {config.data.root} has no {config.data.train}, or an empty one")
    objects = [object_of(dataset.root, name) for name in dataset.ids]
    chosen = choose_orbits(objects, options.objects, options.every_orbit)
    notes += _overlap(training, {objects[i] for i in chosen})
    batches = [(seed, part) for seed in options.seeds for part in make_batches(config, chosen, options.batch)]

    store = Store(options.out, settings(models, config, options, lpips, baselines)) if options.out else Store()
    finished, whole = store.start(state), fixed_batches(config)
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


def fixed_batches(config: Config) -> bool:
    """Whether a batch belongs to the result, because each object sees the feedback of the next in it: a control."""
    return config.sampler.feedback_of == "another"


def make_batches(config: Config, chosen: list[int], asked: int) -> list[list[int]]:
    """`chosen` in parts of `asked`; of 1 where the conventions mix the samples of a batch (the release's context order
    and decoding in chunks), of at least 2 where each object needs another. Raises ConfigError, UserError."""
    mixes, fixed = config.model.conventions.mix_samples, fixed_batches(config)
    if mixes and fixed:
        raise ConfigError(
            "sampler.feedback_of = another: needs a batch, which the release's conventions would mix; set "
            "model.conventions.temporal_context=textbook model.conventions.decode_chunk=0"
        )
    size = max(config.model.batch_size(asked), 2 if fixed else 1)
    parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    if fixed and len(parts[-1]) == 1:
        if len(parts) == 1:
            raise UserError("sampler.feedback_of = another: there is no second object; evaluate two or more")
        parts[-2:] = [parts[-2] + parts[-1]]
    return parts


def _try_lpips(network: str) -> tuple[Lpips | None, list[str]]:
    """LPIPS, or a note if it is unavailable."""
    try:
        return make_lpips(network, reduce=False), []
    except ConfigError:
        return None, [f"LPIPS is absent: torchvision or its weights of '{network}' are unavailable"]


def _training_list(config: Config) -> Path | None:
    """None if there is no list, or nothing in it: a set made for evaluation alone has no training orbits."""
    path = Path(config.data.root) / config.data.train
    return path if path.is_file() and read_list(path) else None


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
        "lpips": config.objective.lpips_network if lpips else None,
        "baselines": config.data.train if baselines else None,
        "points": str(options.points) if options.points else None,
        "batch": options.batch if fixed_batches(config) else "any",
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
