"""The training and validation orbits of a configuration."""

from __future__ import annotations

from ouroboros3d.config.schema import BACKGROUNDS, Config
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.errors import ConfigError


def build_dataset(config: Config, split: str) -> OrbitDataset:
    """The "train" or "val" orbits. Validation draws nothing: frame 0 is the condition view, the background is that of
    the renderer; and it replaces no damaged orbit, whose scores would be another's."""
    train, data = split == "train", config.data
    return OrbitDataset(
        data.root,
        data.train if train else data.val,
        size=config.model.image_size,
        num_views=config.cameras.num_views,
        view_selection=config.model.conventions.view_selection,
        background=data.background if train else BACKGROUNDS[data.background],
        start_view=None if train else 0,
        mirror=data.mirror and train,
        color_jitter=data.color_jitter if train else 0.0,
        cache=data.cache,
        cache_dir=data.cache_dir,
        cache_workers=data.workers,
        max_damaged=data.max_damaged if train else 0.0,
        load_alpha=True,
        load_depth=data.depth and train,
        extra_views=config.objective.extra_views if train else 0,
        frames=config.cameras.orbit_frames,
        seed=config.train.seed,
    )


def check_split(train: OrbitDataset, val: OrbitDataset, config: Config) -> None:
    """Refuses validation on what is trained on. Raises ConfigError with some of the ids."""
    shared = sorted(set(train.ids) & set(val.ids))
    if shared:
        some = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        raise ConfigError(
            f"data.val = {config.data.val}: {len(shared)} of its {len(val)} objects are in data.train = "
            f"{config.data.train} too ({some}); take them out of one of the lists"
        )
