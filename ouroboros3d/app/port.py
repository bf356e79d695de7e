"""Checks that need neither torch nor the weights."""

from __future__ import annotations

import errno
import socket
from importlib.util import find_spec

from ouroboros3d.errors import UserError


class AppError(UserError, RuntimeError):
    """The app cannot start; the message is one line for the user."""


def check_port(host: str, port: int) -> None:
    """Raises AppError if the port is taken."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        why = "is in use; choose another with --port" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
        raise AppError(f"port {port} of {host} {why}") from error


def check_gradio() -> None:
    """Raises AppError without Gradio. It must not be imported before its environment is set."""
    if find_spec("gradio") is None:
        raise AppError('the app needs Gradio; pip install ".[app]" in the clone, or "gradio>=6.31,<7"')
