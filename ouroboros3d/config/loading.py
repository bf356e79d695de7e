"""From YAML files and `key=value` overrides to a checked Config, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ouroboros3d.config.checks import check_config
from ouroboros3d.config.schema import Config, ModelConfig, SamplerConfig
from ouroboros3d.devices import dtype_name
from ouroboros3d.errors import ConfigError, one_line
from ouroboros3d.files import is_remote, locate, write_whole

# Keys that configurations of older code set, and what they follow from now: accepted where they say the same.
DERIVED: dict[str, Callable[[ModelConfig], int]] = {
    "model.multiview.unet.in_channels": lambda model: 2 * model.vae.latent_channels,
    "model.multiview.unet.out_channels": lambda model: model.vae.latent_channels,
    "model.multiview.unet.cross_attention_dim": lambda model: model.image_encoder.projection_dim,
    "model.multiview.unet.projection_class_embeddings_input_dim": lambda model: (
        3 * model.multiview.unet.addition_time_embed_dim
    ),
    "model.multiview.adapter.downscale": lambda model: model.vae.downscale,
    "model.lgm.splat_size": lambda model: model.lgm.splat_size,
}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file, then `key=value` overrides; checked. A file may name another as `base:`,
    relative to itself; the preset that `sampler.preset` names comes between the bases and the file. Config files and
    `data.root` that are not in the working folder are looked up in the repository. Raises ConfigError."""
    files, flags = _layers(path), [(text, _parse_override(text)) for text in overrides]
    preset = _preset_layer([*files, *flags])
    config = _merge([*files[:-1], preset, *files[-1:], *flags])
    _check_preset(config, *preset)
    _check_parts(config, [layer for _, layer in flags])
    if not is_remote(config.data.root):
        config.data.root = str(locate(config.data.root))
    return config


def check_lists(config: Config, *names: str) -> None:
    """Refuses lists of orbits that are not in `data.root`, before anything heavy is imported. Raises ConfigError."""
    for path in (Path(config.data.root) / name for name in names):
        if not path.is_file() and not is_remote(config.data.root):
            hint = "check data.root and the list's name, or render orbits with scripts/render_orbits.py"
            raise ConfigError(f"{path}: no such {'file' if path.parent.is_dir() else 'folder'}; {hint}")


def _preset_layer(layers: Sequence[tuple[str | Path, DictConfig]]) -> tuple[Path, DictConfig]:
    """The file of the preset that the last of these layers to name one names."""
    names = [_written(layer, "sampler.preset") for _, layer in layers]
    name = next((n for n in reversed(names) if n is not None), "exact")
    path = locate(f"configs/presets/{name}.yaml")
    # An unknown name is refused by the type of its key, with the names there are.
    return path, OmegaConf.merge(*(layer for _, layer in _layers(path))) if path.is_file() else OmegaConf.create()


def _check_preset(config: Config, path: Path, layer: DictConfig) -> None:
    """Refuses a preset of which nothing is left."""
    wanted = {k: v for k, v in OmegaConf.to_container(layer).get("sampler", {}).items() if k != "preset"}
    if wanted and all(getattr(config.sampler, key) != value for key, value in wanted.items()):
        raise ConfigError(
            f"sampler.preset = {path.stem!r}: the configuration sets every key of the preset to something else; name "
            f"the keys of {path.name} as key=value instead"
        )


def _check_parts(config: Config, overrides: Sequence[DictConfig]) -> None:
    """Refuses an override that names a file for a part which the checkpoint brings: the checkpoint's is what counts. In
    YAML files both may stand, since those of a stage name what it started from."""
    pretrained = config.model.pretrained
    checkpoint = pretrained.checkpoint
    for part in ("unet", "lgm", "vae", "image_encoder") if checkpoint is not None else ():
        file, named = getattr(pretrained, part), [_written(layer, f"model.pretrained.{part}") for layer in overrides]
        if file is None or file not in named:
            continue
        # As build_models and find_weights look: files, or a folder per part, also those of a run.
        places = [f"{run}{end}" for run in ("", "export/", "best/") for end in (f"{part}.*", f"{part}/*")]
        if part in ("unet", "lgm") or any(path for place in places for path in locate(checkpoint).glob(place)):
            raise ConfigError(
                f"model.pretrained.{part} = {file!r}: is not read, because model.pretrained.checkpoint = "
                f"{checkpoint!r} brings its own; name a folder with this file, or set the checkpoint to null and name "
                "every part"
            )


def config_from_dict(values: dict[str, Any]) -> Config:
    """A checked Config from nested dictionaries. Raises ConfigError."""
    return _merge([("", OmegaConf.create(values))])


def _merge(layers: Sequence[tuple[str | Path, DictConfig]]) -> Config:
    """The defaults with these on top, checked; each comes with the source that errors name."""
    config, derived = OmegaConf.structured(Config), {}
    for source, layer in layers:
        derived |= _take_derived(layer)
        _spell_precisions(layer)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, source)) from error
    try:
        config = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere; which layer has it is not known
        raise ConfigError(_explain(error, "")) from error
    check_config(config)
    for key, value in derived.items():
        if value != (want := DERIVED[key](config.model)):
            raise ConfigError(f"{key} = {value!r}: follows from other keys, which give {want}; leave it out")
    return config


def _take_derived(layer: DictConfig) -> dict[str, Any]:
    """Removes the keys of DERIVED from a layer; returns their values."""
    values = {}
    for key in DERIVED:
        parent, _, name = key.rpartition(".")
        node = _written(layer, parent)
        if isinstance(node, DictConfig) and name in node:
            values[key] = node.pop(name)
    return values


def _written(layer: DictConfig, key: str) -> Any:
    """What a layer by itself says of a key; None where it says nothing, refers to another layer or is of another shape,
    which merging it refuses by name."""
    try:
        return OmegaConf.select(layer, key)
    except OmegaConfBaseException:
        return None


def _spell_precisions(layer: DictConfig) -> None:
    """A precision by any of its names, in the one that each key knows."""
    for key, float32 in (("sampler.dtype", "float32"), ("train.mixed_precision", "fp32")):
        if isinstance(name := _written(layer, key), str):
            name = dtype_name(name)
            OmegaConf.update(layer, key, float32 if name == "float32" else name)


def as_kwargs(config: Any) -> dict[str, Any]:
    """A config dataclass as plain keyword arguments."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def flatten_keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 4}} as {"train.steps": 4}."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flatten_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return result


def save_config(config: Config | dict, path: str | Path) -> None:
    """As YAML with every key; `config` is one, or a dictionary of parts of one."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def save_model_config(config: Config, path: str | Path) -> None:
    """What belongs to a model's weights, as YAML: dimensions, sampling, cameras and background; not where weights lay.
    Of sampling only what differs from the defaults, so that a preset can still set the rest. `load_config` reads it."""
    parts = {name: as_kwargs(getattr(config, name)) for name in ("model", "sampler", "cameras", "turntable")}
    del parts["model"]["pretrained"]
    usual = as_kwargs(SamplerConfig())
    parts["sampler"] = {key: value for key, value in parts["sampler"].items() if value != usual[key]}
    write_whole(path, OmegaConf.to_yaml({**parts, "data": {"background": config.data.background}}))


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
            raise ConfigError(f"{path}: not a YAML mapping: {one_line(error)}") from error
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{path}: not a YAML mapping of keys to values")
        base = layer.pop("base", None)
        _forget_defaults(layer)
        layers.insert(0, (path, layer))
        if len(layers) > 8:
            raise ConfigError(f"{path}: more than 8 files deep in `base:`, probably a circle")
        path = path.parent / base if base is not None else None
    return layers


def _forget_defaults(layer: DictConfig) -> None:
    """Of a file with every key of the sampler, as `save_config` writes them: those with default values leave room for
    a preset."""
    usual, sampler = as_kwargs(SamplerConfig()), layer.get("sampler")
    if isinstance(sampler, DictConfig) and usual.keys() <= sampler.keys():
        for key in [key for key, value in OmegaConf.to_container(sampler).items() if value == usual.get(key, ...)]:
            del sampler[key]


def as_override(key: str, value: Any) -> str:
    """`key=value` whose value, JSON's or a path, is read back as it is, whatever signs it has."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # YAML has no surrogate pairs
    return f"{key}=" + text.replace("${", r"\\${")  # else it would refer to another key


def _parse_override(text: str) -> DictConfig:
    """`key=value`, the value in YAML. Nothing behind the sign means empty for text, null for what may be null."""
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"override {text!r} is not of the form key=value")
    try:
        layer = OmegaConf.from_dotlist([text])
        if not value and _type_of(key) is str:
            OmegaConf.update(layer, key, "")
        return layer
    except Exception as error:  # yaml's own errors have no common useful base
        raise ConfigError(f"{text}: not of the form key=value: {one_line(error)}") from error


def _type_of(key: str) -> Any:
    """The annotated type of a dotted key; None if there is no such key."""
    kind: Any = Config
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def _explain(error: OmegaConfBaseException, source: str | Path) -> str:
    """One line: the file, the key, the value and what would be right."""
    key = getattr(error, "full_key", None) or getattr(error, "key", None)
    value, what = getattr(error, "value", None), str(error).splitlines()[0]
    if "is not a ListConfig" in what:
        default = OmegaConf.select(OmegaConf.structured(Config), key) or []
        right = [*default[:-1], value] if len(default) == 2 else [value]
        what = f"is a list: write [{','.join(f'{x:g}' if isinstance(x, float) else str(x) for x in right)}]"
    elif ", expected one of " in what:
        choices = what.partition(", expected one of ")[2]
        what = f"must be one of {choices.strip('[]').replace(chr(39), '')}"
    text = what if key is None else f"{key}: {what}" if value is None else f"{key} = {value!r}: {what}"
    return f"{source}: {text}" if isinstance(source, Path) or (source and key is None) else text


def parse_duration(text: str) -> float:
    """ "90m", "7h", "30s" or plain seconds -> seconds; empty -> 0 (unlimited). Raises ConfigError."""
    if not text:
        return 0.0
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1])
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise ConfigError(f"train.time_budget = {text!r}: want a number with s, m or h, such as 90m") from None
