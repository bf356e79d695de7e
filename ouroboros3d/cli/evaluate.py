"""Scores a model on held-out orbits: the loop from one view, and the reconstructor alone on true views.

    python scripts/evaluate.py --list test.txt --objects 16 --out runs/evaluation [--ckpt FOLDER] [key=value ...]
    torchrun --nproc_per_node=8 scripts/evaluate.py ...

Prints means over objects with 95 % bootstrap intervals, beside simple baselines. --out gets objects.csv (one row per
orbit and seed, written as they finish), summary.json, pictures/, and grid.png with the best, median and worst objects.
The same command continues an interrupted run. docs/evaluation.md defines every column.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ouroboros3d.cli.options import ConfigParser, refuse_keys, say_loading
from ouroboros3d.config.loading import check_lists, load_config
from ouroboros3d.errors import UserError
from ouroboros3d.files import write_json


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__)
    parser.add_checkpoint()
    parser.add_argument(
        "--list", dest="data.val", default="test.txt", help="list of ids in data.root (default: %(default)s)"
    )
    parser.add_argument(
        "--objects", type=int, default=0, help="number of objects, spread evenly over the list (default: all)"
    )
    parser.add_argument(
        "--every_orbit", action="store_true", help="use every orbit of an object as input, not only the first"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the sampling noise (default: 0)")
    parser.add_argument("--batch", type=int, default=4, help="orbits per batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for tables and pictures (default: none are written)")
    parser.add_argument(
        "--compare", type=Path, metavar="CSV", help="objects.csv of another run, for paired differences"
    )
    parser.add_argument(
        "--points", type=Path, metavar="FOLDER", help="folder with <id>/points.npz, for Chamfer distance and F-score"
    )
    parser.add_argument("--no_baselines", action="store_true", help="leave out the baselines")
    parser.add_device("sampler.dtype; here auto means float32")
    options = parser.parse_args(arguments)
    if min(options.objects, *options.seeds) < 0 or options.batch < 1:
        raise UserError("--objects and --seeds must not be negative, --batch at least 1")
    refuse_keys(options.overrides, {"sampler.seed": "use --seeds"})
    config = load_config(options.config, options.overrides)
    check_lists(config, config.data.val)
    say_loading()
    from accelerate import PartialState

    from ouroboros3d.build import build_models, check_renderer
    from ouroboros3d.devices import inference_dtype, pick_device
    from ouroboros3d.evaluation.evaluator import Options, evaluate
    from ouroboros3d.evaluation.score_tables import above_repeat, compare, read_rows, summarise, table_text
    from ouroboros3d.training.distributed import PATIENCE

    others = read_rows(options.compare) if options.compare else None  # bad input shows before the work
    where = pick_device(options.device)
    state = PartialState(cpu=where.type == "cpu", timeout=PATIENCE)
    where = state.device if where.type == "cuda" and state.num_processes > 1 else where
    check_renderer(config, where)
    auto = "float32" if config.sampler.dtype == "auto" else config.sampler.dtype
    offload = config.sampler.offload and where.type != "cpu"
    models = build_models(config.model).to(where, inference_dtype(options.dtype or auto, where), offload)
    rows, notes = evaluate(
        models,
        config,
        where,
        Options(
            objects=options.objects,
            every_orbit=options.every_orbit,
            seeds=tuple(dict.fromkeys(options.seeds)),
            batch=options.batch,
            baselines=not options.no_baselines,
            points=options.points,
            out=options.out,
        ),
    )
    if not state.is_main_process:
        return
    summary = summarise(rows)
    objects = len({row["object"] for row in rows})
    title = f"{objects} objects of {config.data.val}, {len(rows)} samples (seeds {', '.join(map(str, options.seeds))})"
    print(f"\n{title}; mean [95 % interval over objects]\n\n{table_text(summary)}")
    if above := above_repeat(rows):
        print("\nPSNR above repeating the input: " + ", ".join(f"{k} {v.text(2, sign=True)}" for k, v in above.items()))
    differences = compare(rows, others) if others is not None else {}
    if differences:
        print(f"\nminus {options.compare}, paired by object, {differences['render_novel_psnr'].count} objects\n")
        print(table_text(differences, sign=True))
    for note in notes:
        print(f"\n{note}")
    if options.out:
        report = {"title": title, "notes": notes, "scores": {k: asdict(v) for k, v in summary.items()}}
        if differences:
            report["minus"] = {"table": str(options.compare), **{k: asdict(v) for k, v in differences.items()}}
        write_json(options.out / "summary.json", report)
        print(f"\nin {options.out}: objects.csv, summary.json, settings.json, grid.png, pictures/")
