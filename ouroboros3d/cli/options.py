"""Shared by the commands before heavy imports: the parser, names and defaults. Needs no package to import."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from ouroboros3d.devices import DTYPE_NAMES, check_device_name

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


class ConfigParser(Parser):
    """For commands with a configuration: takes --config and, anywhere, `key=value` arguments."""

    def __init__(self, description: str | None, config: str | None = SMALL_CONFIG, flag: str = "--config") -> None:
        """`config` is the default of --config; None has none."""
        super().__init__(description)
        known = f"configuration file (default: {config})" if config else "configuration file"
        self.add_argument(flag, default=config, required=config is None, metavar="YAML", help=known)

    def add_checkpoint(self, help: str = "weights (default: the config's)", **options: Any) -> None:
        dest = "model.pretrained.checkpoint"
        self.add_argument("--ckpt", "--checkpoint", dest=dest, metavar="FOLDER", help=help, **options)

    def add_device(self, dtype: str | None = "sampler.dtype, whose auto is fp16 on cuda, else float32") -> None:
        """Adds --device, which is checked, and --dtype, whose default `dtype` describes; None adds no --dtype."""
        known = "cpu, cuda, cuda:<number> or mps (default: cuda if available, else cpu)"
        self.add_argument("--device", type=check_device_name, help=known)
        if dtype is not None:
            self.add_argument("--dtype", choices=DTYPE_NAMES, help=f"precision of the networks (default: {dtype})")

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:
        """The options, and in `overrides` the key=value arguments, behind them those that options stand for: whose
        `dest` is a key of the configuration."""
        args, overrides = split_overrides(args)  # taken out first, or an option of several values would swallow them
        options = super().parse_args(args)
        keys = {key: value for key, value in vars(options).items() if "." in key and value is not None}
        options.overrides = overrides + [f"{key}={json.dumps(value)}" for key, value in keys.items()]
        return options


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the others, the `key=value`s) of a command line, for options that take several values and would swallow what
    follows them. A file of such a name is no override."""
    overrides = [text for text in arguments if re.match(r"[a-z]\w*(\.\w+)*=", text) and not os.path.exists(text)]
    return [text for text in arguments if text not in overrides], overrides


def process_seconds() -> float:
    """Since this process began, its imports included."""
    import psutil

    return time.time() - psutil.Process().create_time()


def say_loading() -> None:
    """To be called before torch, diffusers and transformers are imported, which takes seconds."""
    print("loading libraries", file=sys.stderr, flush=True)
