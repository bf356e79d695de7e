"""A training that takes a moment: a regression on seven points, whose every draw shows in the weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from ouroboros3d.config.schema import TrainConfig
from ouroboros3d.training.trainer import Trainer


class Points(torch.utils.data.Dataset):
    """Item (epoch, index) is a number that tells both apart."""

    def __len__(self) -> int:
        return 7

    def example(self, epoch: int, index: int) -> dict:
        return {"x": torch.tensor([float(index), float(epoch), 1.0]) / 7, "id": str(index)}


@dataclass(frozen=True)
class Batch:
    x: Tensor
    ids: list[str]

    def to(self, device) -> Batch:
        return Batch(self.x.to(device), self.ids)


class Regression(nn.Module):
    """Fits y = sum(x) plus noise drawn per sample, so that any change of a draw shows in the weights; `dropout` draws
    from the global random state, which a resumed run must restore."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.dropout = nn.Dropout(0.0)
        self.factors: dict[int, float] = {}  # of the loss, by step
        self.gradient_factors: dict[int, float] = {}

    @staticmethod
    def collate(items: list[dict]) -> Batch:
        return Batch(torch.stack([i["x"] for i in items]), [i["id"] for i in items])

    def draw(self, seed: int, step: int, samples: list[int], batch: Batch) -> Tensor:
        self.step = step
        return torch.stack([torch.randn(1, generator=torch.Generator().manual_seed(seed + s)) for s in samples])

    def forward(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        error = self.dropout(self.net(batch.x)) - batch.x.sum(-1, keepdim=True) - 0.1 * noise
        total = (error**2).mean() * self.factors.get(self.step, 1.0)
        if total.requires_grad and self.step in self.gradient_factors:
            factor = self.gradient_factors[self.step]
            total.register_hook(lambda gradient: gradient * factor)
        return {"total": total}


def make(folder: Path, dropout: float = 0.0, settings: dict | None = None, workers: int = 0, **changes) -> Trainer:
    defaults = {"steps": 6, "batch_size": 2, "learning_rate": 0.05, "save_every": 2, "log_every": 1}
    config = TrainConfig(
        **{"output_dir": str(folder), "tracker": "none", "validate_every": 1000, **defaults, **changes}
    )
    torch.manual_seed(0)
    objective = Regression()
    objective.dropout.p = dropout
    settings = settings and {"train": config, **settings}
    return Trainer(objective, Points(), config, cpu=True, settings=settings, workers=workers)


def stop_after(trainer: Trainer, step: int) -> Trainer:
    trainer._should_stop = lambda: trainer.step >= step
    return trainer


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def in_a_process(work: Callable[[], None], rank: int = 0, world: int = 1) -> multiprocessing.Process:
    """Started, in a copy of this process (no imports again) that knows nothing of the trainers before."""

    def start() -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        if world > 1:
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT), "RANK": rank, "WORLD_SIZE": world}
            os.environ |= {key: str(value) for key, value in (where | {"LOCAL_RANK": rank}).items()}
        work()

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    return process


def in_two_processes(work: Callable[[], None]) -> list[int]:
    """Their exit codes."""
    global PORT
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        PORT = free.getsockname()[1]
    processes = [in_a_process(work, rank, 2) for rank in range(2)]
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parameters])


def assert_same_end(one: Trainer, other: Trainer) -> None:
    """Weights, optimiser, EMA, schedule, random state and logged losses, to the bit."""
    assert one.step == other.step and torch.equal(weights(one), weights(other))
    states = [t.optimizer.state_dict()["state"] for t in (one, other)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert one.optimizer.param_groups[0]["lr"] == other.optimizer.param_groups[0]["lr"]
    assert one.schedule.state_dict() == other.schedule.state_dict()
    if one.ema is not None:
        assert all(torch.equal(a, b) for a, b in zip(one.ema.shadow_params, other.ema.shadow_params, strict=True))
    logs = [[(r["step"], r["total"], r["gradient_norm"]) for r in rows(t.folder)] for t in (one, other)]
    assert logs[0] == logs[1]
    assert torch.equal(one.random_state, other.random_state)


def finish(trainer: Trainer) -> Trainer:
    trainer.run()
    trainer.random_state = torch.get_rng_state()
    return trainer


EVERYTHING = {"ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 2, "log_every": 2, "dropout": 0.2}


def with_scaler(trainer: Trainer) -> Trainer:
    """fp16's, which accelerate makes on a GPU alone."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.accelerator._optimizers = [trainer.optimizer]
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
    return trainer
