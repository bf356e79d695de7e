"""Which samples make which step: depends only on the seed, not on the number of processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset

from ouroboros3d.config.schema import TrainConfig

Key = tuple[int, int, int]  # global sample number, epoch, index into the dataset


class Stream(Dataset):
    """The training set as the trainer addresses it: one key per sample, over all epochs."""

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
