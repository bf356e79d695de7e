"""Converts a 3D Gaussian .ply to files for viewers and other tools, and checks them on request.

    python scripts/convert.py outputs/chair.ply --to splat spz glb
    python scripts/convert.py outputs/chair.ply --to glb --faces 20000 --texture 1024
    python scripts/convert.py outputs/chair.ply --to mp4 gif --size 256 --frames 60 --fps 20
    python scripts/convert.py outputs/chair.ply --to ply splat spz glb mp4 transforms --check

The files are written beside the .ply unless --out names a folder. docs/formats.md says which way is up in each format.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ouroboros3d import export
from ouroboros3d.cli.options import Parser
from ouroboros3d.errors import UserError


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("input", type=Path, metavar="OBJECT.ply", help="3D Gaussians, from this project or another")
    add("--to", nargs="+", required=True, metavar="FORMAT", help="any of " + ", ".join(export.FORMATS))
    add("--out", type=Path, metavar="FOLDER", help="output folder (default: the input's)")
    add(
        "--up",
        choices=("y", "-y", "z", "-z"),
        help="up axis in the file (default: the one that the format's viewers expect)",
    )
    add(
        "--elevation", type=float, help="degrees the input camera looked down (default: from the .ply's header, else 0)"
    )
    add("--raw", action="store_true", help=".ply: write the release's file, not rotated, quaternions not normalised")
    add("--size", type=int, help="pixels per side of pictures and videos, 2 to 4096 (default: 512)")
    add("--frames", type=int, help="frames per turn of a video, 1 to 3600 (default: 180)")
    add("--fps", type=int, help="frames per second of a video, up to 60 (default: 30)")
    add("--faces", type=int, help="maximum number of faces of a mesh (default: 40000)")
    add("--texture", type=int, help="pixels per side of a mesh's texture; 0: colours at the vertices (default: 0)")
    add("--check", action="store_true", help="reopen every file with another reader and print its PSNR")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    formats = export.check_formats(options.to)
    if not options.input.is_file():
        raise UserError(f"{options.input}: no such file")
    targets = {name: _target(options, export.FORMATS[name]) for name in formats}

    from ouroboros3d.export.object3d import Object3D  # torch takes seconds, which a wrong argument should not
    from ouroboros3d.files import check_writable_dir
    from ouroboros3d.gaussians import load_ply, ply_frame

    gaussians = load_ply(options.input)
    _, elevation = ply_frame(options.input) or (0.0, 0.0)
    elevation = elevation if options.elevation is None else options.elevation
    object3d = Object3D(gaussians, elevation=elevation)
    check_writable_dir(next(iter(targets.values())).parent)
    for name, path in targets.items():
        _convert(object3d, name, path, options)


def _target(options: argparse.Namespace, ending: str) -> Path:
    path = (options.out or options.input.parent) / f"{options.input.stem}{ending}"
    if path.resolve() == options.input.resolve():
        raise UserError(f"{path}: would overwrite the input; name another folder with --out")
    return path


def _convert(object3d, name: str, path: Path, options: argparse.Namespace) -> None:
    """Writes one file and prints its size, the CPU seconds it took and, with --check, its PSNR."""
    ending = export.FORMATS[name]
    chosen = export.options_of(ending, vars(options))
    start = sum(os.times()[:4])  # with those of ffmpeg
    export.save(object3d, path, **chosen)
    line = f"{path}  {_size(path):,} bytes  {sum(os.times()[:4]) - start:.1f} CPU s"
    if options.check and ending != ".html":  # which a test compares in a browser
        from ouroboros3d.export.check import PROOFS, check

        value, proof = check(object3d, path, ending, **chosen), PROOFS[ending]
        line += f"  {value:.1f} dB by {proof.reader} (bound {proof.bound:g} dB)"
    print(line, flush=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
