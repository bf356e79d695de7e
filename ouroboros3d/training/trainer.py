"""The training loop, explicit: batches, steps, EMA, validation, checkpoints, resume.

Which samples make a step, and every random number in it, follow from (seed, step) alone, so that a resumed run
repeats an uninterrupted one and several processes repeat a single one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration, gather_object
from diffusers.training_utils import EMAModel
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ouroboros3d.config.loading import parse_duration, save_config
from ouroboros3d.config.schema import Config, TrainConfig
from ouroboros3d.devices import allow_tf32
from ouroboros3d.errors import ConfigError, TrainingError
from ouroboros3d.files import check_writable_dir, staged, write_json
from ouroboros3d.timing import Stopwatch
from ouroboros3d.training.checkpoints import Checkpoints, run_lock
from ouroboros3d.training.distributed import PATIENCE, set_up_plugins
from ouroboros3d.training.optimization import SpikeWatch, learning_rate_factor, make_optimizer
from ouroboros3d.training.run_log import Means, RunLog
from ouroboros3d.training.sample_order import StepBatches, Stream

log = logging.getLogger(__name__)

SKIPS = 20  # fp16 steps running whose gradients overflow, which the scaler skips and answers with a smaller scale


class Trainer:
    """Trains `objective` on `dataset` as `config` says; `validate()` returns metrics and pictures by name (see
    RunLog.validation), `export(folder)` writes the weights for use. Both see the EMA weights where there are any.
    `stopped_by` is the signal that ended `run`, if one did.

    Beside its parameters the objective, an nn.Module, has

        collate(items)                      a batch, with `to(device)` and the objects' `ids`
        draw(seed, step, samples, batch)    every random number of a step, from (seed, sample) and (seed, step)
        forward(batch, draws)               losses by name, "total" the one to minimise
        clock                               if there is one (timing.Stopwatch), the parts it times are logged

    `settings`, the whole configuration, is kept in the checkpoints to compare with at a resume; `workers` processes
    load data. Raises ConfigError or TrainingError where this cannot be trained.
    """

    def __init__(
        self,
        objective: nn.Module,
        dataset: Dataset,
        config: TrainConfig,
        validate: Callable[[], tuple[dict[str, float], dict[str, Any]]] | None = None,
        export: Callable[[Path], None] | None = None,
        cpu: bool = False,
        settings: Config | None = None,
        workers: int = 0,
    ) -> None:
        self.config, self.validate, self.export, self.workers = config, validate, export, workers
        self.settings = {"train": config} if settings is None else settings
        self.folder = check_writable_dir(config.output_dir)
        cpu = cpu or not torch.cuda.is_available()
        if cpu and config.mixed_precision == "fp16":  # accelerate would train in fp32 without a word
            raise ConfigError("train.mixed_precision = 'fp16': needs a GPU; a CPU trains in fp32 or bf16")
        allow_tf32(config.tf32)
        self.accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(config.mixed_precision, config.mixed_precision),
            # Not the bare number, which `accelerate launch` would override from its own file.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation),
            log_with=None if config.tracker == "none" else config.tracker,
            project_config=ProjectConfiguration(project_dir=str(self.folder), logging_dir=str(self.folder)),
            cpu=cpu,  # said, or processes on CPUs would not find each other
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
        self.sharded = set_up_plugins(self.accelerator, config)
        self.global_batch = config.batch_size * config.gradient_accumulation * self.accelerator.num_processes
        if self.global_batch > len(dataset):
            raise TrainingError(
                f"{config.batch_size} (train.batch_size) x {config.gradient_accumulation} (gradient_accumulation) x "
                f"{self.accelerator.num_processes} processes are {self.global_batch} samples per step, and the "
                f"training set has {len(dataset)}: lower one of these"
            )
        self.stream = Stream(dataset, config.seed)
        trained = [p for p in objective.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError("objective: nothing is trained")
        self.clock: Stopwatch = getattr(objective, "clock", None) or Stopwatch()
        optimizer = make_optimizer(trained, config)
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]  # which sharding replaces
        self.step, self.seconds = 0, 0.0
        self._budget = parse_duration(config.time_budget)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
        self.accelerator.register_for_checkpointing(self.schedule)
        self.ema = None
        if config.ema_decay:
            average = {"decay": config.ema_decay, "use_ema_warmup": True, "power": 0.75}
            self.ema = EMAModel(self.parameters, **average, foreach=True)
            self.ema.to(dtype=torch.float32)  # DeepSpeed's weights are half precision, too coarse to average
            self.accelerator.register_for_checkpointing(self.ema)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep, self.accelerator, self.settings)
        self.best: dict[str, Any] | None = None  # {"step", "metric", "value"} of the best validation
        self.log = RunLog(self.accelerator, self.folder, config, self.clock)
        self._watch, self._skipped = SpikeWatch(config.spike_factor, config.spike_steps), 0
        self._saved_step: int | None = None
        self._stop_reason = ""
        self.stopped_by: signal.Signals | None = None

    def run(self) -> int:
        """Trains to `config.steps`, the time budget or a signal, saves, exports; returns the step reached."""
        with run_lock(self.folder) if self.accelerator.is_main_process else contextlib.nullcontext():
            return self._run()

    def _run(self) -> int:
        config, main = self.config, self.accelerator.is_main_process
        self.resume()
        if main:
            save_config(self.settings, self.folder / "config.yaml")  # not before: a resume may refuse it
        self.log.start(self.step, self.seconds)
        bar = tqdm(total=config.steps, initial=self.step, disable=not main, desc=str(self.folder), unit="step")
        try:
            with bar, self._catch_signals():
                batches = iter(self.loader())
                while self.step < config.steps and not self._should_stop():
                    start = time.perf_counter()
                    self.log.add(self.train_step(batches))
                    self.step += 1
                    self.seconds += time.perf_counter() - start
                    bar.update()
                    if self.step % config.log_every == 0:
                        rate = self.schedule.get_last_lr()[0]
                        if self._budget:  # the time left that the bar shows is the budget's
                            bar.total = min(config.steps, int(self.step * max(self._budget / self.seconds, 1)))
                        self.log.train(self.step, self.seconds, rate, self.global_batch, bar)
                    if self.step % config.validate_every == 0:
                        self._validate()
                    if self.step % config.save_every == 0:
                        self.save()
            self.save()
            with self._ema_weights():
                if main and self.export is not None and not self.sharded:
                    self.export(self.folder / "export")
        finally:
            self.log.finish()
        if self._stop_reason and main:
            same = self.config.resume == "auto"  # else it would start where this run did
            how = "the same command" if same else "the same command and train.resume=auto"
            print(f"stopped at step {self.step}: {self._stop_reason}; resume with {how}")
        self.accelerator.wait_for_everyone()  # a process that ends early would break the others' connections
        self.accelerator.state.destroy_process_group()
        return self.step

    def loader(self) -> DataLoader:
        """(batch, sample numbers) of every micro-batch of this process, from the present step on."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return DataLoader(
            self.stream,
            batch_sampler=StepBatches(self.stream, self.config, rank, world, self.step),
            collate_fn=functools.partial(_collate, self._unwrapped.collate),
            num_workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",  # copied to the GPU while it computes
            worker_init_fn=_leave_signals_to_the_trainer,
            generator=torch.Generator(),  # its own, or starting it would change the random state of a resumed run
        )

    def _should_stop(self) -> bool:
        """Whether a signal came or the time budget is used up; the same answer, and clock, in every process."""
        state = self._agree({"stop": float(bool(self._stop_reason)), "seconds": self.seconds})
        self.seconds = state["seconds"]
        if self._budget and self.seconds > self._budget:
            self._stop_reason = f"the time budget of {self.config.time_budget} is used up"
        elif state["stop"] > 0:
            self._stop_reason = self._stop_reason or "another process was asked to"
        return bool(self._stop_reason)

    def _agree(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes, the same numbers in each."""
        device = self.accelerator.device
        stacked = torch.tensor(list(values.values()), device=device, dtype=torch.float64)
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def train_step(self, batches: Iterator) -> dict[str, float]:
        """One optimiser step over all micro-batches; returns the losses' means over the global batch.

        Losses and gradients are looked at before anything is changed by them.
        """
        self.log.start_step()
        clock, device = self.clock, self.accelerator.device
        mean, seen = Means(), []
        for _ in range(self.config.gradient_accumulation):
            with clock("data", device):
                batch, samples = next(batches)
                batch = batch.to(device)
            seen += zip(samples, getattr(batch, "ids", samples), strict=True)
            draws = self._unwrapped.draw(self.config.seed, self.step, samples, batch)
            with self.accelerator.accumulate(self.objective):
                losses = self.objective(batch, draws)
                mean.add({name: float(value.detach()) for name, value in losses.items()})
                if self.accelerator.sync_gradients:  # in the last one; here, since DeepSpeed steps inside backward
                    means = self._agree(mean.pop())
                    self._check_loss(means["total"], seen)
                with clock("backward", device):
                    self.accelerator.backward(losses["total"])
                with clock("optimizer", device):
                    if self.accelerator.sync_gradients:
                        means |= self._clip_gradients(seen)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        with clock("optimizer", device):
            self.schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        return means

    def _check_loss(self, loss: float, seen: list[tuple[int, str]]) -> None:
        if not math.isfinite(loss):
            half = self.config.mixed_precision == "fp16"
            way_out = "; fp16 overflows, try train.mixed_precision=bf16" if half else ""
            self._stop_before_update(f"the loss is {loss}{way_out}", seen)
        if self._watch.spikes(loss):
            factor, steps = self.config.spike_factor, self.config.spike_steps
            limit = f"train.spike_factor = {factor:g} times its median {self._watch.median:.4g}"
            self._stop_before_update(f"the loss {loss:.4g} is the {steps}. in a row over {limit}", seen)

    def _clip_gradients(self, seen: list[tuple[int, str]]) -> dict[str, float]:
        """Returns the norm before clipping, if there is one: fp16's scaler skips a step whose gradients overflow."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip_norm)
        if norm is not None and not math.isfinite(norm):
            scaled = self.accelerator.scaler is not None or self.config.mixed_precision == "fp16"  # or DeepSpeed's own
            self._skipped += 1
            if self._skipped > (SKIPS if scaled else 0):
                self._stop_before_update("the gradient is not finite", seen)
            return {}
        self._skipped = 0
        return {} if norm is None else {"gradient_norm": float(norm)}

    def _stop_before_update(self, what: str, seen: list[tuple[int, str]]) -> NoReturn:
        """Saves the state before this step, beside all older ones, and names the batch."""
        self.optimizer.zero_grad()
        seen = sorted(gather_object(seen))
        self.save(rotate=False)
        report = self.folder / "stopped.json"
        if self.accelerator.is_main_process:
            write_json(report, {"step": self.step, "reason": what, "samples": dict(seen)})
        ids = list(dict.fromkeys(object_id for _, object_id in seen))
        raise TrainingError(
            f"{what} at step {self.step} (objects {', '.join(ids[:4])}{', ...' if len(ids) > 4 else ''}: {report}); "
            f"the state before it is {self.checkpoints.path(self.step)}"
        )

    @property
    def _unwrapped(self) -> Any:
        return self.accelerator.unwrap_model(self.objective)

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(self.config, step, self.seconds / self._budget if self._budget else 0.0)

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

    def _validate(self) -> None:
        """Scores and pictures, each process taking its share. A new best one is exported to best/ and its checkpoint
        kept."""
        if self.validate is None or self.sharded:
            return
        improved = False
        with self._ema_weights():
            self._unwrapped.eval()
            values, pictures = self.validate()
            self._unwrapped.train()
            if self.accelerator.is_main_process:
                improved = self._is_best(values)
                if improved and self.export is not None:
                    with staged(check_writable_dir(self.folder / "best")) as folder:
                        self.export(folder)
                        write_json(folder / "validation.json", {"step": self.step, **values})
                self.log.validation(self.step, values, pictures)
        if self._agree({"improved": float(improved)})["improved"] > 0:
            self.save()

    def _is_best(self, values: dict[str, float]) -> bool:
        """Whether this validation beats all before it, by the first of `train.best_metric` that it has."""
        metric = next((name for name in self.config.best_metric if name in values), None)
        if metric is None:
            if self.config.best_metric not in ([], TrainConfig().best_metric):
                there = ", ".join(values) or "nothing"
                log.warning(
                    "train.best_metric = %s: validation has %s, so best/ is not kept", self.config.best_metric, there
                )
            return False
        sign = 1 if self.config.best_direction == "max" else -1
        comparable = self.best is not None and self.best["metric"] == metric
        if comparable and not sign * values[metric] > sign * self.best["value"]:
            return False
        self.best = {"step": self.step, "metric": metric, "value": values[metric]}
        return True

    # What is kept: everything that a resumed run needs to end as an uninterrupted one does.

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "global_batch": self.global_batch,
            "best": self.best,
            "log": self.log.state(),
            "watch": self._watch.state(),
        }

    def save(self, rotate: bool = True) -> None:
        """A checkpoint of this step, unless it has one; older ones go. Raises TrainingError."""
        # Not by looking for the folder: another process may look before this one has renamed it.
        if self._saved_step == self.step:
            return
        self.accelerator.step = 0  # micro-batches since the start of this process, which say nothing
        self.checkpoints.save(self.step, self._state())
        self._saved_step = self.step
        if self.accelerator.is_main_process and rotate:
            self.checkpoints.rotate(self.best and self.best["step"])

    def resume(self) -> None:
        """From `config.resume`. Raises TrainingError."""
        if found := self.checkpoints.resume(self.config.resume, self.global_batch):
            self._restore(*found)
        if self._agree({"step": self.step})["step"] != self.step:
            raise TrainingError(f"the processes see different checkpoints: {self.folder} must be on a shared disk")
        if self.accelerator.is_main_process:
            self.checkpoints.set_aside(self.step)

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        """The trainer's own state, after accelerate's."""
        self.step = self._saved_step = state["step"]
        self.seconds = state["seconds"]
        if folder.parent.resolve() == self.checkpoints.folder.resolve():  # another run's best is not this one's
            self.best = state.get("best")
        if "log" in state:  # as it is not in checkpoints of older code
            self.log.restore(state["log"])
            self._watch.restore(state["watch"])
        if self.ema is not None:  # accelerate loads it on the CPU
            self.ema.to(self.accelerator.device)
        self.accelerator.step = 0  # counts micro-batches, of which a step may have another number now
        self._set_hyperparameters()

    def _set_hyperparameters(self) -> None:
        """The configuration's, where loading has brought those that the checkpoint was made with."""
        config = self.config
        self.schedule.base_lrs = [config.learning_rate] * len(self.schedule.base_lrs)
        rate = config.learning_rate * self._learning_rate_factor(self.schedule.last_epoch)
        for group in self.optimizer.param_groups:
            group |= {"lr": rate, "initial_lr": config.learning_rate, "weight_decay": config.weight_decay}
            group |= {"betas": tuple(config.betas)}

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the current step, with everything saved."""

        def stop(number: int, _frame: Any) -> None:
            self.stopped_by = signal.Signals(number)
            self._stop_reason = self.stopped_by.name

        previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _collate(collate: Callable[[list[dict]], Any], items: list[dict]) -> tuple[Any, list[int]]:
    """A batch and the numbers of its samples. Not a lambda: data workers may have to pickle it."""
    return collate(items), [item["sample"] for item in items]


def _leave_signals_to_the_trainer(_worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
