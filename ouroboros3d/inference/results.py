"""Runs the loop on each picture and writes the results to one folder.

    <name>_input.png   what the networks see of the picture
    <name>.png         the generated views, four per row
    <name>.ply ...     the object in every format that was asked for, see ouroboros3d.export
    <name>_steps.png, <name>_steps/   with `save_steps`: pictures and .ply of every step
    <name>.json        picture hash, settings, seed, elevation, seconds

The results of a picture appear together, when all of them are complete, or not at all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio_ffmpeg
from torch import Tensor
from tqdm.auto import tqdm

from ouroboros3d.errors import one_line
from ouroboros3d.export import FORMATS, options_of
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.files import OutputError, staged
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.inference.colour import ImageError
from ouroboros3d.inference.jobs import Job, Options, Record, file_sha256, write_record
from ouroboros3d.sampler import NumericalError, SamplerStep
from ouroboros3d.visualize import StepImages, save_image, steps_picture, view_grid

if TYPE_CHECKING:
    from ouroboros3d.pipeline import Ouroboros3DPipeline


def run(
    pipe: Ouroboros3DPipeline, jobs: Sequence[Job], folder: Path, options: Options
) -> tuple[dict[str, Record], dict[str, str]]:
    """Makes the results of all jobs in `folder`, with progress bars. Returns the records of those that came out well,
    and the reasons of those that did not, by name. A single picture's error is raised.

    Raises OutputError (a full disk ends the run), DeviceError.
    """
    records: dict[str, Record] = {}
    failures: dict[str, str] = {}
    with tqdm(jobs, unit="picture", file=sys.stderr, disable=len(jobs) == 1) as bar:
        for job in bar:
            try:
                picture = pipe.prepare_image(job.path, options.remove_background, options.border)
                records[job.name] = make_results(pipe, job, picture, folder, options)
            except (ImageError, NumericalError) as error:
                if len(jobs) == 1:
                    raise
                failures[job.name] = str(error) if str(job.path) in str(error) else f"{job.path}: {error}"
    return records, failures


def make_results(pipe: Ouroboros3DPipeline, job: Job, picture: Tensor, folder: Path, options: Options) -> Record:
    """Runs the loop on one prepared picture and writes its results to `folder`, all or none."""
    start, clock, name = time.perf_counter(), pipe.sampler.clock, job.name
    history: list[StepImages] = []
    gaussians: list[Gaussians] = []  # of every step
    with staged(folder) as stage:
        steps_folder = stage / f"{name}_steps"
        if options.save_steps:
            steps_folder.mkdir()

        def keep(_pipe: Any, _index: int, _sigma: float, kept: dict[str, SamplerStep]) -> None:
            with clock("files"):
                history.append(_save_step(kept["step"], steps_folder).small())
                gaussians.append(kept["step"].gaussians.to("cpu"))

        pipe.set_progress_bar_config(desc=name, leave=None)
        result = pipe(
            picture,
            elevation=options.elevation,
            num_candidates=options.candidates,
            return_history="html" in options.formats,
            callback_on_step_end=keep if options.save_steps else None,
        )[0]
        with clock("files"):
            for step, made in zip(history, gaussians, strict=True):
                path = steps_folder / f"{step.index:02d}.ply"
                Object3D(made, result.elevation).save(path, **options_of(".ply", options.export))
            if options.save_steps:
                views = pipe.config.cameras.num_views
                chosen = range(0, views, max(1, views // 4))[:3]
                save_image(stage / f"{name}_steps.png", steps_picture(history, views=chosen))
            save_image(stage / f"{name}_input.png", result.image)
        for ending in (FORMATS[name] for name in options.formats):
            with clock("turntable" if ending == ".mp4" else "files"):
                result.save(stage / f"{name}{ending}", **options_of(ending, options.export | {"progress": True}))
        files = sorted(p.name for p in stage.iterdir())
        seconds = time.perf_counter() - start
        sha256 = file_sha256(job.path)
        record = Record(str(job.path), sha256, options.settings, result.seed, result.elevation, seconds, files)
        write_record(stage, name, record)
    return record


def _save_step(step: SamplerStep, folder: Path) -> StepImages:
    """Writes <index>_views.png, _rgb.png and _ccm.png."""
    images = step.pictures(0)
    for kind, views in images.items():
        save_image(folder / f"{step.index:02d}_{kind}.png", view_grid(views))
    return StepImages(step.index, step.sigma, images)


def check_ffmpeg() -> None:
    """Raises OutputError where no video can be written."""
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OutputError(f"cannot write the video: {one_line(error)}") from error
