"""Headless Chromium, for screenshots and tests of our pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ouroboros3d.app.port import AppError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
