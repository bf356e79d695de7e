"""What commands share before anything heavy is imported: the parser, names and defaults."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

SMALL_CONFIG = "configs/small.yaml"  # looked up in the repository or the package, see files.locate


class Parser(argparse.ArgumentParser):
    """Shows a module's docstring as it stands, and reports a wrong argument in one line with status 2."""

    def __init__(self, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's, with two liberties.

        Options are spelt with underscores; dashes (`--max-faces`) are accepted. argparse takes the -y of `--up -y` for
        an option; here a choice goes to the option before it.
        """
        joined: list[str] = []
        for argument in sys.argv[1:] if args is None else args:
            argument = re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
            option = self._option_string_actions.get(joined[-1]) if joined else None
            if option is not None and argument.startswith("-") and argument in (option.choices or ()):
                joined[-1] += f"={argument}"
            else:
                joined.append(argument)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows what there is\n")


def process_seconds() -> float:
    """Since this process began, its imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def say_loading() -> None:
    """To be called before torch, diffusers and transformers are imported, which takes seconds."""
    print("loading libraries", file=sys.stderr, flush=True)
