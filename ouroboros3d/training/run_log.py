"""The log of a run: losses, speed and memory, scores and pictures."""

from __future__ import annotations

import json
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL.Image import Image
from tqdm.auto import tqdm

from ouroboros3d.config.schema import TrainConfig
from ouroboros3d.errors import TrainingError, one_line
from ouroboros3d.files import OutputError, atomic_path, check_writable_dir
from ouroboros3d.timing import Stopwatch
from ouroboros3d.visualize import save_image, save_video

FPS = 12  # of videos
TRACKED = 8


class RunLog:
    """Writes `metrics.jsonl`, pictures and the tracker's logs of a run to its folder, from the main process.

    Between two logs it averages losses and times; the averages are part of the state, so that a resumed run logs what
    an uninterrupted one does.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, config: TrainConfig, clock: Stopwatch) -> None:
        self.accelerator, self.folder, self.config, self.clock = accelerator, folder, config, clock
        self._losses = Means()
        self._timed_steps = 0
        self._step, self._seconds = 0, 0.0  # of the last log
        self._run_id = uuid.uuid4().hex[:8]  # wandb's: a resumed run goes on under it

    @property
    def file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def start(self, step: int, seconds: float) -> None:
        """Begins at `step`. Lines beyond it will be written again: they go, and so does a half-written one."""
        self._step, self._seconds = step, seconds
        if self.accelerator.is_main_process and self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            with atomic_path(self.file) as path:
                path.write_text("".join(line for line in lines if _is_before(line, step)))
        if self.config.tracker != "none":
            self._start_tracker(step)

    def _start_tracker(self, step: int) -> None:
        name = self.config.tracker
        settings = {
            "wandb": {"dir": str(self.folder), "id": self._run_id, "resume": "allow"},
            "tensorboard": {"purge_step": step + 1},  # what an earlier start logged beyond this one's step
        }
        try:
            self.accelerator.init_trackers("ouroboros3d", init_kwargs=settings)
        except Exception as error:  # wandb without a key or a connection: its own kinds
            reason = one_line(error)
            way_out = "set WANDB_MODE=offline to log to files, or " if name == "wandb" else ""
            raise TrainingError(f"train.tracker = {name}: {reason} Or {way_out}set train.tracker=none") from error
        if not self.accelerator.log_with:  # one that is not installed is left out without a word, in every process
            raise TrainingError(f"train.tracker = {name}: is not installed: pip install {name}")

    def finish(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def start_step(self) -> None:
        """Before each step: the parts' seconds are means over the steps since the last log."""
        self._timed_steps += 1

    def add(self, losses: dict[str, float]) -> None:
        self._losses.add(losses)

    def train(self, step: int, seconds: float, learning_rate: float, samples_per_step: int, bar: tqdm) -> None:
        """Losses and gradient norm, their means since the last log; speed; seconds of each part of a step; memory."""
        values = self._losses.pop() | {
            "learning_rate": learning_rate,
            "seconds_per_step": seconds / step,
            "samples_per_second": (step - self._step) * samples_per_step / max(seconds - self._seconds, 1e-9),
            "memory_gib": peak_memory(self.accelerator.device),
        }
        values |= {f"seconds_{name}": total / self._timed_steps for name, total in self.clock.seconds.items()}
        self.clock.reset()
        self._timed_steps, self._step, self._seconds = 0, step, seconds
        self._write("train", step, values)
        bar.set_postfix(loss=f"{values['total']:.4f}", refresh=False)

    def validation(self, step: int, values: dict[str, float], pictures: dict[str, Image | list[np.ndarray]]) -> None:
        """Writes pictures as .png and videos (lists of frames, uint8 [H, W, 3]) as .mp4; a tracker is given
        `TRACKED` of a video's frames."""
        self._write("validation", step, values)
        folder = check_writable_dir(self.folder / "validation")
        for name, picture in pictures.items():
            path = folder / f"{step:07d}_{name}"
            if isinstance(picture, list):
                save_video(f"{path}.mp4", picture, FPS)
                shown = np.stack([picture[i] for i in np.linspace(0, len(picture), TRACKED, False, dtype=int)])
            else:
                save_image(f"{path}.png", picture)
                shown = np.asarray(picture)[None]
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"validation/{name}": shown}, step=step, **layout)

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
        try:
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self.file}: {error.strerror}; resume with the same command") from error

    def state(self) -> dict[str, Any]:
        return {"sums": self._losses.sums, "counts": self._losses.counts, "run_id": self._run_id}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses.sums, self._losses.counts = state["sums"], state["counts"]
        self._run_id = state.get("run_id", self._run_id)  # checkpoints of older code have none


class Means:
    """Running means of named numbers."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        self.__init__()
        return means


def _is_before(line: str, step: int) -> bool:
    """Whether a line of metrics.jsonl is whole and of `step` or earlier."""
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def peak_memory(device: torch.device) -> float:
    """GiB that tensors took on a GPU, or the process in memory, at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
