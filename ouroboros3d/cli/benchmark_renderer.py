"""Times the renderers on random scenes seen by 8 cameras, and prints how they compare.

    python scripts/benchmark_renderer.py [--sizes 4096@64 65536@512] [--backends cpu dense gsplat]

A row is N Gaussians at a size in pixels. Times are milliseconds per view, the best of several repetitions, for the
picture alone and with gradients. The dense oracle is skipped where it would take minutes. On shared cores set
OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

from ouroboros3d.cli.options import Parser, say_loading
from ouroboros3d.errors import UserError


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    sizes = ["512@64", "4096@64", "16384@128", "65536@512"]
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=sizes,
        metavar="N@PIXELS",
        help="Gaussians and pixels per side (default: " + " ".join(sizes) + ")",
    )
    parser.add_argument(
        "--backends", nargs="+", choices=["cpu", "dense", "gsplat"], help="default: all that are installed"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="for each number (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        scenes = [tuple(int(part) for part in text.split("@", 1)) for text in options.sizes]
        if min(min(scene) for scene in scenes) < 1 or {len(scene) for scene in scenes} != {2}:
            raise ValueError
    except ValueError:
        raise UserError(f"--sizes {' '.join(options.sizes)}: want Gaussians@pixels, such as 4096@64") from None
    say_loading()
    from ouroboros3d.rendering.benchmark import compare

    compare(scenes, options.backends, options.seconds)
