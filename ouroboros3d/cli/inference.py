"""Turns pictures into 3D Gaussians: per picture eight views, one .ply, one turntable video, or other formats.

    python inference.py --input_img testset/armchair.webp
    python inference.py --input_img photos/ more/*.jpg list.txt --output_dir outputs --summary
    python inference.py --config configs/baseline.yaml --ckpt path/to/checkpoint --input_img photo.png \\
        --elevation 30 --seed 0 --device cuda [key=value ...]

Any key of the configuration may follow as key=value, e.g. sampler.guidance=[1,2.5] sampler.feedback=[ccm]. Finished
pictures are skipped; torchrun divides them among processes. Status: 0 all done, 1 some pictures failed (listed at the
end), 2 nothing could be done. docs/inference.md has every format.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ouroboros3d.cli.options import SMALL_CONFIG, Parser, process_seconds, say_loading
from ouroboros3d.config.checks import check_config
from ouroboros3d.config.loading import as_kwargs, load_config, split_overrides
from ouroboros3d.config.schema import Config
from ouroboros3d.devices import DTYPE_NAMES, check_device_name
from ouroboros3d.errors import ConfigError
from ouroboros3d.export import FORMATS, check_formats
from ouroboros3d.files import check_writable_dir, locate
from ouroboros3d.inference.jobs import (
    RECORD,
    Job,
    find_pictures,
    is_finished,
    name_jobs,
    read_record,
    weights_stamp,
)
from ouroboros3d.inference.summary import write_summary

DEFAULT_FORMATS = ("png", "ply", "mp4")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, and in `overrides` the key=value arguments wherever they stand. Exits with status 2."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        *("--input_img", "--input"),
        nargs="+",
        required=True,
        metavar="FILE",
        help="pictures, folders of pictures, quoted patterns, or .txt lists with one picture per line",
    )
    add("--config", default=SMALL_CONFIG, metavar="YAML", help="(default: %(default)s)")
    add(
        *("--ckpt", "--checkpoint"),
        metavar="FOLDER",
        help="folder of weights, run of train.py, training checkpoint or hub id (default: the config's)",
    )
    add("--output_dir", "--output", default="outputs", metavar="FOLDER", help="(default: %(default)s)")
    add("--elevation", type=elevation, help="degrees the camera looks down, or auto (default: the config's, 0)")
    add("--seed", type=int, help="seed of the noise, at least 0 (default: the config's, 0)")
    add(
        *("--steps", "--num_inference_steps"),
        type=int,
        help="denoising steps, at least 1 (default: the config's, 5 of the small model)",
    )
    add(
        "--candidates",
        type=count,
        default=1,
        metavar="N",
        help="samples from N seeds, of which the best is finished (default: %(default)s)",
    )
    add("--device", help="cpu, cuda, cuda:<number> or mps (default: cuda where there is one, else cpu)")
    add("--preset", choices=("exact", "fast", "draft"), help="the same as sampler.preset=, docs/performance.md")
    add("--dtype", choices=DTYPE_NAMES, help="of the networks (default: fp16 on cuda, else float32)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no_remove_bg", action="store_true", help="take opaque pictures as they are")
    how.add_argument(
        "--white_background", action="store_true", help="product photos: cut out by their white background"
    )
    add(
        "--border",
        type=border,
        default=0.2,
        help="empty margin around the object, as a share of the picture from 0 to 1 (default: %(default)s)",
    )
    add(
        "--formats",
        nargs="+",
        default=list(DEFAULT_FORMATS),
        metavar="FORMAT",
        help=f"any of {', '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})",
    )
    add("--html", action="store_true", help="also <name>.html, a page to turn the object of every step in")
    add("--up", choices=("y", "-y", "z", "-z"), help="up in exported files (default: what viewers of the format take)")
    add("--raw", action="store_true", help=".ply: the release's file, neither turned nor with unit quaternions")
    add("--save_steps", action="store_true", help="also write what every step of the loop made")
    add("--summary", action="store_true", help="write index.html, a page of all pictures and their objects")
    add("--overwrite", action="store_true", help="make finished pictures again")
    # Taken out first, or `--input_img a.png sampler.steps=5` would name two pictures.
    arguments, overrides = split_overrides(arguments)
    options = parser.parse_args(arguments)
    options.overrides = overrides + ([f"sampler.preset={options.preset}"] if options.preset else [])
    return options


def border(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0 .. 1")
    return value


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 1 .. 64")
    return value


def elevation(text: str) -> float | str:
    return text if text == "auto" else float(text)


def configure(options: argparse.Namespace) -> Config:
    """The configuration with what the flags say on top. Raises ConfigError."""
    config = load_config(options.config, options.overrides)
    if options.ckpt is not None:
        config.model.pretrained.checkpoint = options.ckpt
    if options.elevation not in (None, "auto"):
        config.cameras.elevation = options.elevation
    if options.seed is not None:
        config.sampler.seed = options.seed
    if options.steps is not None:
        config.sampler.steps = options.steps
    check_config(config)
    if config.model.pretrained.checkpoint is None:
        raise ConfigError("model.pretrained.checkpoint is not set: name a checkpoint folder with --ckpt")
    return config


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    check_device_name(options.device)
    options.formats = check_formats([*options.formats, *(["html"] if options.html else [])])
    config = configure(options)
    pictures = find_pictures(options.input_img)
    jobs = name_jobs(pictures, options.output_dir, endings(options))
    folder, settings = Path(options.output_dir), settings_of(options, config)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own = jobs[rank::processes]  # before the finished ones are left out, which another process may be adding to
    pending = [job for job in own if options.overwrite or not is_finished(job, folder, settings, endings(options))]
    if len(pending) < len(own):
        print(f"{len(own) - len(pending)} of {len(own)} pictures are finished; --overwrite makes them again")
    failures: dict[str, str] = {}
    if pending or processes > 1:
        failures = generate(pending, folder, options, config, settings, processes)
    if rank == 0:
        report(jobs, failures, folder, options)
    return 1 if failures else 0


def endings(options: argparse.Namespace) -> list[str]:
    """Of the files that are made of each picture."""
    steps = ["_steps.png", "_steps"] if options.save_steps else []
    return ["_input.png", *(FORMATS[name] for name in options.formats), *steps, RECORD]


def settings_of(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """All that a picture's results depend on, but the picture and the device."""
    parts = {name: as_kwargs(getattr(config, name)) for name in ("model", "sampler", "cameras", "turntable")}
    return {
        **parts,
        "background": config.data.background,
        "weights": weights_stamp(locate(config.model.pretrained.checkpoint)),
        "elevation": options.elevation if options.elevation == "auto" else config.cameras.elevation,
        "candidates": options.candidates,
        "dtype": options.dtype,
        "remove_background": remove_background(options),
        "border": options.border,
        "formats": options.formats,
        "export": export_options(options),
        "save_steps": options.save_steps,
    }


def export_options(options: argparse.Namespace) -> dict[str, Any]:
    """What the writers of the formats are told, each what it knows."""
    return {"up": options.up, "raw": options.raw or None}


def remove_background(options: argparse.Namespace) -> bool | str:
    return "white" if options.white_background else not options.no_remove_bg


def generate(
    jobs: list[Job],
    folder: Path,
    options: argparse.Namespace,
    config: Config,
    settings: dict[str, Any],
    processes: int,
) -> dict[str, str]:
    """Makes the results of this process's jobs; returns the failures of all processes, by name."""
    if jobs:
        say_loading()
    from ouroboros3d.devices import pick_device
    from ouroboros3d.inference.photo import load_condition_image
    from ouroboros3d.inference.results import Options, check_ffmpeg, run
    from ouroboros3d.pipeline import Ouroboros3DPipeline

    device = pick_device(options.device)
    if processes > 1 and device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if len(jobs) == 1:  # an unusable picture is said before the model loads
        load_condition_image(jobs[0].path, 8, remove_bg=False)
    check_writable_dir(folder)
    check_ffmpeg()
    failures: dict[str, str] = {}
    if jobs:
        pipe = Ouroboros3DPipeline.from_config(config, device, options.dtype)
        clock = pipe.sampler.clock
        clock.seconds["load"] = process_seconds()
        what = Options(
            formats=options.formats,
            remove_background=remove_background(options),
            border=options.border,
            elevation="auto" if options.elevation == "auto" else None,
            candidates=options.candidates,
            save_steps=options.save_steps,
            export=export_options(options),
            settings=settings,
        )
        records, failures = run(pipe, jobs, folder, what)
        print(f"{clock.summary()}; {process_seconds():.1f} s in all")
        for name, record in records.items():
            if options.candidates > 1 or options.elevation == "auto":
                print(f"{name}: best of its candidates: seed {record.seed}, elevation {record.elevation:.0f}")
    return gathered(failures) if processes > 1 else failures


def gathered(failures: dict[str, str]) -> dict[str, str]:
    """The failures of all processes, in every one of them; waits for the slowest."""
    from datetime import timedelta

    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    everyone: list[dict[str, str]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, failures)
    distributed.destroy_process_group()
    return {name: reason for part in everyone for name, reason in part.items()}


def report(jobs: list[Job], failures: dict[str, str], folder: Path, options: argparse.Namespace) -> None:
    """Prints where the results are and what failed; writes the page of all, if asked."""
    made = [job.name for job in jobs if job.name not in failures]
    if options.summary:
        records = {name: record for name in made if (record := read_record(folder, name)) is not None}
        write_summary(folder / "index.html", records, list(failures.values()))
        print(folder / "index.html")
    for name in made[:10]:
        print(*(folder / f"{name}{ending}" for ending in endings(options)), sep="\n")
    if len(made) > 10:
        print(f"... and those of {len(made) - 10} more pictures in {folder}")
    if failures:
        lines = [f"{len(failures)} of {len(jobs)} pictures failed:", *failures.values()]
        print(*lines, sep="\n", file=sys.stderr)
