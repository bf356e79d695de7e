"""What the user can put right, and how entry scripts say it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """The message is one line: what is wrong, and the way out. Entry scripts print it without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message is one line for the user."""


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """`main` as a command: returns its exit status (None is 0), or 2 after a UserError, which is one line on stderr."""

    @functools.wraps(main)
    def cli(*arguments, **options) -> int:
        try:
            return main(*arguments, **options) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return cli
