"""Renders an evaluation set by one protocol: an input view, a ground-truth orbit of 16 views, and surface points.

    python scripts/render_eval.py --assets GSO_FOLDER --up z --objects 100 --out data/eval_gso
    python scripts/render_eval.py --assets data/furniture/assets.csv --out data/eval_furniture

    <out>/<id>/render_0000.webp ... meta.json     an orbit in the training format; frame 0 is the input view
    <out>/<id>/condition.png                      frame 0 as RGBA, for programs that take a picture
    <out>/<id>/points.npz                         `points` [16384, 3] float32, the true surface in the world frame
    <out>/test.txt                                ids that are complete;  objects.txt: ids that were chosen
    <out>/cameras.json                            the 16 cameras, the same for every object
    <out>/protocol.json                           every choice below, in numbers
    <out>/failures.txt, warnings.txt, render.json as in scripts/render_orbits.py

The paper (Ouroboros3D, Sec. 4) scores 100 objects of Google Scanned Objects on rendered 512-pixel orbits,
and says no more. The open choices are made as follows:

- Objects: the paper does not list its 100. --objects N takes the N ids with the smallest SHA-256, so everyone with
  the whole set gets the same; --list FILE takes the ids in a file, such as the objects.txt of another run. A csv file
  with splits gives its test objects: the furniture test split is this project's own evaluation set.
- Elevation 0 (--elevation): the release's inference orbit has it, so a method needs no more than the picture.
- First azimuth -90 degrees (--azimuth): the camera sees the side that faces +z in y-up files, their front by glTF's
  convention, and -y in z-up files, their front in most modelling programs. Scans have no stated front. It is
  the same for all objects, as nothing here is random.
- Orbit: 16 frames, 22.5 degrees apart, as in training. The release's 8 views are frames 0, 2, ..., 12, 15 of it and
  the paper's every second one, so both can be scored on the same files.
- Camera: the release's field of view and distance (39.598 degrees, 1.7417). Frames are RGBA, nothing is composited;
  the paper's scores are on white.
- Scale: centred by the bounding box, and scaled to the training set's size (--fill); `normalisation` in meta.json says
  how: world = scale * (file, turned to z up, - centre). Predictions are compared in this frame without fitting.
- Points: spread evenly over that part of the surface which is seen from at least one of 64 directions all around, since
  no picture shows the inside of a model.

Google Scanned Objects come as <name>/meshes/model.obj with their texture in <name>/materials/textures; the ids are
<name>, and the files are z up. Downloading them is left to you.
"""

from __future__ import annotations

import csv
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ouroboros3d.cli.options import Parser
from ouroboros3d.cli.render_orbits import add_render_options, make_settings
from ouroboros3d.datagen.assets import Asset, hash_position, open_assets
from ouroboros3d.datagen.orbit_renderer import (
    FRAMES,
    OpenAsset,
    Orbit,
    Settings,
    is_finished,
    prepare_out,
    render_asset,
    render_set,
)
from ouroboros3d.datagen.raycast import Raycaster
from ouroboros3d.datagen.surface import Surface
from ouroboros3d.errors import UserError
from ouroboros3d.files import read_list, write_json, write_lines

POINTS = 16384
DIRECTIONS = 64


def choose(assets: list[Asset], count: int | None, ids: list[str] | None) -> list[Asset]:
    """The assets of these ids, in that order, or the `count` with the smallest hash, or all. Raises UserError."""
    if ids is not None:
        by_id = {asset.id: asset for asset in assets}
        lost = [i for i in ids if i not in by_id]
        if lost:
            raise UserError(f"--list: {len(lost)} ids are not among the assets, the first is '{lost[0]}'")
        return [by_id[i] for i in dict.fromkeys(ids)]
    if count is None:
        return assets
    if count > len(assets):
        raise UserError(f"--objects {count}: there are only {len(assets)}; choose fewer or give the whole set")
    return sorted(assets, key=lambda asset: hash_position(asset.id))[:count]


def protocol_orbit(asset: Asset, _settings: Settings, azimuth: float, elevation: float) -> list[Orbit]:
    """The one orbit of an object, in a folder with its id."""
    return [Orbit(asset.id, azimuth, elevation)]


def visible_points(surface: Surface, count: int, seed: int) -> np.ndarray:
    """Points [count, 3] spread evenly over what can be seen of a surface from outside."""
    rng, caster, found = np.random.default_rng(seed), Raycaster(surface), []
    k = np.arange(DIRECTIONS) + 0.5  # a spiral from pole to pole
    z, turn = 1 - 2 * k / DIRECTIONS, np.pi * (1 + np.sqrt(5)) * k
    around = np.stack([np.sqrt(1 - z**2) * np.cos(turn), np.sqrt(1 - z**2) * np.sin(turn), z], -1)
    for _ in range(16):  # models whose outside is less than a sixteenth of them make do with points twice
        points = surface.sample(count, rng)
        seen = np.zeros(count, bool)
        for toward in around:
            hidden = np.flatnonzero(~seen)
            rays = np.broadcast_to(toward, (len(hidden), 3))
            seen[hidden] = ~caster.blocked(points[hidden] + 1e-4 * toward, rays)
        found.append(points[seen])
        if sum(map(len, found)) >= count:
            break
    points = np.concatenate(found)
    if not len(points):
        points = surface.sample(count, rng)
    return np.resize(points, (count, 3)).astype(np.float32)


def add_truth(folder: Path, opened: OpenAsset) -> None:
    """The input picture and the surface points of an orbit's folder."""
    with Image.open(folder / "render_0000.webp") as picture:
        picture.save(folder / "condition.png")
    points = visible_points(opened.scene.surface, POINTS, zlib.crc32(opened.asset.id.encode()))
    np.savez(folder / "points.npz", points=points)


def write_protocol(settings: Settings, orbit: Orbit, chosen: list[Asset]) -> None:
    """cameras.json, protocol.json and objects.txt."""
    focal = 0.5 / np.tan(np.radians(settings.fov / 2))
    cameras = {
        "camera_angle_x": float(np.radians(settings.fov)),
        "intrinsics_in_image_widths": [[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1]],
        "axes": "camera to world, OpenGL (x right, y up, looking along -z), world z up",
        "frames": [
            {
                "name": f"render_{k:04d}.webp",
                "azimuth": (orbit.azimuth + 360 * k / FRAMES) % 360,
                "elevation": orbit.elevation,
                "transform_matrix": pose.tolist(),
            }
            for k, pose in enumerate(orbit.poses(settings.distance))
        ],
    }
    protocol = {
        **settings.shared(),
        "frames": FRAMES,
        "input_frame": 0,
        "azimuth": orbit.azimuth,
        "elevation": orbit.elevation,
        "release_frames": [0, 2, 4, 6, 8, 10, 12, 15],
        "object_radius": settings.radius,
        "points": POINTS,
        "point_directions": DIRECTIONS,
        "objects": len(chosen),
    }
    write_json(settings.out / "cameras.json", cameras)
    write_json(settings.out / "protocol.json", protocol)
    write_lines(settings.out / "objects.txt", [asset.id for asset in chosen])


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--assets", type=Path, required=True, help="folder, zip, list, or csv file (its test split)")
    add("--objects", type=int, metavar="N", help="render N objects, chosen by hash (default: all)")
    add("--list", type=Path, help="file with the ids to render, one per line")
    add("--elevation", type=float, default=0.0, help="elevation of all views, in degrees (%(default)s)")
    add("--azimuth", type=float, default=-90.0, help="azimuth of the input view, in degrees (%(default)s)")
    add_render_options(parser)
    args = parser.parse_args(arguments)
    if not -90 < args.elevation < 90 or not -360 <= args.azimuth <= 360:
        parser.error("--elevation must lie between -90 and 90, --azimuth within a turn")
    if args.objects is not None and (args.objects < 1 or args.list):
        parser.error("--objects must be at least 1, and does not go with --list")
    settings = make_settings(parser, args, orbits=1)
    with open_assets(args.assets, split="test") as assets:
        try:
            ids = [name for name in read_list(args.list) if name] if args.list else None
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{args.list}: cannot be read ({error})") from error
        chosen = choose([a for a in assets if a.split == "test"], args.objects, ids)[: args.limit]
        if not chosen:
            raise UserError(f"{args.assets}: holds no test objects")
        prepare_out(settings, azimuth=args.azimuth, elevation=args.elevation)
        write_protocol(settings, Orbit("", args.azimuth, args.elevation), chosen)
        plan = partial(protocol_orbit, azimuth=args.azimuth, elevation=args.elevation)
        work = partial(render_asset, settings=settings, plan=plan, finish=add_truth)
        render_set(chosen, work, settings, args.workers)
    finished = [asset.id for asset in chosen if is_finished(settings.out / asset.id)]
    write_lines(settings.out / "test.txt", finished)
    print(f"{settings.out}: {len(finished)} objects in test.txt")
