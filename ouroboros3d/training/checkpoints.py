"""What a run leaves to go on from: checkpoint folders, the log, and what may change between two starts of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ouroboros3d.config.loading import save_config
from ouroboros3d.config.schema import Config
from ouroboros3d.errors import TrainingError

# A change of these makes it another run: the saved weights would not fit, or the samples would be others.
FIXED = ("model.", "cameras.num_views", "objective.diffusion", "objective.freeze", "train.seed", "train.optimizer")
FREE = ("model.pretrained.", "model.conventions.")  # ... but not of these, though they begin like one above


class Checkpoints:
    """Folders `step_00001000`, complete once they have that name; the last `keep` and the best one stay.

    A folder holds accelerate's state, `config.yaml` (the configuration it was made with) and `trainer.json`.
    Every method is for the main process alone; paths and `newest_first` are for all.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def temporary(self, step: int) -> Path:
        return self.folder / f".tmp_step_{step:08d}"

    def newest_first(self) -> list[Path]:
        return sorted(self.folder.glob("step_*"), reverse=True)

    def begin(self, step: int) -> None:
        """An empty temporary folder; what a killed process left of one goes."""
        self.discard()
        self.temporary(step).mkdir(parents=True)

    def commit(self, step: int, state: dict, config: Config | dict) -> None:
        """Adds the trainer's own state and gives the folder its name."""
        temporary, path = self.temporary(step), self.path(step)
        save_config(config, temporary / "config.yaml")
        (temporary / "trainer.json").write_text(json.dumps(state))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)

    def discard(self) -> None:
        for path in self.folder.glob(".tmp_step_*"):
            shutil.rmtree(path, ignore_errors=True)

    def rotate(self, best: int | None) -> None:
        """Removes all but the last `keep` and the one of step `best`."""
        for path in self.newest_first()[self.keep :]:
            if best is None or path != self.path(best):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, step: int) -> list[Path]:
        """Checkpoints beyond the step a run starts from, damaged or of a run begun anew, get another name (aside_...):
        neither may the next resume find them nor the rotation count them. Returns those names."""
        renamed = []
        for path in self.newest_first():
            if path.name > self.path(step).name:
                aside = path.with_name(f"aside_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                renamed.append(aside)
        return renamed


def read_state(folder: Path) -> tuple[dict, dict[str, Any] | None]:
    """The trainer's state and the flat configuration of a checkpoint; the latter is None in those of older code."""
    state = json.loads((folder / "trainer.json").read_text())
    path = folder / "config.yaml"
    return state, flat(OmegaConf.to_container(OmegaConf.load(path))) if path.exists() else None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 4}} as {"train.steps": 4}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Keys of both flat configurations whose values differ, as "key old -> new": those that may not, and the others.

    Keys that only one of them knows came or went with the code, and say nothing.
    """
    refused, allowed = [], []
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            fixed = key.startswith(FIXED) and not key.startswith(FREE)
            fixed |= key == "train.ema_decay" and bool(old[key]) != bool(new[key])  # there is an average, or none
            fixed |= key == "train.mixed_precision" and "fp16" in (old[key], new[key])  # there is a scaler, or none
            (refused if fixed else allowed).append(f"{key} {old[key]} -> {new[key]}")
    return refused, allowed


def compare_runs(folder: Path, state: dict, old: dict[str, Any] | None, new: Any, global_batch: int) -> list[str]:
    """What changed since the checkpoint was made, as "key old -> new".

    `state` and `old` are of `read_state`, `new` is the configuration now. Raises TrainingError where the change makes
    it another run.
    """
    refused, allowed = differences(old or {}, flat(OmegaConf.to_container(OmegaConf.structured(new))))
    if refused:
        raise TrainingError(
            f"{folder} is of another configuration: {', '.join(refused)}; set these back, choose another "
            "train.output_dir, or start over with train.resume=never"
        )
    before = state.get("global_batch", global_batch)
    if before != global_batch:
        raise TrainingError(
            f"{folder} was trained with {before} samples a step, and now these are {global_batch}: choose "
            f"train.batch_size and train.gradient_accumulation so that with the number of processes they make {before}"
        )
    return allowed
