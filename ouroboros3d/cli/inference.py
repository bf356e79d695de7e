"""Turns pictures into 3D Gaussians. Each gives eight views, a .ply and a turntable video, or other formats.

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

from ouroboros3d.cli.options import ConfigParser, process_seconds, say_loading
from ouroboros3d.config.loading import as_kwargs, load_config
from ouroboros3d.config.schema import Config
from ouroboros3d.errors import ConfigError
from ouroboros3d.export import FORMATS, check_formats
from ouroboros3d.files import check_writable_dir, locate
from ouroboros3d.inference.jobs import (
    RECORD,
    Job,
    Options,
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
    parser = ConfigParser(__doc__)
    parser.add_checkpoint()
    parser.add_device()
    add = parser.add_argument
    inputs = "pictures, folders of pictures, quoted patterns, or .txt lists with one picture per line"
    add("--input_img", "--input", nargs="+", required=True, metavar="FILE", help=inputs)
    add(
        "--output_dir",
        "--output",
        default="outputs",
        metavar="FOLDER",
        help="folder for the results (default: %(default)s)",
    )
    looks = "degrees the camera looks down, between -90 and 90, or auto to try four (default: the config's, 0)"
    add("--elevation", type=elevation, help=looks)
    seed = "seed of the noise, at least 0 (default: the config's, 0)"
    add("--seed", dest="sampler.seed", type=int, metavar="SEED", help=seed)
    steps = "denoising steps, at least 1 (default: the config's, 3 of the small model)"
    add("--steps", "--num_inference_steps", dest="sampler.steps", type=int, metavar="N", help=steps)
    candidates = "number of seeds to try, 1 to 64; only the best is finished (default: %(default)s)"
    add("--candidates", type=count, default=1, metavar="N", help=candidates)
    presets = ("exact", "fast", "draft")
    add(
        "--preset",
        dest="sampler.preset",
        choices=presets,
        help="speed against quality, see docs/performance.md (default: the config's, exact)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--no_remove_bg", action="store_true", help="do not cut opaque pictures out")
    white = "for product photos: remove the white background"
    how.add_argument("--white_background", action="store_true", help=white)
    margin = "empty margin around the object, as a share of the picture, at least 0 and below 1 (default: %(default)s)"
    add("--border", type=border, default=0.2, help=margin)
    formats = f"any of {', '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})"
    add("--formats", nargs="+", default=list(DEFAULT_FORMATS), metavar="FORMAT", help=formats)
    add("--html", action="store_true", help="also write <name>.html, an interactive page of every step")
    add("--up", choices=("y", "-y", "z", "-z"), help="up axis in exported files (default: the one that viewers expect)")
    add("--raw", action="store_true", help=".ply: write the release's file, not rotated, quaternions not normalised")
    add("--save_steps", action="store_true", help="also write the pictures and the .ply of every step")
    add("--summary", action="store_true", help="write index.html, a page of all pictures and their objects")
    add("--overwrite", action="store_true", help="make finished pictures again")
    return parser.parse_args(arguments)


def border(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and below 1")
    return value


def count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError(f"{text} must be 1 to 64")
    return value


def elevation(text: str) -> float | str:
    return text if text == "auto" else float(text)


def configure(options: argparse.Namespace) -> Config:
    """The configuration with what the flags say on top. Raises ConfigError."""
    angle = [] if options.elevation in (None, "auto") else [f"cameras.elevation={options.elevation}"]
    config = load_config(options.config, [*options.overrides, *angle])
    if config.model.pretrained.checkpoint is None:
        raise ConfigError("model.pretrained.checkpoint is not set: name a checkpoint folder with --ckpt")
    return config


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    options.formats = check_formats([*options.formats, *(["html"] if options.html else [])])
    config = configure(options)
    pictures = find_pictures(options.input_img)
    folder, wanted, ends = Path(options.output_dir), results_of(options, config), endings(options)
    jobs = name_jobs(pictures, folder, ends)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own = jobs[rank::processes]  # before the finished ones are left out, which another process may be adding to
    pending = [job for job in own if options.overwrite or not is_finished(job, folder, wanted.settings, ends)]
    if len(pending) < len(own):
        print(f"{len(own) - len(pending)} of {len(own)} pictures are finished; --overwrite makes them again")
    failures: dict[str, str] = {}
    if pending or processes > 1:
        failures = generate(pending, folder, options, config, wanted, processes)
    if rank == 0:
        report(jobs, failures, folder, options)
    return 1 if failures else 0


def endings(options: argparse.Namespace) -> list[str]:
    """Of the files that are made of each picture."""
    steps = ["_steps.png", "_steps"] if options.save_steps else []
    return ["_input.png", *(FORMATS[name] for name in options.formats), *steps, RECORD]


def results_of(options: argparse.Namespace, config: Config) -> Options:
    """What to make of each picture, and all that its results depend on, but the picture and the device."""
    wanted = {
        "elevation": options.elevation if options.elevation == "auto" else config.cameras.elevation,
        "candidates": options.candidates,
        "remove_background": "white" if options.white_background else not options.no_remove_bg,
        "border": options.border,
        "formats": options.formats,
        "export": {"up": options.up, "raw": options.raw or None},
        "save_steps": options.save_steps,
    }
    parts = {name: as_kwargs(getattr(config, name)) for name in ("model", "sampler", "cameras", "turntable")}
    parts |= {"background": config.data.background, "dtype": options.dtype}
    weights = weights_stamp(locate(config.model.pretrained.checkpoint))
    return Options(**wanted, settings={**parts, "weights": weights, **wanted})


def generate(
    jobs: list[Job], folder: Path, options: argparse.Namespace, config: Config, wanted: Options, processes: int
) -> dict[str, str]:
    """Makes the results of this process's jobs; returns the failures of all processes, by name."""
    if jobs:
        say_loading()
    from ouroboros3d.devices import pick_device
    from ouroboros3d.inference.photo import load_condition_image
    from ouroboros3d.inference.results import check_ffmpeg, run
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
        records, failures = run(pipe, jobs, folder, wanted)
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
