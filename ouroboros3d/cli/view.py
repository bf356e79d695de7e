"""Shows a 3D Gaussian .ply in the browser: writes the player, one self-contained HTML file, and opens it.

    ouroboros3d view outputs/armchair.ply
    python scripts/view.py scene.ply --up y --out scene.html --no_open

Files of this project say in their header which way is up. For others y is taken as down, as in most splat viewers; the
release's own files need --up y. Higher spherical harmonics are ignored.
"""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from ouroboros3d.cli.options import Parser

if TYPE_CHECKING:
    from ouroboros3d.gaussians import Gaussians

UPS = ("y", "-y", "z", "-z")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.ply", help="3D Gaussians in the 3DGS format")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="page to write (default: FILE.html beside the .ply)"
    )
    parser.add_argument("--up", choices=UPS, help="axis that points up in the file (default: from its header, else -y)")
    parser.add_argument("--no_open", action="store_true", help="write the page and do not open a browser")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    from ouroboros3d.export.object3d import Object3D

    out = options.out or options.file.with_suffix(".html")
    gaussians, elevation = load_upright(options.file, options.up)
    count = f"{gaussians.means.shape[1]:,} Gaussians of {options.file.name}. Drag to turn, pinch or scroll to zoom."
    Object3D(gaussians, elevation).save(out, title=options.file.stem, about=count)
    print(out)
    if not options.no_open:
        webbrowser.open(out.resolve().as_uri())


def load_upright(path: Path, up: str | None) -> tuple[Gaussians, float]:
    """(Gaussians with y up, degrees by which the object leans towards +z). Raises PlyError."""
    from ouroboros3d.export.frames import UPS as TURNS
    from ouroboros3d.export.frames import unit_quaternions
    from ouroboros3d.gaussians import load_ply, ply_frame

    gaussians, frame = load_ply(path), ply_frame(path)
    if up is None and frame is not None:
        return gaussians, frame[1]
    turn = 0.0 if frame is None else frame[0]
    return unit_quaternions(gaussians).turned(turn - TURNS[up or "-y"]), 0.0
