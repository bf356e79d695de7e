"""Orbits for the tests: what is rendered to them, and a dataset of them."""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli import call, render_orbits
from ouroboros3d.config.schema import Config
from ouroboros3d.data.orbits import OrbitDataset
from ouroboros3d.datagen import procedural

QUICK = ("--size", 16, "--orbits", 1, "--samples", 1, "--workers", 1)
SQUARE = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"  # of an .obj file, without faces


def run(*arguments) -> int:
    """scripts/render_orbits.py: its status."""
    return call(render_orbits.main, [str(a) for a in arguments])


def box_file(folder: Path) -> Path:
    """box.obj and box.mtl: 0.4 x 0.6 x 0.8, red above (+y in the file) and blue below."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "box.mtl").write_text("newmtl red\nKd 1 0 0\nnewmtl blue\nKd 0 0 1\n")
    text, (corners, faces, _) = "mtllib box.mtl\n", procedural.box()
    for half, (name, middle) in enumerate((("red", 0.2), ("blue", -0.2))):
        text += "".join("v {} {} {}\n".format(*row) for row in corners * [0.2, 0.2, 0.3] + [0, middle, 0])
        text += f"usemtl {name}\n" + "".join("f {} {} {}\n".format(*row) for row in faces + 1 + half * len(corners))
    (folder / "box.obj").write_text(text)
    return folder / "box.obj"


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
