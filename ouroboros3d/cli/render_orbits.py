"""Renders orbits of 16 views around meshes or procedural objects, in the training format.

    <out>/<id>_<orbit>/render_0000.webp ... render_0015.webp, meta.json [, depth.npz]
    <out>/train.txt, val.txt, test.txt      ids of the complete folders
    <out>/failures.txt                      what could not be rendered, and why (only if there are failures)
    <out>/warnings.txt                      what pictures lack of their files, and why (only if there are warnings)
    <out>/render.json                       the options that all pictures here share; other options are refused

--assets is a folder of meshes, a zip file of one (also .sh3f), a list of paths, or a csv file (columns id, path and
maybe split, paths relative to the file; get_furniture.py writes one). In folders and zip files an id is the path with _
between its parts. Both backends read glb, gltf, obj, ply and stl; light alone reads off, blender alone reads fbx. A
glTF file's default scene is rendered, or its first if it names none.

--stretch 1.4 makes variants to train on: every axis of an object is stretched or shrunk by a random factor of up to
1.4. Another --seed in another --out gives other variants; with --split train none is of a held-out object.

If the list gives no splits, --val_share of the objects go to val.txt and the rest to train.txt. Ids are hashed for
this, so adding objects moves none.

Every object is centred by its bounding box and scaled so that the sphere around it fills --fill of the picture's
width; nothing is cut. --backend light (a plain wheel: embreex) casts rays under a soft sky, two-sided, with textures
but without reflections. --backend blender (the bpy wheel, see ouroboros3d/datagen/blender.py) uses Cycles, for real
data. Both share cameras, normalisation and files. The same --seed gives the same pictures.

The rule: what a file's format defines for static geometry, base colour and emitted light is rendered. Otherwise the
object fails by the feature's name, or it is rendered with a line in warnings.txt and meta.json (a missing texture, for
example); scripts/validate_orbits.py --strict refuses such orbits. The run ends with a table of the features met.
Nothing is ever fetched. These fail: unreadable files, no triangles, more than --max_faces triangles, vertices that are
not numbers, objects that cannot be seen, and renderers that crash. Huge coordinates are normalised in float64; Blender
stores float32, in which a small object far from its file's origin is coarse.

An orbit's folder appears when it is complete, and finished orbits are skipped, so the command can be stopped and
repeated. In a job array, give every job --shard i/n (i from 0) and the same --out. Then run the command once without
--shard: it retries failures and writes the lists. Exit status: 0, or 2 if nothing could be rendered, the input is
unusable or the output cannot be written. Failures of single objects are in failures.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ouroboros3d.camera_defaults import DISTANCE, FOV
from ouroboros3d.cli.options import Parser
from ouroboros3d.datagen.assets import SPLITS, Asset, open_assets
from ouroboros3d.datagen.blender import require_bpy
from ouroboros3d.datagen.orbit_renderer import (
    BACKENDS,
    FILL,
    MAX_FACES,
    SAMPLES,
    Settings,
    is_finished,
    prepare_out,
    render_asset,
    render_set,
    training_orbits,
    write_lists,
)
from ouroboros3d.errors import UserError
from ouroboros3d.files import atomic_path


def procedural_assets(count: int) -> list[Asset]:
    """Numbered procedural objects; every fiftieth is for validation."""
    return [Asset(f"procedural_{i:06d}", "val" if i % 50 == 49 else "train", None, i) for i in range(count)]


def parse_shard(text: str) -> tuple[int, int]:
    """i/n with 0 <= i < n."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not i/n with i from 0 to n - 1, like 0/4")
    return int(match[1]), int(match[2])


def add_render_options(parser: argparse.ArgumentParser) -> None:
    """The options that render_eval.py shares."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="root folder of the orbits")
    add("--size", type=int, default=512, help="pixels per side (%(default)s; small model: 64)")
    add("--depth", type=int, default=0, metavar="PIXELS", help="write depth.npz with maps of this size (0, none)")
    add("--samples", type=int, help="light: rays per pixel and axis (3); blender: paths per pixel (64)")
    fill = "width of the object's sphere, as a share of the picture, in (0, 1] (%(default).3f)"
    add("--fill", type=float, default=FILL, help=fill)
    add("--fov", type=float, default=FOV, help="field of view in degrees, below 180 (%(default)s)")
    add("--distance", type=float, default=DISTANCE, help="camera to origin, in world units (%(default)s)")
    add("--limit", type=int, help="render only the first N objects (all)", metavar="N")
    add("--up", choices=("y", "z"), default="y", help="up axis of the mesh files (%(default)s; fbx files name theirs)")
    add("--backend", choices=sorted(BACKENDS), default="light", help="renderer (%(default)s)")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="where Cycles runs (%(default)s)")
    add("--denoise", action="store_true", help="denoise in Cycles (off: pictures repeat exactly)")
    add("--max_faces", type=int, default=MAX_FACES, metavar="N", help="refuse larger objects: triangles (%(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="worker processes (%(default)s: one per core)")


def make_settings(parser: argparse.ArgumentParser, args: argparse.Namespace, **changes: Any) -> Settings:
    """Settings from add_render_options; what is impossible ends the program with a line."""
    for name in ("size", "orbits", "samples", "workers", "limit", "max_faces"):
        if (getattr(args, name, None) or 1) < 1 or getattr(args, name, None) == 0:
            parser.error(f"--{name} must be at least 1")
    if args.depth < 0:
        parser.error("--depth must not be negative")
    if not 0 < args.fov < 180 or not 0 < args.fill <= 1 or not 0 < args.distance < np.inf:
        parser.error("--fov must lie between 0 and 180, --fill in (0, 1], and --distance be positive")
    if args.backend == "blender":
        require_bpy()
    settings = {field.name: getattr(args, field.name) for field in fields(Settings) if hasattr(args, field.name)}
    settings["samples"] = args.samples or SAMPLES[args.backend]
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    return Settings(**settings, threads=threads, **changes)


def write_sheet(assets: list[Asset], settings: Settings, shard: str, columns: int = 16, view: int = 96) -> None:
    """A contact sheet: frame 0 of every object's first orbit, those with warnings framed; as many as fit a picture."""
    orbits = [settings.out / training_orbits(asset, settings)[0].name for asset in assets]
    orbits = [folder for folder in orbits if is_finished(folder)][: columns * (16_000 // view)]
    if not orbits:
        return
    columns = min(columns, len(orbits))
    sheet = Image.new("RGB", (columns * view, -(-len(orbits) // columns) * view), "white")
    for number, folder in enumerate(orbits):
        place = (number % columns * view, number // columns * view)
        if json.loads((folder / "meta.json").read_text())["warnings"]:
            sheet.paste((235, 140, 0), (*place, place[0] + view, place[1] + view))
            sheet.paste("white", (place[0] + 3, place[1] + 3, place[0] + view - 3, place[1] + view - 3))
        with Image.open(folder / "render_0000.webp") as picture:
            small = picture.convert("RGBA").resize((view, view))
        sheet.paste(small, place, small)
    path = settings.out / f"sheet{shard}.webp"
    with atomic_path(path) as temporary:
        sheet.save(temporary, quality=85)
    print(f"{path}: {len(orbits)} objects")


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--assets", type=Path, help="folder, zip, list or csv file (id, path, split)")
    source.add_argument("--procedural", type=int, metavar="N", help="render N random objects")
    add("--orbits", type=int, default=2, help="orbits per object (%(default)s)")
    share = "share for val.txt if the list gives no splits, in [0, 1); above 0: at least one object (%(default)s)"
    add("--val_share", type=float, default=0.02, metavar="SHARE", help=share)
    add("--split", choices=SPLITS, help="render only this split")
    add("--shard", type=parse_shard, metavar="I/N", help="render every N-th object, starting at I (from 0)")
    add("--sheet", action="store_true", help="write <out>/sheet.webp: one view per object, those with warnings framed")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of elevations, azimuths, noise, stretching and procedural objects (%(default)s)",
    )
    stretch = "stretch each axis of an object by a random factor, at most this or its inverse (1: as it is)"
    add("--stretch", type=float, default=1.0, metavar="FACTOR", help=stretch)
    add_render_options(parser)
    args = parser.parse_args(arguments)
    if args.seed < 0 or (args.procedural is not None and args.procedural < 1):
        parser.error("--seed must not be negative, --procedural must be at least 1")
    if not 0 <= args.val_share < 1:
        parser.error("--val_share must be a share from 0 up to but not including 1")
    if not 1 <= args.stretch <= 10:
        parser.error("--stretch must be a factor from 1 to 10")
    if args.stretch > 1 and (args.procedural or args.backend != "light"):
        parser.error("--stretch is for the meshes of --assets and --backend light")
    settings = make_settings(parser, args)
    if args.procedural and args.backend != "light":
        parser.error("--procedural objects are for --backend light")
    listed = nullcontext(procedural_assets(args.procedural)) if args.procedural else open_assets(args.assets)
    with listed as assets:
        chosen = [a for a in assets if args.split in (None, a.split or "train")][: args.limit]
        shard = ""
        if args.shard:
            chosen = chosen[args.shard[0] :: args.shard[1]]
            shard = ".{}-of-{}".format(*args.shard)
        if not chosen:
            raise UserError(f"{args.assets or args.procedural}: nothing to render in this split or shard")
        prepare_out(settings)
        render_set(chosen, partial(render_asset, settings=settings), settings, args.workers, shard)
    if args.sheet:
        write_sheet(chosen, settings, shard)
    if shard:
        print("after the last shard run the command without --shard: it writes the lists")
        return
    for report in (*settings.out.glob("failures.*-of-*.txt"), *settings.out.glob("warnings.*-of-*.txt")):
        report.unlink()
    print(f"{settings.out}: orbits {write_lists(assets, settings, args.val_share)}")
