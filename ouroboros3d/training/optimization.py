"""Optimisers and learning-rate schedules by name, and the watch over the loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

import torch
from torch import nn

from ouroboros3d.config.schema import TrainConfig
from ouroboros3d.errors import ConfigError
from ouroboros3d.training.muon import Muon

MEDIAN_OVER = 100  # steps


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """`train.optimizer` with its settings. Raises ConfigError where it cannot run."""
    settings = {"lr": config.learning_rate, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw_8bit":
        return _eight_bit()(parameters, **settings)
    if config.optimizer == "muon":
        return Muon(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, **({"fused": True} if config.optimizer == "adamw_fused" else {}))


def _eight_bit() -> type[torch.optim.Optimizer]:
    if not torch.cuda.is_available():
        raise ConfigError("train.optimizer = 'adamw_8bit': runs on CUDA alone; choose adamw or adamw_fused")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError("train.optimizer = 'adamw_8bit': needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit


def learning_rate_factor(config: TrainConfig, step: int, budget_used: float = 0.0) -> float:
    """What `train.learning_rate` is multiplied by in step `step`: a linear warm-up, then 1 (constant), a line or half
    a cosine down to 0 at `train.steps` or at the end of the time budget (of which the share `budget_used` is gone),
    whichever comes first."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.schedule == "constant":
        return warm
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    progress = min(max(progress, budget_used, 0.0), 1.0)
    return warm * (1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


class SpikeWatch:
    """Notices a loss that stays above `factor` times the median of the last 100 steps for `steps` steps running.

    Losses in a spike are not part of the median. `factor` 0 never notices anything. The state is two plain values.
    """

    def __init__(self, factor: float, steps: int) -> None:
        self.factor, self.steps = factor, steps
        self.history: list[float] = []
        self.high = 0

    @property
    def median(self) -> float:
        return statistics.median(self.history) if self.history else math.nan

    def spikes(self, loss: float) -> bool:
        """Whether this step's loss completes a spike."""
        if self.factor and len(self.history) >= MEDIAN_OVER // 5 and loss > self.factor * self.median:
            self.high += 1
            if self.high < self.steps:
                return False
            self.high = 0  # reset, so that a resumed run gets its full patience
            return True
        self.high = 0
        self.history = [*self.history[1 - MEDIAN_OVER :], loss]
        return False

    def state(self) -> dict:
        return {"history": self.history, "high": self.high}

    def restore(self, state: dict) -> None:
        self.history, self.high = state["history"], state["high"]
