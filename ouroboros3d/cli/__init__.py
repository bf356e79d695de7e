"""The commands: one module per entry point, each with a `main(arguments)`.

`run` is the only way in: of the doors at the top and in scripts/, and of the installed command `ouroboros3d`.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from ouroboros3d.errors import UserError


def run(name: str) -> NoReturn:
    """Runs the command of this name (or module) with the process's arguments, and exits with its status."""
    module = importlib.import_module(name if "." in name else f"ouroboros3d.cli.{name}")
    sys.exit(call(module.main, sys.argv[1:]))


def call(main: Callable[..., int | None], *arguments, **options) -> int:
    """The status of a command: what it returns (None is 0); 2 after a UserError, which is one line on stderr; 130
    and 143 when Ctrl-C or SIGTERM stopped it, so that a script of several stages stops too."""

    def terminated(*_) -> NoReturn:
        raise SystemExit(143)  # unwinds, so that temporary files are removed

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        return main(*arguments, **options) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it can", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
