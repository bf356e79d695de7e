"""Measures on held-out objects how much `inference.py --candidates` gains.

    python scripts/measure_candidates.py --list test.txt --out runs/candidates data.root=data/orbits64

Samples every object with --candidates seeds at its true elevation, then with one seed at each of --elevations
elevations. Prints the PSNR of the 3D at novel views, against the truth, of the chosen, the mean and the best candidate,
with 95 % bootstrap intervals over objects, for each score after every step. --out gets samples.csv (one row per sample
and step; finished objects are not sampled again) and tables.txt.
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import ConfigParser, refuse_keys, say_loading
from ouroboros3d.config.loading import load_config
from ouroboros3d.errors import UserError
from ouroboros3d.files import check_writable_dir, write_csv, write_lines


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__)
    parser.add_argument(
        "--list", dest="data.val", default="test.txt", help="list of ids in data.root (default: %(default)s)"
    )
    parser.add_argument(
        "--objects", type=int, default=0, help="number of objects, spread evenly over the list; 0: all (default: 0)"
    )
    parser.add_argument("--candidates", type=int, default=4, help="seeds per object; 0: none (default: %(default)s)")
    parser.add_argument(
        "--elevations", type=int, default=4, help="elevations per object; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/candidates"), help="folder for the results (default: %(default)s)"
    )
    parser.add_device(dtype=None)
    options = parser.parse_args(arguments)
    if min(options.objects, options.candidates, options.elevations) < 0:
        raise UserError("--objects, --candidates and --elevations must not be negative")
    refuse_keys(options.overrides, {"sampler.seed": "the seeds start at 0"})
    config = load_config(options.config, ["data.cache=none", *options.overrides])
    folder = check_writable_dir(options.out)
    say_loading()
    from tqdm.auto import tqdm

    from ouroboros3d.data.splits import build_dataset
    from ouroboros3d.evaluation import candidate_choice as choice
    from ouroboros3d.evaluation.evaluator import choose_orbits
    from ouroboros3d.evaluation.examples import load_example, object_of
    from ouroboros3d.inference.candidates import elevation_grid
    from ouroboros3d.pipeline import Ouroboros3DPipeline

    pipe = Ouroboros3DPipeline.from_config(config, options.device)
    dataset = build_dataset(config, "val")
    chosen = choose_orbits([object_of(dataset.root, name) for name in dataset.ids], options.objects)
    rows = choice.read_rows(folder / "samples.csv")
    finished = {(row["object"], row["kind"]) for row in rows}
    kinds = ["seed"] * (options.candidates > 0) + ["elevation"] * (options.elevations > 0)
    for kind, index in tqdm([(k, i) for k in kinds for i in chosen], unit="object"):
        example = load_example(dataset, index)
        if (example.object, kind) not in finished:
            grid = elevation_grid(*config.cameras.trained_elevations, options.elevations)
            seeds = [(example.elevation, seed) for seed in range(options.candidates)]
            rows += choice.sample(pipe, example, kind, seeds if kind == "seed" else [(e, 0) for e in grid])
            write_csv(folder / "samples.csv", choice.COLUMNS, rows)
    tables = {"seed": choice.seed_table, "elevation": choice.elevation_table}
    lines = [line for kind in kinds for line in [*tables[kind](rows), ""]]
    write_lines(folder / "tables.txt", lines)
    print(*lines, sep="\n")
