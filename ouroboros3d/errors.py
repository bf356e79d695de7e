"""Errors that the user can fix, and how the commands report them."""

from __future__ import annotations


class UserError(Exception):
    """The message is one line: what is wrong, and the way out. Entry scripts print it without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message is one line for the user."""


def one_line(error: BaseException) -> str:
    """What a foreign error says, in one line of at most 200 characters; the system's errors without their number."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:200] or type(error).__name__
