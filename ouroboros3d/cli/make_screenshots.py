"""Makes the example page of the recursion player and the pictures of player and app, for README and docs.

    python scripts/make_screenshots.py [--out docs] [--input_img testset/armchair.webp] [key=value ...]

Writes examples/<name>.html, images/player.webp, images/player_phone.webp and images/app.webp, and prints the app's CPU
seconds. Needs Chromium and playwright, and Gradio for the app; --no_app leaves the app out.
"""

from __future__ import annotations

import argparse
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.files import check_writable_dir, locate

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from ouroboros3d.pipeline import Ouroboros3DPipeline

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
PORT = 7897  # of the app whose picture is taken


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ConfigParser(__doc__)
    add = parser.add_argument
    add("--input_img", type=Path, default=locate("testset/armchair.webp"), metavar="FILE")
    add("--elevation", type=float, default=12.0, help="degrees the camera looks down (default: %(default)s)")
    add("--steps", type=int, default=15, help="steps of the loop (default: %(default)s)")
    add("--out", type=Path, default=locate("docs"), metavar="FOLDER", help="output folder (default: docs)")
    add("--no_app", action="store_true", help="make no picture of the app")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    say_loading()
    from ouroboros3d.app.browser import chromium
    from ouroboros3d.config.loading import load_config
    from ouroboros3d.pipeline import Ouroboros3DPipeline

    pages, images = check_writable_dir(options.out / "examples"), check_writable_dir(options.out / "images")
    pipeline = Ouroboros3DPipeline.from_config(load_config(options.config, options.overrides))
    page = pages / f"{options.input_img.stem}.html"
    make_page(pipeline, options, page)
    with chromium() as browser:
        picture_player(browser, page, images)
        if not options.no_app:
            picture_app(browser, pipeline, options, images / "app.webp")
    print(f"wrote {page} ({page.stat().st_size / 1e6:.2f} MB) and pictures in {images}")


def make_page(pipeline: Ouroboros3DPipeline, options: argparse.Namespace, path: Path) -> None:
    """Every step of the loop on one picture, as a page."""
    settings = {"num_inference_steps": options.steps, "elevation": options.elevation, "seed": 0}
    output = pipeline(options.input_img, return_history=True, **settings)
    output[0].save(path, title=options.input_img.stem.replace("_", " ").capitalize())


def picture_player(browser: Browser, page: Path, images: Path) -> None:
    """The page on a desk and on a phone."""
    from ouroboros3d.app.browser import wait_until

    for name, size in (("player", {"viewport": {"width": 1160, "height": 900}}), ("player_phone", PHONE)):
        tab = browser.new_page(**size)
        tab.goto(page.absolute().as_uri())
        wait_until(tab, "window.player")
        tab.evaluate("player.look({azimuth: 20, elevation: 15})")
        save_screenshot(tab, images / f"{name}.webp")
        tab.close()


def picture_app(browser: Browser, pipeline: Ouroboros3DPipeline, options: argparse.Namespace, path: Path) -> None:
    """The app after a run."""
    from ouroboros3d.app.server import serving

    examples = sorted(locate("testset").glob("*.webp"))
    with serving(pipeline, examples, port=PORT) as address:
        tab = browser.new_page(viewport={"width": 1300, "height": 1080})
        tab.set_default_timeout(600_000)
        tab.goto(address)
        tab.wait_for_selector("#generate")
        times = [time.process_time()]  # of the app, which runs in this process; the browser does not
        tab.set_input_files("#picture input[type=file]", str(options.input_img))
        tab.wait_for_selector("button#generate:not([disabled])")
        times.append(time.process_time())
        tab.click("button#generate")
        tab.wait_for_function("document.querySelector('#status').innerText.includes('Done')")
        times.append(time.process_time())
        print(f"app, CPU seconds: cut-out {times[1] - times[0]:.1f}, upload to object {times[2] - times[0]:.1f}")
        save_screenshot(tab, path)
        tab.close()


def save_screenshot(tab: Page, path: Path) -> None:
    tab.wait_for_timeout(1000)  # the last frame and pictures
    Image.open(io.BytesIO(tab.screenshot())).convert("RGB").save(path, quality=88, method=6)
