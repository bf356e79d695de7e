"""The work behind the page: cut-outs, the loop on one device, files. Independent of Gradio."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ouroboros3d.config.schema import BACKGROUNDS, Config
from ouroboros3d.export import FORMATS, check_formats
from ouroboros3d.export.object3d import Object3D, Step3D, step3d
from ouroboros3d.inference.colour import with_alpha
from ouroboros3d.inference.photo import cut_out, load_condition_image, open_picture
from ouroboros3d.pipeline import Ouroboros3DPipeline
from ouroboros3d.sampler import SamplerStep
from ouroboros3d.visualize import to_uint8

PREVIEW = 320  # pixels


@dataclass(frozen=True)
class Framing:
    """How the object is cut out of its picture and placed."""

    background: str = "remove"  # or "white", a product photo's, or "keep"
    border: float = 0.2  # empty margin, as a share of the picture
    threshold: int = 12  # of 255: alpha below it is background


@dataclass(frozen=True)
class Prepared:
    """A picture before any time is spent on it."""

    name: str
    cut: Image.Image  # RGBA, cut out, at most PREVIEW pixels per side
    image: Tensor  # [3, H, W] in [-1, 1], what the networks see

    def pictures(self) -> tuple[Image.Image, Image.Image]:
        """The cut-out on a chequerboard, and what the networks see, with their pixels."""
        board = chequerboard(self.cut.size)
        board.paste(self.cut, mask=self.cut)
        seen = Image.fromarray(to_uint8(self.image * 0.5 + 0.5))
        return board, seen.resize((PREVIEW, PREVIEW), Image.Resampling.NEAREST)


@dataclass(frozen=True)
class Settings:
    """Of one run of the loop."""

    seed: int = 0
    steps: int = 25
    elevation: float = 0.0  # degrees that the picture's camera looks down
    candidates: int = 1  # seeds, from `seed` on, of which the best is finished


class _Cancelled(Exception):
    """The user does not want it any more."""


class Worker:
    """One pipeline on one device, for all users: nobody waits longer than one step of the loop takes, or the choice
    among another user's candidates. All of it runs in one thread: CUDA graphs belong to the one that recorded them."""

    def __init__(self, pipeline: Ouroboros3DPipeline, folder: Path) -> None:
        self.pipeline, self.folder = pipeline, folder
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.closed = threading.Event()

    def close(self) -> None:
        """Ends every user's loop after its step; nothing new begins."""
        self.closed.set()
        self.thread.shutdown(cancel_futures=True)

    def _do(self, work: Callable[[], Any]) -> Any:
        """Its result, made in the one thread. Raises _Cancelled after `close`."""
        try:
            return self.thread.submit(work).result()
        except (CancelledError, RuntimeError):
            if self.closed.is_set():
                raise _Cancelled from None
            raise

    def prepare(self, path: str, framing: Framing) -> Prepared:
        """The picture as the networks will see it. Raises ImageError."""
        config = self.pipeline.config
        background = BACKGROUNDS[config.data.background]
        size = config.model.image_size
        cut = _cut_out(path, {"remove": True, "white": "white", "keep": False}[framing.background])
        if framing.background != "keep":
            cut = above(cut, framing.threshold)
        framed = load_condition_image(cut, size, False, framing.border, background)
        cut = cut.copy()
        cut.thumbnail((PREVIEW, PREVIEW))
        return Prepared(Path(path).stem, cut, framed.tensor)

    def configure(self, settings: Settings) -> Config:
        """The pipeline's configuration with these settings. Raises ConfigError."""
        return self.pipeline.configured(settings.steps, None, [settings.elevation])

    def run(self, picture: Prepared, settings: Settings, cancelled: threading.Event) -> Iterator[Step3D | Object3D]:
        """Every step of the loop, then the object, unless `cancelled` is set: then the loop ends after its step.

        Raises ConfigError, NumericalError, DeviceError.
        """
        config, pipeline = self.configure(settings), self.pipeline

        def go_on() -> None:
            if cancelled.is_set() or self.closed.is_set():
                raise _Cancelled

        def next_step() -> SamplerStep:
            go_on()
            return next(steps)

        if settings.candidates > 1:
            start = settings.seed, settings.elevation, settings.candidates
            try:
                best = self._do(partial(pipeline.choose, picture.image, *start, config, after_step=go_on))
            except _Cancelled:
                return
            settings = replace(settings, seed=best.seed)
        cameras = pipeline.cameras([settings.elevation])
        steps = pipeline.steps(picture.image[None], [settings.seed], cameras, config)
        history: list[Step3D] = []
        while not history or len(history) < history[-1].total:  # a preset may take fewer steps
            try:
                step = self._do(next_step)
            except _Cancelled:
                return
            history.append(step3d(step, 0))
            yield history[-1]
        steps.close()
        yield pipeline.object3d(step, 0, cameras, picture.image, settings.elevation, tuple(history), settings.seed)

    def save(self, object3d: Object3D, name: str, formats: list[str]) -> Iterator[Path]:
        """One file per format (a zip of those that are folders), in a new folder, as they are ready.

        Raises OutputError, FormatError.
        """
        folder = Path(tempfile.mkdtemp(prefix="files-", dir=self.folder))
        try:
            for each in check_formats(formats):
                path = self._do(partial(object3d.save, folder / f"{name}{FORMATS[each]}"))
                yield Path(shutil.make_archive(str(path), "zip", path)) if path.is_dir() else path
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@lru_cache(maxsize=8)
def _cut_out(path: str, how: bool | str) -> Image.Image:
    """An uploaded picture's object, kept while its framing is corrected; uploads are named by their content."""
    picture = open_picture(path)
    return picture.convert("RGB").convert("RGBA") if how is False else cut_out(picture, path, how)


def above(picture: Image.Image, threshold: int) -> Image.Image:
    """An RGBA picture whose alpha below `threshold` of 255 is 0."""
    return with_alpha(picture, picture.getchannel("A").point(lambda value: value if value >= threshold else 0))


def chequerboard(size: tuple[int, int], cell: int = 10) -> Image.Image:
    """Light and dark grey squares, which show through where a picture is transparent."""
    x, y = np.meshgrid(np.arange(size[0]) // cell, np.arange(size[1]) // cell)
    return Image.fromarray(np.where((x + y) % 2, 205, 240).astype(np.uint8)).convert("RGB")
