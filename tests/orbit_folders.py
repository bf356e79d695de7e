"""Orbits for the tests: a folder of pictures in which every pixel tells where it is from, and a dataset of it."""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.config.schema import Config
from ouroboros3d.data.orbits import OrbitDataset


def orbit_dataset(
    root: str | Path,
    list_file: str = "train.txt",
    size: int = 512,
    num_views: int = 8,
    frames: int = 16,
    view_selection: str = "release",
    extra_views: int = 0,
    seed: int = 0,
    start_view: int | None = None,
    **data,
) -> OrbitDataset:
    """The defaults with these settings; `data` are keys of the configuration's section of that name. Unchecked."""
    config = Config()
    config.model.image_size, config.model.conventions.view_selection = size, view_selection
    config.cameras.num_views, config.cameras.orbit_frames = num_views, frames
    config.objective.extra_views, config.train.seed = extra_views, seed
    for key, value in {"root": str(root), "workers": 0, **data}.items():
        setattr(config.data, key, value)
    return OrbitDataset(config, list_file, start_view)
