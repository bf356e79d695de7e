"""The training loop, explicit: batches, steps, EMA, validation, checkpoints, resume.

Which samples make a step, and every random number in it, follow from (seed, step) alone, so that a resumed run
repeats an uninterrupted one and several processes repeat a single one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ouroboros3d.config import ConfigError, TrainConfig
from ouroboros3d.errors import UserError
from ouroboros3d.files import atomic_path, check_writable_dir

Key = tuple[int, int, int]  # global sample number, epoch, index into the dataset


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message is one line for the user."""


class TrainingObjective(Protocol):
    """What the trainer asks of an nn.Module beside its parameters."""

    def collate(self, items: list[dict]) -> Any: ...

    def draw(self, seed: int, step: int, samples: list[int], batch: Any) -> Any:
        """Every random number of a step, from (seed, sample) and (seed, step)."""
        ...

    def __call__(self, batch: Any, draws: Any) -> dict[str, Tensor]:
        """Losses by name, "total" the one to minimise."""
        ...


class Stream(Dataset):
    """The training set as the trainer addresses it: one key a sample, over all epochs."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._order: tuple[int, list[int]] | None = None

    def key(self, sample: int) -> Key:
        """Sample n of the run: item n of an endless sequence of shuffled epochs."""
        epoch, position = divmod(sample, len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.dataset), generator=generator).tolist()
        return sample, epoch, self._order[1][position]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict:
        sample, epoch, index = key
        return self.dataset.example(epoch, index) | {"sample": sample}


class StepBatches:
    """Batch sampler: this process's keys of every micro-batch from step `start` to `config.steps`."""

    def __init__(self, stream: Stream, config: TrainConfig, rank: int, world: int, start: int) -> None:
        self.stream, self.config, self.rank, self.world, self.start = stream, config, rank, world, start

    def __len__(self) -> int:
        return (self.config.steps - self.start) * self.config.gradient_accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        size, accumulation = self.config.batch_size, self.config.gradient_accumulation
        for micro in range(self.start * accumulation, self.config.steps * accumulation):
            first = (micro * self.world + self.rank) * size
            yield [self.stream.key(first + i) for i in range(size)]


class Trainer:
    """Trains `objective` on `dataset` as `config` says; `validate()` returns metrics and pictures by name,
    `export(folder)` writes the weights for use. Both see the EMA weights where there are any."""

    def __init__(
        self,
        objective: nn.Module,
        dataset: Dataset,
        config: TrainConfig,
        validate: Callable[[], tuple[dict[str, float], dict[str, Image]]] | None = None,
        export: Callable[[Path], None] | None = None,
        cpu: bool = False,
    ) -> None:
        self.config, self.validate, self.export = config, validate, export
        self.folder = check_writable_dir(config.output_dir)
        tracker = None if config.tracker == "none" else config.tracker
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(config.mixed_precision, config.mixed_precision),
            gradient_accumulation_steps=config.gradient_accumulation,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder)),
            cpu=cpu or not torch.cuda.is_available(),  # said, or processes on CPUs would not find each other
        )
        if len(dataset) == 0:
            raise TrainingError("the training set is empty")
        self.stream = Stream(dataset, config.seed)
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("objective: nothing is trained")
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=tuple(config.betas),
            weight_decay=config.weight_decay,
        )
        self.ema = (
            EMAModel(self.parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75)
            if config.ema_decay
            else None
        )
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.step, self.seconds = 0, 0.0
        self._budget = parse_duration(config.time_budget)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer.optimizer, self._learning_rate_factor)
        self.accelerator.register_for_checkpointing(self.schedule)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self._saved_step = None
        self._stop_reason = ""

    def run(self) -> int:
        """Trains to `config.steps`, the time budget or a signal, saves, exports; returns the step reached."""
        config, main = self.config, self.accelerator.is_main_process
        self._resume()
        if config.tracker != "none":
            self.accelerator.init_trackers("ouroboros3d")
        loader = DataLoader(
            self.stream,
            batch_sampler=StepBatches(
                self.stream, config, self.accelerator.process_index, self.accelerator.num_processes, self.step
            ),
            collate_fn=lambda items: (self._unwrapped.collate(items), [item["sample"] for item in items]),
        )
        bar = tqdm(total=config.steps, initial=self.step, disable=not main, desc=str(self.folder), unit="step")
        batches, window = iter(loader), _Mean()
        with self._catch_signals():
            while self.step < config.steps and not self._should_stop():
                start = time.perf_counter()
                losses = self._train_step(batches)
                self.step += 1
                self.seconds += time.perf_counter() - start
                window.add(losses)
                bar.update()
                if self.step % config.log_every == 0:
                    self._log(window.pop(), bar)
                if self.step % config.validate_every == 0:
                    self._validate()
                if self.step % config.save_every == 0:
                    self._save()
        bar.close()
        self._save()
        with self._ema_weights():
            if main and self.export is not None:
                self.export(self.folder / "export")
        if self._stop_reason and main:
            print(f"stopped at step {self.step}: {self._stop_reason}; resume with the same command")
        self.accelerator.wait_for_everyone()  # a process that ends early would break the others' connections
        self.accelerator.end_training()
        return self.step

    def _should_stop(self) -> bool:
        """Whether a signal came or the time budget is used up; the same answer, and clock, in every process."""
        state = torch.tensor([float(bool(self._stop_reason)), self.seconds], device=self.accelerator.device)
        stop, self.seconds = self.accelerator.reduce(state, "mean").tolist()
        if self._budget and self.seconds > self._budget:
            self._stop_reason = f"the time budget of {self.config.time_budget} is used up"
        return stop > 0 or (bool(self._budget) and self.seconds > self._budget)

    def _train_step(self, batches: Iterator) -> dict[str, float]:
        """One optimiser step over all micro-batches; returns this process's mean losses."""
        mean = _Mean()
        for _ in range(self.config.gradient_accumulation):
            batch, samples = next(batches)
            batch = batch.to(self.accelerator.device)
            draws = self._unwrapped.draw(self.config.seed, self.step, samples, batch)
            with self.accelerator.accumulate(self.objective):
                losses = self.objective(batch, draws)
                self.accelerator.backward(losses["total"])
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm)
                    losses = losses | {"gradient_norm": norm}
                self.optimizer.step()
                self.optimizer.zero_grad()
            mean.add({name: float(value.detach()) for name, value in losses.items()})
            if not mean.finite("total"):
                raise TrainingError(
                    f"the loss is not finite at step {self.step} (samples {samples[0]}..{samples[-1]}, "
                    f"objects {', '.join(getattr(batch, 'ids', [])[:4])}); "
                    f"the last checkpoint is in {self._checkpoints}"
                )
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return mean.pop()

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.objective)

    def _learning_rate_factor(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine down to zero at `config.steps` or at the end of the time
        budget, whichever comes first."""
        config = self.config
        warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.schedule == "constant":
            return warm
        progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        if self._budget:
            progress = max(progress, self.seconds / self._budget)
        return warm * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))

    @contextlib.contextmanager
    def _ema_weights(self) -> Iterator[None]:
        """The EMA weights in place of the trained ones, for validation and export."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _log(self, values: dict[str, float], bar: tqdm) -> None:
        values |= {
            "learning_rate": self.schedule.get_last_lr()[0],
            "seconds_per_step": self.seconds / self.step,
        }
        self._write_metrics("train", values)
        bar.set_postfix(loss=f"{values['total']:.4f}", refresh=False)

    def _validate(self) -> None:
        if self.validate is None or not self.accelerator.is_main_process:
            return
        with self._ema_weights():
            self._unwrapped.eval()
            values, pictures = self.validate()
            self._unwrapped.train()
        self._write_metrics("validation", values)
        folder = self.folder / "validation"
        folder.mkdir(exist_ok=True)
        for name, picture in pictures.items():
            with atomic_path(folder / f"{self.step:07d}_{name}.png") as path:
                picture.save(path)
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({f"validation/{name}": np.asarray(picture)[None]}, step=self.step, **layout)

    def _write_metrics(self, kind: str, values: dict[str, float]) -> None:
        """To the tracker, and a line of metrics.jsonl."""
        if not self.accelerator.is_main_process:
            return
        self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=self.step)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step, "kind": kind, **values}) + "\n")

    # Checkpoints: folders step_00001000, complete once they have that name.

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _save(self) -> None:
        # Not by looking for the folder: another process may look before this one has renamed it.
        if self._saved_step == self.step:
            return
        self._saved_step = self.step
        name = f"step_{self.step:08d}"
        temporary = self._checkpoints / f".tmp_{name}"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (temporary / "trainer.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds}))
            shutil.rmtree(self._checkpoints / name, ignore_errors=True)  # of a run that train.resume=never repeats
            os.replace(temporary, self._checkpoints / name)
            for old in sorted(self._checkpoints.glob("step_*"))[: -self.config.keep]:
                shutil.rmtree(old)

    def _resume(self) -> None:
        """From `config.resume`; with "auto" from the newest checkpoint that can be read."""
        if self.config.resume == "never":
            return
        if self.config.resume != "auto":
            folders = [Path(self.config.resume)]
            if not folders[0].is_dir():
                raise TrainingError(f"train.resume = {self.config.resume}: no such checkpoint folder")
        else:
            folders = sorted(self._checkpoints.glob("step_*"), reverse=True)
        for folder in folders:
            try:
                state = json.loads((folder / "trainer.json").read_text())
                self.accelerator.load_state(str(folder))
            except Exception as error:  # a damaged file fails in as many ways as there are formats
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                print(f"{folder} cannot be resumed ({reason}); trying the checkpoint before it")
                continue
            self.step, self.seconds = state["step"], state["seconds"]
            self._saved_step = self.step
            if self.accelerator.is_main_process:
                print(f"resumed from {folder}")
            return
        if folders:
            raise TrainingError(
                f"none of the checkpoints in {folders[0].parent} fits this run; train.resume=never starts over"
            )

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the current step, with everything saved."""

        def stop(number: int, _frame: Any) -> None:
            self._stop_reason = signal.Signals(number).name

        previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _Mean:
    """Running means of named numbers."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def finite(self, name: str) -> bool:
        return torch.isfinite(torch.tensor(self.sums[name])).item()

    def pop(self) -> dict[str, float]:
        means = {name: self.sums[name] / self.counts[name] for name in self.sums}
        self.__init__()
        return means


def parse_duration(text: str) -> float:
    """ "90m", "7h", "30s" or plain seconds -> seconds; empty -> 0 (unlimited). Raises ConfigError."""
    if not text:
        return 0.0
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise ConfigError(f"train.time_budget = {text!r}: want a number with s, m or h, such as 90m") from None
