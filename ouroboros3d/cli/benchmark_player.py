"""Measures the recursion player in headless Chromium: size of the page, time until it shows, time per frame.

    python scripts/benchmark_player.py [--gaussians 1408 65536] [--steps 25]

Frames are drawn at 512 x 512 pixels, each from a new direction, so each is sorted again. Without a GPU, SwiftShader
draws on the CPU; then only the sorting times carry over to other machines.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ouroboros3d.cli.options import Parser, say_loading

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from ouroboros3d.export.object3d import Object3D


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    counts = {"type": int, "nargs": "+", "default": [1408, 65536]}
    parser.add_argument("--gaussians", **counts, help="Gaussians per step (default: 1408 and 65536)")
    parser.add_argument("--steps", type=int, default=25, help="steps of the page (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    say_loading()
    from ouroboros3d.app.browser import chromium

    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        for count in options.gaussians:
            path = Path(folder) / f"{count}.html"
            shells(count, options.steps).save(path)
            numbers = measure(browser, path)
            print(
                f"{count:,} Gaussians, {options.steps} steps: {path.stat().st_size / 1e6:.2f} MB, "
                f"ready {numbers['ready']:.0f} ms, sort {numbers['sort']:.1f} ms, frame {numbers['frame']:.1f} ms"
            )


def measure(browser: Browser, page: Path) -> dict[str, float]:
    """Milliseconds: `ready` from navigation to the first step, `sort` and `frame` (sort and drawing), medians."""
    from ouroboros3d.app.browser import wait_until

    tab = browser.new_page()
    tab.set_default_timeout(300_000)
    tab.goto(page.as_uri())
    wait_until(tab, "window.player", seconds=300)
    numbers = tab.evaluate("({ready: performance.now(), ...player.time(21, 512)})")
    tab.close()
    return numbers


def shells(count: int, steps: int) -> Object3D:
    """A closed surface of small Gaussians that changes over the steps."""
    import torch

    from ouroboros3d.export.object3d import Object3D, Step3D
    from ouroboros3d.gaussians import Gaussians

    g = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(1, count, 3, generator=g), dim=-1)
    quats = torch.nn.functional.normalize(torch.randn(1, count, 4, generator=g), dim=-1)
    scales = 0.6 * (0.5 + torch.rand(1, count, 3, generator=g)) / count**0.5
    history = []
    for i in range(steps):
        means = direction * (0.3 + 0.15 * torch.sin(6 * direction[..., :1] + 0.2 * i))
        gaussians = Gaussians(means, quats, scales, torch.full((1, count), 0.9), direction / 2 + 0.5)
        history.append(Step3D(i, steps, float(steps - i), gaussians, torch.ones(8, 3, 64, 64), {}))
    return Object3D(gaussians, history=tuple(history))
