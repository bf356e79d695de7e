"""From YAML files and `key=value` overrides to a checked Config, and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ouroboros3d.config.checks import check_config
from ouroboros3d.config.schema import Config
from ouroboros3d.errors import ConfigError
from ouroboros3d.files import locate


def load_config(path: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides; checked. A file may name another as `base:`,
    relative to itself. Config files and `data.root` that are not in the working folder are looked up in the repository.
    Raises ConfigError."""
    config = OmegaConf.structured(Config)
    for source, layer in [*_layers(path), *((text, _parse_override(text)) for text in overrides)]:
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {_explain(error)}") from error
    try:
        config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{path}: {_explain(error)}") from error
    config.data.root = str(locate(config.data.root))
    check_config(config)
    return config


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the others, the `section.key=value`s) of a command line, for options that take several values and would
    swallow what follows them."""
    overrides = [text for text in arguments if re.match(r"[a-z]\w*(\.\w+)+=", text)]
    return [text for text in arguments if text not in overrides], overrides


def config_from_dict(values: dict[str, Any]) -> Config:
    """A checked Config from nested dictionaries. Raises ConfigError."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    check_config(config)
    return config


def as_kwargs(config: Any) -> dict[str, Any]:
    """A config dataclass as plain keyword arguments."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def save_config(config: Config | dict, path: str | Path) -> None:
    """As YAML with every key; `config` is one, or a dictionary of parts of one."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _layers(path: str | Path | None) -> list[tuple[Path, DictConfig]]:
    """The YAML files to merge and what they hold, base first."""
    layers: list[tuple[Path, DictConfig]] = []
    while path is not None:
        path = locate(path)
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file")
        try:
            layer = OmegaConf.load(path)
        except Exception as error:  # yaml's own errors have no common useful base
            raise ConfigError(f"{path}: not a YAML mapping: {' '.join(str(error).split())}") from error
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{path}: not a YAML mapping of keys to values")
        base = layer.pop("base", None)
        layers.insert(0, (path, layer))
        if len(layers) > 8:
            raise ConfigError(f"{path}: more than 8 files deep in `base:`, probably a circle")
        path = path.parent / base if base is not None else None
    return layers


def _parse_override(text: str) -> DictConfig:
    """`key=value`, the value in YAML."""
    if "=" not in text:
        raise ConfigError(f"override {text!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:  # yaml's own errors have no common useful base
        raise ConfigError(f"{text}: not of the form key=value: {' '.join(str(error).split())}") from error


def _explain(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    return (f"config key {key}: " if key else "") + str(error).splitlines()[0]


def parse_duration(text: str) -> float:
    """ "90m", "7h", "30s" or plain seconds -> seconds; empty -> 0 (unlimited). Raises ConfigError."""
    if not text:
        return 0.0
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise ConfigError(f"train.time_budget = {text!r}: want a number with s, m or h, such as 90m") from None
