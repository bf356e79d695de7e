"""The training and validation orbits of a configuration."""

from __future__ import annotations

from dataclasses import replace

from ouroboros3d.config.schema import Config
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.errors import ConfigError


def build_dataset(config: Config, split: str) -> OrbitDataset:
    """The "train" or "val" orbits. Validation draws nothing: frame 0 is the condition view, the background is that of
    the renderer; and it replaces no damaged orbit, whose scores would be another's."""
    if split == "train":
        return OrbitDataset(config, config.data.train)
    colour = "white" if config.data.background == "random" else config.data.background
    still = {"background": colour, "mirror": False, "color_jitter": 0.0, "max_damaged": 0.0, "depth": False}
    data, objective = replace(config.data, **still), replace(config.objective, extra_views=0)
    return OrbitDataset(replace(config, data=data, objective=objective), data.val, start_view=0)


def check_split(train: OrbitDataset, val: OrbitDataset, config: Config) -> None:
    """Refuses validation on what is trained on. Raises ConfigError with some of the ids."""
    shared = sorted(set(train.ids) & set(val.ids))
    if shared:
        some = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise ConfigError(
            f"data.val = {config.data.val}: {len(shared)} of its {len(val)} objects are in data.train = "
            f"{config.data.train} too ({some}); take them out of one of the lists"
        )


def worker_bytes(config: Config) -> int:
    """Of shared memory that one process's data workers fill: two batches each, pictures with alpha in float32."""
    views = config.cameras.num_views + config.objective.extra_views
    sample = views * 4 * config.model.image_size**2 * 4
    return config.data.workers * 2 * config.train.batch_size * sample
