"""Headless Chromium, for screenshots and tests of our pages."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ouroboros3d.app.port import AppError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# SwiftShader draws WebGL2 without a GPU; the sandbox does not start for root.
FLAGS = ("--no-sandbox", "--enable-unsafe-swiftshader")


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser. Raises AppError where Chromium or playwright is missing."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None or find_spec("playwright") is None:
        raise AppError("needs Chromium and playwright: apt-get install chromium; pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


def wait_until(tab: Page, expression: str, seconds: float = 120.0) -> None:
    """Returns once the JavaScript `expression` is true in `tab`. Raises TimeoutError after `seconds`.

    playwright's own `wait_for_function` calls eval in the page, which our pages' Content-Security-Policy forbids.
    """
    end = time.monotonic() + seconds
    while not tab.evaluate(f"!!({expression})"):
        if time.monotonic() > end:
            raise TimeoutError(f"{tab.url}: not true after {seconds:g} seconds: {expression}")
        tab.wait_for_timeout(50)
