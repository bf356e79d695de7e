"""From pictures to results: the front end, the loop, and what is left of it in one folder.

    <name>_input.png   what the networks see of the picture
    <name>.png         the generated views, four a row
    <name>.ply         the Gaussians
    <name>.mp4         the Gaussians on a turntable
    <name>_steps.png, <name>_steps/   with `save_steps`: how they came about

The results of a picture appear together, when all of them are complete, or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from ouroboros3d.config.schema import BACKGROUNDS, Config
from ouroboros3d.devices import pick_device
from ouroboros3d.errors import one_line
from ouroboros3d.files import OutputError, check_writable_dir, staged
from ouroboros3d.gaussians import save_ply
from ouroboros3d.inference.photo import ConditionImage, load_condition_image
from ouroboros3d.sampler import SamplerStep
from ouroboros3d.visualize import StepImages, save_image, steps_picture, view_grid

RESULTS = ("_input.png", ".png", ".ply", ".mp4")
STEP_RESULTS = ("_steps.png", "_steps")


@dataclass(frozen=True)
class Request:
    """What to make of which pictures, beside the configuration."""

    images: list[str]
    output_dir: str = "outputs"
    device: str | None = None  # None: what the machine has
    dtype: str | None = None  # of the networks, see DTYPES; None: float32 on a CPU, bf16 on CUDA
    remove_bg: bool = True
    border: float = 0.2  # of the square around a cut-out object
    save_steps: bool = False


def run(request: Request, config: Config, load: Callable[..., Any]) -> list[Path]:
    """Makes the results of all pictures, prints where they are and what took how long, returns their paths.

    `load(config, device, dtype)` makes the pipeline. Raises the UserErrors of what it calls, those of pictures before
    the work starts.
    """
    start = time.perf_counter()
    pick_device(request.device)
    pictures = {
        name: load_condition_image(
            path,
            config.model.image_size,
            request.remove_bg,
            request.border,
            BACKGROUNDS[config.data.background],
        )
        for name, path in name_results(request).items()
    }
    folder = check_writable_dir(request.output_dir)
    _check_ffmpeg()
    pipeline = load(config, request.device, request.dtype)
    clock = pipeline.sampler.clock
    clock.synchronize = True  # else a part's seconds on CUDA are those of the part before
    clock.seconds["load"] = time.perf_counter() - start
    for name, picture in pictures.items():
        with staged(folder) as stage:
            generate(pipeline, name, picture, stage, request.save_steps)
    print(f"{clock.summary()}; {time.perf_counter() - start:.1f} s in all")
    suffixes = RESULTS + (STEP_RESULTS if request.save_steps else ())
    paths = [folder / f"{name}{suffix}" for name in pictures for suffix in suffixes]
    print(*paths, sep="\n")
    return paths


def name_results(request: Request) -> dict[str, str]:
    """What the results of every picture are called: its file's name without the suffix.

    Raises OutputError where results would overwrite each other or a picture.
    """
    folder = Path(request.output_dir).resolve()
    results: dict[Path, str] = {}
    for path in request.images:
        own = [folder / f"{Path(path).stem}{suffix}" for suffix in RESULTS + STEP_RESULTS]
        if other := next((results[result] for result in own if result in results), None):
            raise OutputError(f"{other} and {path}: their results would have the same name; rename one")
        results |= dict.fromkeys(own, path)
    for path in request.images:
        if (source := results.get(Path(path).resolve())) is not None:
            raise OutputError(f"{path}: the results of {source} would overwrite it; choose another output folder")
    return {Path(path).stem: path for path in request.images}


def generate(pipeline: Any, name: str, picture: ConditionImage, folder: Path, save_steps: bool = False) -> None:
    """Runs the loop on one picture, with a progress bar, and writes its results to `folder`."""
    clock = pipeline.sampler.clock
    history: list[StepImages] = []
    steps_folder = folder / f"{name}_steps"
    if save_steps:
        steps_folder.mkdir()

    def keep(_pipeline: Any, _index: int, _sigma: float, kept: dict[str, SamplerStep]) -> None:
        with clock("files"):
            history.append(_save_step(kept["step"], steps_folder).small())

    pipeline.set_progress_bar_config(desc=name)
    output = pipeline(picture.tensor, callback_on_step_end=keep if save_steps else None)
    with clock("files"):
        if save_steps:
            views = range(0, pipeline.config.cameras.num_views, max(1, pipeline.config.cameras.num_views // 4))
            save_image(folder / f"{name}_steps.png", steps_picture(history, views=views[:3]))
        save_image(folder / f"{name}_input.png", output[0].image)
        for suffix in (".png", ".ply"):
            output[0].save(folder / f"{name}{suffix}")
    with clock("turntable"):
        output[0].save(folder / f"{name}.mp4", progress=True)


def _save_step(step: SamplerStep, folder: Path) -> StepImages:
    """Writes <index>_views.png, _rgb.png, _ccm.png and <index>.ply."""
    images = step.pictures(0)
    for kind, views in images.items():
        save_image(folder / f"{step.index:02d}_{kind}.png", view_grid(views))
    save_ply(folder / f"{step.index:02d}.ply", step.gaussians)
    return StepImages(step.index, step.sigma, images)


def _check_ffmpeg() -> None:
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise OutputError(f"cannot write the video: {one_line(error)}") from error
