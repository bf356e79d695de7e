"""How much choosing among candidates without the truth gains, on held-out objects: samples and tables.

A row is one sample at one step of the loop: its seed and elevation, its scores at that step, and the PSNR of its
finished 3D at novel views.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ouroboros3d.evaluation.bootstrap import bootstrap_mean
from ouroboros3d.evaluation.examples import Example
from ouroboros3d.evaluation.metrics import psnr
from ouroboros3d.files import read_table
from ouroboros3d.inference.candidates import score_parts
from ouroboros3d.pipeline import Ouroboros3DPipeline

PARTS = ("agreement", "reprojection")
COLUMNS = ("object", "kind", "true_elevation", "elevation", "seed", "step", *PARTS, "psnr")
Row = dict[str, str | float]


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run, none without one."""
    if not path.is_file():
        return []
    text = ("object", "kind")
    return [{k: v if k in text else float(v) for k, v in row.items()} for row in read_table(path, COLUMNS)]


@torch.no_grad()
def sample(pipe: Ouroboros3DPipeline, example: Example, kind: str, starts: list[tuple[float, int]]) -> list[Row]:
    """A row per sample and step of one object, sampled from each (elevation, seed)."""
    target, rows = example.targets["generated"].to(pipe.device), []
    size = pipe.batch_size(len(starts))
    for part in (starts[i : i + size] for i in range(0, len(starts), size)):
        image = example.item["images"][0].expand(len(part), -1, -1, -1)
        scores: list[dict[str, list[float]]] = []
        for step in pipe.steps(image, [seed for _, seed in part], pipe.cameras([e for e, _ in part])):
            scores.append({name: values.tolist() for name, values in score_parts(step, image).items()})
        for i, (elevation, seed) in enumerate(part):
            rgb = pipe.sampler.renderer(step.gaussians.scene(i), target.cameras, image.shape[-1]).rgb.clamp(0, 1)
            value = psnr(rgb[0, 1:], target.images[1:]).mean().item()  # of the pictures, as scripts/evaluate.py has it
            start = dict(zip(COLUMNS, (example.object, kind, example.elevation, elevation, seed), strict=False))
            rows += [
                start | {"step": k + 1, "psnr": value} | {p: parts[p][i] for p in PARTS}
                for k, parts in enumerate(scores)
            ]
    return rows


Score = Callable[[Row], float]
SCORES: dict[str, Score] = {
    "agreement + reprojection": lambda row: row["agreement"] + row["reprojection"],
    "agreement": lambda row: row["agreement"],
    "reprojection": lambda row: row["reprojection"],
}


def seed_table(rows: list[Row]) -> Iterator[str]:
    """PSNR of the chosen seed, by score and step, beside the mean and the best."""
    steps = by_step(rows, "seed")
    last = [*steps.values()][-1]
    count = len(last[0])
    psnrs = [[row["psnr"] for row in group] for group in last]
    yield f"{count} seeds, {len(last)} objects: PSNR of the 3D at novel views, dB [95 % interval over objects]"
    yield f"mean candidate   {bootstrap_mean([np.mean(p) for p in psnrs]).text()}"
    gain = bootstrap_mean([np.max(p) - np.mean(p) for p in psnrs])
    yield f"best candidate   {bootstrap_mean([np.max(p) for p in psnrs]).text()}   minus mean {gain.text(sign=True)}"
    for name, score in SCORES.items():
        for step, groups in steps.items():
            chosen = [max(group, key=score)["psnr"] for group in groups]
            means = [np.mean([row["psnr"] for row in group]) for group in groups]
            difference = bootstrap_mean(np.subtract(chosen, means)).text(sign=True)
            yield f"chosen by {name} at step {step:.0f}   {bootstrap_mean(chosen).text()}   minus mean {difference}"


def elevation_table(rows: list[Row]) -> Iterator[str]:
    """How far the chosen elevation is from the true one, by score and step, beside guesses that look at nothing."""
    steps = by_step(rows, "elevation")
    last = [*steps.values()][-1]
    yield f"{len(last[0])} elevations, {len(last)} objects: degrees off, and PSNR of the 3D at novel views"
    grid = sorted({row["elevation"] for row in last[0]})
    for guess in grid:
        yield _elevation_line(f"always {guess:.0f} degrees", last, lambda row, g=guess: -abs(row["elevation"] - g))
    nearest = "the true one, as near as the candidates have it"
    yield _elevation_line(nearest, last, lambda row: -abs(row["elevation"] - row["true_elevation"]))
    for name, score in SCORES.items():
        for step, groups in steps.items():
            yield _elevation_line(f"chosen by {name} at step {step:.0f}", groups, score)


def _elevation_line(name: str, groups: list[list[Row]], score: Score) -> str:
    chosen = [max(group, key=score) for group in groups]
    off = bootstrap_mean([abs(row["elevation"] - row["true_elevation"]) for row in chosen])
    return f"{name}   {off.text(1)} degrees   {bootstrap_mean([row['psnr'] for row in chosen]).text()} dB"


def by_step(rows: list[Row], kind: str) -> dict[float, list[list[Row]]]:
    """The steps in order, each with the rows of every object."""
    steps: dict[float, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["kind"] == kind:
            steps[row["step"]][row["object"]].append(row)
    return {step: [*steps[step].values()] for step in sorted(steps)}
