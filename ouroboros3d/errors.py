"""What the user can put right, and how entry scripts say it."""

from __future__ import annotations


class UserError(Exception):
    """The message is one line: what is wrong, and the way out. Entry scripts print it without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message is one line for the user."""
