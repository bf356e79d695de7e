"""Shared by the commands before heavy imports: the parser, names and defaults. Needs no package to import."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ouroboros3d.devices import DTYPE_NAMES, check_device_name, dtype_name
from ouroboros3d.errors import UserError
from ouroboros3d.files import config_beside, locate

SMALL_CONFIG = "configs/small.yaml"  # looked up in the repository or the package, see files.locate
CHECKPOINT = "model.pretrained.checkpoint"


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
        self.config = self.add_argument(flag, default=config, required=config is None, metavar="YAML", help=known)
        self.fallback: str | None = None  # the default of --config where the weights may bring their own
        self.weights: str | None = None  # the default of --ckpt

    def add_checkpoint(self, default: str | None = None, own_config: bool = True) -> None:
        """Adds --ckpt. With `own_config` and without --config the weights' config.yaml counts, as in
        `from_pretrained`."""
        known = "weights: folder, run of train.py, training checkpoint or hub id (default: {})"
        self.add_argument(
            "--ckpt",
            "--checkpoint",
            dest=CHECKPOINT,
            metavar="FOLDER",
            help=known.format(default or "the config's"),
        )
        self.weights = default
        if own_config:
            self.fallback, self.config.default = self.config.default, None
            self.config.help = f"configuration file (default: config.yaml of the weights, else {self.fallback})"

    def add_device(self, dtype: str | None = "sampler.dtype, whose auto is fp16 on cuda, else float32") -> None:
        """Adds --device, which is checked, and --dtype, whose default `dtype` describes; None adds no --dtype."""
        known = "cpu, cuda, cuda:<number> or mps (default: cuda if available, else cpu)"
        self.add_argument("--device", type=check_device_name, help=known)
        if dtype is not None:
            self.add_dtype(f"precision of the networks (default: {dtype})")

    def add_dtype(self, help: str, default: str | None = None) -> None:
        self.add_argument("--dtype", type=dtype_name, choices=DTYPE_NAMES, default=default, help=help)

    def parse_args(self, args: Sequence[str]) -> argparse.Namespace:
        """The options, and in `overrides` the key=value arguments, behind them those that options stand for: whose
        `dest` is a key of the configuration."""
        args, overrides = split_overrides(args)  # taken out first, or an option of several values would swallow them
        defaults = {action.dest: action.default for action in self._actions if "." in action.dest}
        options = super().parse_args(args, argparse.Namespace(**dict.fromkeys(defaults)))
        keys = {key: value for key in defaults if (value := getattr(options, key)) is not None}
        # What an option has by default, a key=value may change.
        defaults = {key: value for key, value in defaults.items() if value is not None}
        start = [f"{CHECKPOINT}={self.weights}"] if self.weights else []
        options.overrides = [*start, *_as_overrides(defaults), *overrides, *_as_overrides(keys)]
        if self.fallback and options.config is None:
            options.config = self.fallback
            named = [text.partition("=")[2] for text in overrides if text.startswith(f"{CHECKPOINT}=")]
            if weights := keys.get(CHECKPOINT) or (named[-1] if named else None):
                found = config_of(weights)
                options.config = found or self.fallback
                options.overrides = [*(_root_for(found, self.fallback) if found else ()), *options.overrides]
                print(f"configuration: {options.config}", file=sys.stderr)
        return options


def _as_overrides(keys: dict[str, object]) -> list[str]:
    from ouroboros3d.config.loading import as_override

    return [as_override(key, value) for key, value in keys.items()]


def refuse_keys(overrides: Sequence[str], advice: dict[str, str]) -> None:
    """Refuses overrides of keys that a command sets itself, with the advice to each. Raises UserError."""
    for text in overrides:
        key = text.partition("=")[0]
        if key in advice:
            raise UserError(f"{text}: this command sets it; {advice[key]}")


def config_of(weights: str) -> str | None:
    """The config.yaml of weights, in a folder or on the hub; None if they have none."""
    found = config_beside(weights)
    if found is None and weights.count("/") == 1 and not locate(weights).exists() and not Path(weights).parent.is_dir():
        from huggingface_hub import hf_hub_download

        with contextlib.suppress(Exception):  # that the weights cannot be fetched is said when they are loaded
            found = hf_hub_download(weights, "config.yaml")
    return None if found is None else str(found)


def _root_for(config: str, fallback: str) -> list[str]:
    """`data.root` of the fallback, as an override, where a configuration says none: that of exported weights."""
    from omegaconf import OmegaConf

    from ouroboros3d.config.loading import as_override, load_config

    try:
        layer = OmegaConf.load(config)
    except Exception:  # load_config says what is wrong with it
        return []
    said = not OmegaConf.is_dict(layer) or "base" in layer or OmegaConf.select(layer, "data.root") is not None
    return [] if said else [as_override("data.root", load_config(fallback).data.root)]


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
