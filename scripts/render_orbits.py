"""Render orbits of 16 views around meshes or procedural objects, in the training format.

    <out>/<id>_<orbit>/render_0000.webp ... render_0015.webp, meta.json [, depth.npz]
    <out>/train.txt, val.txt, test.txt      ids of the folders that are complete
    <out>/failures.txt                      what could not be rendered, and why (only if anything)

Input is --assets FILE.csv (columns id, split, path; paths relative to the file; get_furniture.py writes
one), --assets FOLDER of mesh files (everything becomes training data), or --procedural N. Finished orbits are
skipped, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ouroboros3d.data.procedural import random_object
from ouroboros3d.data.raycast import (
    DISTANCE,
    FOV_DEGREES,
    AssetError,
    Raycaster,
    load_surface,
    orbit_pose,
)

FRAMES = 16
ELEVATIONS = (-5.0, 30.0)
SPLITS = ("train", "val", "test")
MESH_SUFFIXES = {".obj", ".glb", ".gltf", ".ply", ".stl", ".off"}


@dataclass(frozen=True)
class Asset:
    """Something to render. path: a mesh file, or None for the procedural object number `number`."""

    id: str
    split: str
    path: Path | None
    number: int = 0


@dataclass(frozen=True)
class Settings:
    """size: pixels a side; samples: rays per pixel and axis; depth: pixels a side of depth.npz, 0 = none."""

    out: Path
    size: int
    samples: int
    orbits: int
    depth: int
    seed: int
    up: str


# A backend turns an asset into something with render(c2w, size, samples) and depth(c2w, size), see Raycaster.
Backend = Callable[[Asset, Settings], Raycaster]


def raycast_backend(asset: Asset, settings: Settings) -> Raycaster:
    """The light backend: Embree on the CPU. Raises AssetError."""
    if asset.path is None:
        return Raycaster(random_object(settings.seed, asset.number))
    return Raycaster(load_surface(asset.path, settings.up, max_texture=max(256, 2 * settings.size)))


BACKENDS: dict[str, Backend] = {"raycast": raycast_backend}


def orbit_plan(asset_id: str, orbit: int, seed: int) -> tuple[float, list[np.ndarray]]:
    """Elevation in degrees and the 16 camera-to-world matrices of an orbit, the same on every machine."""
    rng = np.random.default_rng([seed, orbit, zlib.crc32(asset_id.encode())])
    elevation, start = float(rng.uniform(*ELEVATIONS)), float(rng.uniform(0, 360))
    return elevation, [orbit_pose(start + 360 * k / FRAMES, elevation) for k in range(FRAMES)]


def write_orbit(scene: Raycaster, asset: Asset, orbit: int, settings: Settings) -> None:
    """Render one orbit into its folder; the folder appears only when everything in it is complete."""
    final = settings.out / f"{asset.id}_{orbit}"
    folder = settings.out / f".{final.name}.{os.getpid()}.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    elevation, poses = orbit_plan(asset.id, orbit, settings.seed)
    try:
        locations = []
        for k, pose in enumerate(poses):
            name = f"render_{k:04d}.webp"
            image = scene.render(pose, settings.size, settings.samples)
            Image.fromarray(image).save(folder / name, lossless=True, quality=50, method=3)
            locations.append(
                {"index": f"{k:04d}", "frames": [{"name": name}], "transform_matrix": pose.tolist()}
            )
        if settings.depth:
            depth = np.stack([scene.depth(pose, settings.depth) for pose in poses])
            np.savez_compressed(folder / "depth.npz", depth=depth.astype(np.float16))
        meta = {
            "camera_angle_x": float(np.radians(FOV_DEGREES)),
            "distance": DISTANCE,
            "elevation": elevation,
            "seed": settings.seed,
            "source": asset.path.name if asset.path else f"procedural {asset.number}",
            "locations": locations,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def render_asset(asset: Asset, settings: Settings, backend: str) -> tuple[Asset, str | None]:
    """Render the orbits of one asset that are not there yet; returns the asset and the failure, if any."""
    missing = [
        orbit
        for orbit in range(settings.orbits)
        if not (settings.out / f"{asset.id}_{orbit}" / "meta.json").is_file()
    ]
    if not missing:
        return asset, None
    try:
        scene = BACKENDS[backend](asset, settings)
        for orbit in missing:
            write_orbit(scene, asset, orbit, settings)
    except (AssetError, OSError, MemoryError) as error:
        return asset, " ".join(str(error).split()) or type(error).__name__
    return asset, None


def read_assets(path: Path, suffixes: set[str] = MESH_SUFFIXES) -> list[Asset]:
    """Assets of a csv file or of a folder of meshes; raises ValueError or OSError with the reason."""
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
        assets = [Asset(p.stem, "train", p) for p in files]
    else:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and not {"id", "split", "path"} <= rows[0].keys():
            raise ValueError(f"{path}: needs the columns id, split and path")
        assets = [Asset(r["id"], r["split"], path.parent / r["path"]) for r in rows]
    if not assets:
        raise ValueError(f"{path}: no assets ({', '.join(sorted(suffixes))} or rows of a csv file)")
    for asset in assets:
        if asset.split not in SPLITS:
            raise ValueError(f"{path}: '{asset.id}' has split '{asset.split}', not {', '.join(SPLITS)}")
        if Path(asset.id).name != asset.id or asset.id.startswith("."):
            raise ValueError(f"{path}: '{asset.id}' is no name for a folder")
    if len({a.id for a in assets}) < len(assets):
        raise ValueError(f"{path}: an id occurs twice")
    return assets


def procedural_assets(count: int) -> list[Asset]:
    """Numbered procedural objects; every fiftieth is for validation."""
    return [Asset(f"procedural_{i:06d}", "val" if i % 50 == 49 else "train", None, i) for i in range(count)]


def write_lists(assets: list[Asset], failed: set[str], settings: Settings) -> dict[str, int]:
    """Write train.txt, val.txt and test.txt; returns their lengths."""
    counts = {}
    for split in SPLITS:
        ids = [
            f"{a.id}_{k}"
            for a in assets
            if a.split == split and a.id not in failed
            for k in range(settings.orbits)
        ]
        counts[split] = len(ids)
        (settings.out / f"{split}.txt").write_text("".join(i + "\n" for i in ids))
    return counts


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--assets", type=Path, help="csv file (id, split, path) or folder of meshes")
    source.add_argument("--procedural", type=int, metavar="N", help="render N random objects")
    parser.add_argument("--out", type=Path, required=True, help="root folder of the orbits")
    parser.add_argument("--size", type=int, default=512, help="pixels a side (small model: 64)")
    parser.add_argument("--orbits", type=int, default=2, help="orbits per object")
    parser.add_argument("--depth", type=int, default=0, metavar="PIXELS", help="write depth.npz of this size")
    parser.add_argument("--samples", type=int, default=3, help="rays per pixel and axis")
    parser.add_argument("--split", choices=SPLITS, help="render this split only")
    parser.add_argument("--limit", type=int, help="render the first so many objects only")
    parser.add_argument("--seed", type=int, default=0, help="of elevations, azimuths and procedural objects")
    parser.add_argument("--up", choices=("y", "z"), default="y", help="up axis of the mesh files")
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="raycast")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    for name in ("size", "orbits", "samples", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.depth < 0 or args.seed < 0 or (args.procedural is not None and args.procedural < 1):
        parser.error("--depth and --seed must not be negative, --procedural must be at least 1")
    return args


def main() -> int:
    args = parse_arguments()
    try:
        assets = read_assets(args.assets) if args.assets else procedural_assets(args.procedural)
        assets = [a for a in assets if args.split in (None, a.split)][: args.limit]
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        print(f"render_orbits: {error}", file=sys.stderr)
        return 2
    settings = Settings(args.out, args.size, args.samples, args.orbits, args.depth, args.seed, args.up)
    failures = {}
    work = partial(render_asset, settings=settings, backend=args.backend)
    with Pool(args.workers) as pool:
        for asset, failure in tqdm(pool.imap_unordered(work, assets), total=len(assets), unit="object"):
            if failure:
                failures[asset.id] = failure
                tqdm.write(f"{asset.id}: {failure}", file=sys.stderr)
    counts = write_lists(assets, set(failures), settings)
    report = args.out / "failures.txt"
    report.unlink(missing_ok=True)
    if failures:
        report.write_text("".join(f"{k}\t{v}\n" for k, v in sorted(failures.items())))
    print(f"{args.out}: orbits {counts}, {len(failures)} of {len(assets)} objects failed")
    if len(failures) == len(assets):
        print(f"render_orbits: nothing could be rendered, see {report}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
