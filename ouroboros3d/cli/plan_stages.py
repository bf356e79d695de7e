"""Prints the plan of scripts/train_small.sh: stages, steps, samples and hours on this machine.

    ./scripts/train_small.sh --budget 8h --dry_run
    python scripts/plan_stages.py --budget_seconds 28800 vae_colours:0 vae:10 unet:45      (STAGE:PERCENT of the budget)

STAGE is a file of configs/small/. A PERCENT of 0 means a fixed number of steps. Each stage's step is timed once, on the
orbits of tests/data with random weights, so no data and no earlier stages are needed.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from ouroboros3d.cli.options import Parser, say_loading, split_overrides
from ouroboros3d.config.loading import as_override, load_config
from ouroboros3d.config.schema import Config, PretrainedConfig
from ouroboros3d.errors import UserError

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("stages", nargs="+", metavar="STAGE:PERCENT", help="stage and its share of the budget")
    parser.add_argument(
        "--budget_seconds", type=float, required=True, help="training time in seconds of all stages with a share"
    )
    arguments, overrides = split_overrides(arguments)
    options = parser.parse_args(arguments)
    stages = [parse_stage(text) for text in options.stages]
    say_loading()
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| stage | samples per step | seconds per step | steps | samples | hours |\n|---|---|---|---|---|---|")
    total = 0.0
    for name, percent in stages:
        data = [as_override("data.root", ROOT / "tests" / "data" / "orbits"), "data.cache=none", "data.workers=0"]
        config = load_config(ROOT / "configs" / "small" / f"{name}.yaml", [*overrides, *data])
        seconds = step_seconds(name, config, device)
        steps = int(options.budget_seconds * percent / 100 / seconds) if percent else config.train.steps
        hours = steps * seconds / 3600
        total += hours
        batch = config.train.batch_size
        print(f"| {name} | {batch} | {seconds:.2f} | {steps} | {steps * batch} | {hours:.2f} |", flush=True)
    print(f"\n{total:.1f} hours of one process; each step timed once on {device.type}, so the hours are approximate")


def parse_stage(text: str) -> tuple[str, float]:
    """ "unet:45" as ("unet", 45.0)."""
    name, _, percent = text.partition(":")
    if not percent.replace(".", "", 1).isdigit():
        raise UserError(f"{text}: not of the form STAGE:PERCENT, such as unet:45")
    return name, float(percent)


def step_seconds(name: str, config: Config, device: torch.device) -> float:
    """Wall seconds of one forward and backward pass, the second of two: the first compiles kernels."""
    from ouroboros3d.data.batch import OrbitBatch
    from ouroboros3d.data.splits import build_dataset
    from ouroboros3d.objective import HALF
    from ouroboros3d.timing import seconds_of
    from ouroboros3d.training.dry_run import run_step

    objective = stage_objective(name, config, device).train()
    dataset = build_dataset(config, "train")
    items = itertools.islice(itertools.cycle([dataset[i] for i in range(len(dataset))]), config.train.batch_size)
    batch = OrbitBatch.collate(list(items)).to(device)

    def step(index: int) -> None:
        draws = objective.draw(config.train.seed, index, list(range(config.train.batch_size)), batch)
        run_step(objective, batch, draws, HALF.get(config.train.mixed_precision))

    step(0)
    return seconds_of(lambda: step(1), device)


def stage_objective(name: str, config: Config, device: torch.device) -> torch.nn.Module:
    """What a stage minimises, on random weights."""
    from ouroboros3d.build import build_models
    from ouroboros3d.models.svd import make_image_encoder, make_vae
    from ouroboros3d.training.frozen_parts import ContrastiveObjective, VAEObjective
    from ouroboros3d.training.setup import build_objective

    if name.startswith("vae"):
        return VAEObjective(make_vae(config.model.vae)).to(device)
    if name == "image_encoder":
        return ContrastiveObjective(make_image_encoder(config.model.image_encoder)).to(device)
    models = build_models(dataclasses.replace(config.model, pretrained=PretrainedConfig())).to(device)
    return build_objective(models, config)
