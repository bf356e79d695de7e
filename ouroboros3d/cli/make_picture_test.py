"""Makes the pictures of a naming test: turntable frames of held-out objects, without their input and name.

    python scripts/make_picture_test.py [--objects 10] [--out outputs/picture_test] [key=value ...]

Writes 01.png, 02.png, ... with eight frames of an object each, for somebody who has not seen the objects, and
answers.txt with their ids. The objects are drawn at random from the list, by --draw.
"""

from __future__ import annotations

import random
from pathlib import Path

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import check_lists, load_config
from ouroboros3d.errors import UserError

TURN = 45  # degrees between the frames


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__)
    parser.add_argument("--list", dest="data.val", default="test.txt", help="list of orbits (default: %(default)s)")
    parser.add_argument("--objects", type=int, default=10, help="number of objects (default: %(default)s)")
    parser.add_argument("--draw", type=int, default=0, help="seed that draws the objects (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/picture_test"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.objects < 1:
        raise UserError(f"--objects {options.objects}: must be at least 1")
    config = load_config(options.config, options.overrides)
    check_lists(config, config.data.val)
    say_loading()
    import torch

    from ouroboros3d.build import build_models
    from ouroboros3d.data.batch import OrbitBatch
    from ouroboros3d.data.splits import build_dataset
    from ouroboros3d.evaluation.evaluator import choose_orbits
    from ouroboros3d.evaluation.examples import object_of
    from ouroboros3d.evaluation.scorer import Scorer
    from ouroboros3d.evaluation.validation import tilts
    from ouroboros3d.files import check_writable_dir, write_lines
    from ouroboros3d.visualize import save_image, turntable, view_grid

    config.data.cache = "none"  # each is read once
    models, dataset = build_models(config.model).eval(), build_dataset(config, "val")
    scorer, c = Scorer(models, config), config.turntable
    orbits = choose_orbits([object_of(dataset.root, name) for name in dataset.ids])
    chosen = random.Random(options.draw).sample(orbits, min(options.objects, len(orbits)))
    folder = check_writable_dir(options.out)
    for number, index in enumerate(chosen, 1):
        batch = OrbitBatch.collate([dataset[index]])
        with torch.no_grad():
            step, _ = scorer.loop(batch, config.sampler.seed)
        frames = turntable(step.gaussians, scorer.renderer, c.size, TURN, c.radius, c.fov, tilts(batch.cameras)[0])
        views = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) / 255 for frame in frames])
        save_image(folder / f"{number:02d}.png", view_grid(views))
    write_lines(folder / "answers.txt", [f"{n:02d} {dataset.ids[i]}" for n, i in enumerate(chosen, 1)])
    print(f"{len(chosen)} pictures and answers.txt in {folder}")
