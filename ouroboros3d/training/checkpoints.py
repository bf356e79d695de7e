"""Checkpoint folders, what may change when a run is resumed, and the lock of a run."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from ouroboros3d.config.loading import flatten_keys, save_config
from ouroboros3d.config.schema import Config
from ouroboros3d.errors import TrainingError, UserError, one_line
from ouroboros3d.files import OutputError

# Keys, or their beginnings. The first that fits counts.
FREE = (  # change nothing in what is learnt
    *("model.conventions.renderer", "model.conventions.condition_latent"),
    *("data.val", "data.cache", "data.max_damaged", "data.workers"),
)
FIXED = (  # a checkpoint of other values does not load, or its state would mean something else
    *("cameras.num_views", "objective.diffusion", "objective.freeze", "train.seed", "train.optimizer"),
)
DEFINING = ("model.conventions.", "model.pretrained.", "data.", "objective.")  # another training, in the same networks


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder of them."""
    return sorted(folder.glob("step_*"), reverse=True)


class Checkpoints:
    """Folders `step_00001000`, complete once they have that name; the last `keep` and the best one stay.

    A folder holds accelerate's state, `config.yaml` (the configuration it was made with) and `trainer.json`.
    `save` and `resume` are for every process of a run; what they change on disk, the main process changes.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Accelerator, settings: Config | dict) -> None:
        self.folder, self.keep, self.accelerator, self.settings = folder, keep, accelerator, settings

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def temporary(self, step: int) -> Path:
        return self.folder / f".tmp_step_{step:08d}"

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Everything of `step`: accelerate's state and, in trainer.json, `state`. Raises TrainingError, e.g. with a
        full disk; older checkpoints are whole then."""
        main = self.accelerator.is_main_process
        try:
            if main:
                self.begin(step)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(str(self.temporary(step)))
            self.accelerator.wait_for_everyone()
            if main:
                self.commit(step, state)
        except Exception as error:  # a full disk has a name of its own in torch, safetensors and the system
            full = shutil.disk_usage(self.folder.parent).free < 2**24
            self.discard()
            raise TrainingError(
                f"cannot save {self.path(step)} ({'the disk is full' if full else one_line(error)}); the checkpoints "
                "before it are whole: make room and resume with the same command"
            ) from error

    def begin(self, step: int) -> None:
        """An empty temporary folder; what a killed process left of one goes."""
        self.discard()
        self.temporary(step).mkdir(parents=True)

    def commit(self, step: int, state: dict[str, Any]) -> None:
        """Adds the trainer's own state and gives the folder its name."""
        temporary, path = self.temporary(step), self.path(step)
        save_config(self.settings, temporary / "config.yaml")
        (temporary / "trainer.json").write_text(json.dumps(state))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)

    def discard(self) -> None:
        for path in self.folder.glob(".tmp_step_*"):
            shutil.rmtree(path, ignore_errors=True)

    def rotate(self, best: int | None) -> None:
        """Removes all but the last `keep` and the one of step `best`."""
        for path in newest_first(self.folder)[self.keep :]:
            if best is None or path != self.path(best):
                shutil.rmtree(path, ignore_errors=True)

    def resume(self, wanted: str, global_batch: int) -> tuple[Path, dict[str, Any]] | None:
        """Loads accelerate's state from `wanted` (a folder), or for "auto" from the newest checkpoint that can be
        read; returns the folder and the trainer's own state. None: from the start. Raises TrainingError."""
        folders = {"auto": newest_first(self.folder), "never": []}.get(wanted, [Path(wanted)])
        if not all(folder.is_dir() for folder in folders):
            raise TrainingError(f"train.resume = {wanted}: no such checkpoint folder")
        reasons = []
        for folder in folders:
            try:
                return folder, self._load(folder, global_batch, named=wanted != "auto")
            except UserError:
                raise
            except Exception as error:  # a damaged file fails in as many ways as there are formats
                damaged = ", ".join(damaged_files(folder))
                reasons.append(f"{folder.name}: {f'{damaged} is damaged' if damaged else one_line(error)}")
                self._say(f"cannot resume {folder.parent / reasons[-1]}; trying the checkpoint before it")
        if folders:
            raise TrainingError(
                f"no checkpoint in {folders[0].parent} can be resumed ({'; '.join(reasons)}); "
                "train.resume=never starts over"
            )
        return None

    def _load(self, folder: Path, global_batch: int, named: bool) -> dict[str, Any]:
        state, settings = trainer_state(folder)
        changed = compare_runs(folder, state, settings, self.settings, global_batch, named)
        if not all(map(_is_whole, folder.glob("random_states_*"))):
            raise ValueError("accelerate would start from other random states without a word")
        self.accelerator.load_state(str(folder))
        self._say(f"resumed from {folder}" + (f"; changed since: {', '.join(changed)}" if changed else ""))
        return state

    def set_aside(self, step: int) -> None:
        """Checkpoints beyond the step a run starts from, damaged or of a run begun anew, get another name (aside_...):
        neither may the next resume find them nor the rotation count them."""
        for path in newest_first(self.folder):
            if path.name > self.path(step).name:
                aside = path.with_name(f"aside_{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                self._say(f"{path.name} is damaged or of an earlier start; it is {aside.name} now")

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps the folder for this process. Raises TrainingError with the other's process id while another trains
    there; the lock of a killed process does not count."""
    lock, pid = FileLock(folder / ".lock"), folder / ".pid"
    try:
        lock.acquire(timeout=0)
        pid.write_text(str(os.getpid()))
    except Timeout:
        other = pid.read_text() if pid.is_file() else "unknown"
        raise TrainingError(
            f"{folder}: another training (process {other}) writes there; stop it, or choose another train.output_dir"
        ) from None
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another train.output_dir") from error
    try:
        yield
    finally:
        pid.unlink(missing_ok=True)
        lock.release()


def damaged_files(folder: Path) -> list[str]:
    """Names of the checkpoint's files that are not what their suffix says: torch's are zip files with checksums."""
    return [path.name for path in sorted(folder.iterdir()) if not _is_whole(path)]


def _is_whole(path: Path) -> bool:
    try:
        if path.suffix in (".bin", ".pkl", ".pt"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.suffix == ".json":
            json.loads(path.read_text())
        return True
    except (zipfile.BadZipFile, SafetensorError, ValueError, EOFError, OSError):
        return False


def trainer_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trainer's state and the flat configuration of a checkpoint; the latter is empty in those of older code."""
    state, path = json.loads((folder / "trainer.json").read_text()), folder / "config.yaml"
    return state, flatten_keys(OmegaConf.to_container(OmegaConf.load(path))) if path.exists() else {}


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[str]]:
    """Keys of both flat configurations whose values differ, as "key old -> new", by what a change of them is: "fixed",
    "defining" or "free".

    Keys that only one of them knows came or went with the code, and say nothing.
    """
    found: dict[str, list[str]] = {"fixed": [], "defining": [], "free": []}
    for key in sorted((old.keys() & new.keys()) - {"train.resume"}):
        if old[key] != new[key]:
            kind = "free" if _same_path(key, old[key], new[key]) else _kind(key, old[key], new[key])
            found[kind].append(f"{key} {old[key]} -> {new[key]}")
    return found


def _same_path(key: str, old: Any, new: Any) -> bool:
    """Whether one may be the other, seen from another working folder: data/orbits and /home/me/data/orbits."""
    if not key.startswith(("data.root", "model.pretrained.")) or None in (old, new):
        return False
    short, long = sorted((Path(old).parts, Path(new).parts), key=len)
    return short == long or (Path(*long).is_absolute() and long[-len(short) :] == short)


def _kind(key: str, old: Any, new: Any) -> str:
    if key.startswith(FREE):
        return "free"
    fixed = key.startswith(FIXED) or (key.startswith("model.") and not key.startswith(DEFINING))
    fixed |= key == "train.ema_decay" and bool(old) != bool(new)  # there is an average, or none
    fixed |= key == "train.mixed_precision" and "fp16" in (old, new)  # there is a scaler, or none
    return "fixed" if fixed else "defining" if key.startswith(DEFINING) else "free"


def compare_runs(
    folder: Path, state: dict, old: dict[str, Any], new: Any, global_batch: int, named: bool = False
) -> list[str]:
    """What changed since the checkpoint was made, as "key old -> new".

    `state` and `old` are of `trainer_state`, `new` is the configuration now. Raises TrainingError where the change
    makes it another run; a checkpoint that the user `named` may start another training of the same networks.
    """
    changed = differences(old, flatten_keys(OmegaConf.to_container(OmegaConf.structured(new))))
    if refused := changed["fixed"] + (changed["defining"] if not named else []):
        go_on = "" if changed["fixed"] else f", or go on with the changes by train.resume={folder}"
        raise TrainingError(
            f"{folder} is of another configuration: {', '.join(refused)}; set these back, choose another "
            f"train.output_dir, start over with train.resume=never{go_on}"
        )
    before = state.get("global_batch", global_batch)
    if before != global_batch:
        raise TrainingError(
            f"{folder} was trained with {before} samples per step, and now these are {global_batch}: choose "
            f"train.batch_size and train.gradient_accumulation so that with the number of processes they make {before}"
        )
    return changed["defining"] + changed["free"]
