"""What commands share before anything heavy is imported: the parser, names and defaults."""

from __future__ import annotations

import argparse
import sys
import time
from typing import NoReturn

SMALL_CONFIG = "configs/small.yaml"  # looked up in the repository or the package, see files.locate


class Parser(argparse.ArgumentParser):
    """Shows a module's docstring as it stands, and reports a wrong argument in one line with status 2."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows what there is\n")


def process_seconds() -> float:
    """Since this process began, its imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def say_loading() -> None:
    """To be called before torch, diffusers and transformers are imported, which takes seconds."""
    print("loading libraries", file=sys.stderr, flush=True)
