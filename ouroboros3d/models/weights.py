"""Weights in and out: the release's two files, LGM's public weights, and the small model's frozen parts.

A checkpoint folder holds `mv_model_unet` (U-Net, adapters, ray encoders) and `recon_model` (LGM) as plain state
dicts, .safetensors or .pth; beside them, optionally, `vae` and `image_encoder`. The other layout is diffusers', one
folder per part (`save_diffusers`). Everything that reads a checkpoint folder reads both.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ouroboros3d.errors import UserError, one_line
from ouroboros3d.files import atomic_path, check_writable_dir, staged
from ouroboros3d.models.conditioning import silence
from ouroboros3d.models.pickles import load_shards, load_tensors

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
# Files of a training checkpoint: accelerate's, FSDP2's, and what DeepSpeed leaves, rounded to its half precision.
TRAINED = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model_fsdp.bin",
    "pytorch_model/mp_rank_00_model_states.pt",
    "checkpoint/mp_rank_00_model_states.pt",
)
PREFIXES = {"unet": ("trained.unet.", "mv_model."), "lgm": ("trained.lgm.", "recon_model.")}  # ours, the release's
State = dict[str, Tensor]
_log = logging.getLogger(__name__)


class CheckpointError(UserError, ValueError):
    """Weights that cannot be read or do not fit; the message is one line for the user."""


def find_weights(folder: str | Path, name: str) -> Path | None:
    """`folder/name` with the first known suffix there is, or the weights in diffusers' folder of that name."""
    stems = (name, f"{name}/{DIFFUSERS_WEIGHTS}", f"{name}/model")
    return next((p for stem in stems for s in SUFFIXES if (p := Path(folder) / f"{stem}{s}").is_file()), None)


def read_state(path: str | Path) -> State:
    """A state dict from .safetensors, or from a pickle with `weights_only=True`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: unreadable or truncated ({one_line(error)}); fetch it again") from error
    except Exception as error:  # pickle.UnpicklingError: something other than tensors inside
        raise CheckpointError(f"{path}: not a plain state dict of tensors ({one_line(error)})") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: not a plain state dict of tensors")
    return state


def write_state(state: State, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes a state dict by the file's suffix, atomically; floating tensors are cast to `dtype` if given."""
    path = Path(path)
    state = {
        k: (v.to(dtype) if dtype and v.is_floating_point() else v).detach().cpu().contiguous().clone()
        for k, v in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={"format": "pt"})  # which transformers asks for
        else:
            torch.save(state, temporary)


def fit_state(module: nn.Module, state: State, source: str | Path, may_miss: str | None = None) -> None:
    """Loads `state` strictly, naming every key that does not fit. Keys matching the regex `may_miss` may be absent
    and keep their initial values. Raises CheckpointError."""
    own = module.state_dict()
    missing = [k for k in own if k not in state and not (may_miss and re.search(may_miss, k))]
    unexpected = [k for k in state if k not in own]
    wrong = [
        f"{k} is {tuple(state[k].shape)}, the model's is {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrongly shaped", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: does not fit the configured model: {'; '.join(problems)}; is it the right --config?"
        )
    if any(parameter.is_meta for parameter in module.parameters()):  # built without memory: takes these tensors
        state = {k: v.to(own[k].dtype) if k in own else v for k, v in state.items()}
        module.load_state_dict(state, strict=False, assign=True)
    else:
        module.load_state_dict(state, strict=False)


def to_release_names(state: State, res_blocks: int) -> State:
    """diffusers' adapter names `body.{i}.resnets.{j}.*` to the release's flat `body.{res_blocks * i + j}.*`."""

    def rename(name: str) -> str:
        match = re.fullmatch(r"(cond_encoder\.\d+\.body\.)(\d+)\.(?:resnets\.(\d+)\.)?(.*)", name)
        if not match:
            return name
        head, level, resnet, tail = match.groups()
        return f"{head}{res_blocks * int(level) + int(resnet or 0)}.{tail}"

    return {rename(k): v for k, v in state.items()}


def from_release_names(state: State, res_blocks: int) -> State:
    """The inverse of `to_release_names`; a block's `in_conv` sits at its first residual block."""

    def rename(name: str) -> str:
        match = re.fullmatch(r"(cond_encoder\.\d+\.body\.)(\d+)\.(.*)", name)
        if not match:
            return name
        head, index, tail = match.groups()
        level, resnet = divmod(int(index), res_blocks)
        return f"{head}{level}.{tail}" if tail.startswith("in_conv") else f"{head}{level}.resnets.{resnet}.{tail}"

    return {rename(k): v for k, v in state.items()}


def find_checkpoint(source: str | Path) -> Path:
    """The weights that `source` names: a folder of them, a run's folder (its export/, best/ or newest checkpoint), a
    training checkpoint, a Lightning file, or a hub id such as huanngzh/Ouroboros3D-SVD-LGM, which is fetched.
    Raises CheckpointError."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        if isinstance(source, Path) or not is_hub_id(source):
            raise CheckpointError(f"{source}: no such checkpoint folder, and not a hub id such as owner/model")
        return _fetch(source)
    steps = sorted(path.glob("checkpoints/step_*"), reverse=True)
    for folder in (path, path / "export", path / "best", *steps):
        if (folder / "model_index.json").is_file() or find_weights(folder, "mv_model_unet") or find_trained(folder):
            _warn_of_newer(folder, steps)
            return folder
    return path


def _warn_of_newer(export: Path, steps: Sequence[Path]) -> None:
    """Says so where a run went on after its export, which is made at its end."""
    weights = find_weights(export, "mv_model_unet")
    if export.name != "export" or weights is None or not steps:
        return
    newest = find_trained(steps[0])
    if newest is not None and newest.stat().st_mtime > weights.stat().st_mtime:
        _log.warning(
            "%s: older than %s by the files' times; end the training to export anew, or name that folder",
            export,
            steps[0],
        )


def is_hub_id(name: str) -> bool:
    """Whether it looks like owner/model; a folder of that name comes first."""
    return name.count("/") == 1 and not name.startswith(("/", ".", "~"))


def _fetch(name: str) -> Path:
    """The local copy of a hub repository."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name))
    except Exception as error:  # the hub's errors have no common useful base
        raise CheckpointError(
            f"{name}: no such folder, and the hub did not answer ({one_line(error)}); a downloaded folder works too"
        ) from error


def load_checkpoint(source: str | Path, models) -> None:
    """Loads what `find_checkpoint` finds into `build.Models`, strictly; `vae` and `image_encoder` where they are
    there."""
    folder = find_checkpoint(source)
    if (trained := folder if folder.is_file() else find_trained(folder)) is not None:
        load_trained(trained, models, ("unet", "lgm"))
        return
    if (folder / "model_index.json").is_file():
        for name, part in _diffusers_parts(models).items():
            path = find_weights(folder, name)
            if path is None:
                raise CheckpointError(f"{folder}: has no weights in {name}/, though a model_index.json")
            state = read_state(path)
            fit_state(
                part.module, _with_new_adapters(state, models.unet, path) if name == "conditioning" else state, path
            )
        return
    for name in ("mv_model_unet", "recon_model"):
        if find_weights(folder, name) is None:
            raise CheckpointError(f"{folder}: has no {name}.safetensors or {name}.pth")
    load_unet(find_weights(folder, "mv_model_unet"), models.unet)
    path = find_weights(folder, "recon_model")
    fit_state(models.lgm, read_state(path), path)
    for name, module in (("vae", models.svd.vae), ("image_encoder", models.svd.image_encoder)):
        if (path := find_weights(folder, name)) is not None:
            fit_state(module, read_state(path), path)


def save_checkpoint(
    folder: str | Path,
    models,
    suffix: str = ".safetensors",
    dtype: torch.dtype | None = None,
    frozen: bool = False,
) -> None:
    """Writes the release's two files, and the frozen parts beside them if asked (the small model's are its own)."""
    folder = Path(folder)
    res_blocks = models.unet.config.adapter.res_blocks
    parts = {
        "mv_model_unet": to_release_names(models.unet.state_dict(), res_blocks),
        "recon_model": models.lgm.state_dict(),
    }
    if frozen:
        parts |= {"vae": models.svd.vae.state_dict(), "image_encoder": models.svd.image_encoder.state_dict()}
    for name, state in parts.items():
        write_state(state, folder / f"{name}{suffix}", dtype)
    if frozen and models.svd.tiny_decoder is not None:
        save_tiny_decoder(models.svd.tiny_decoder, folder / "tiny_decoder")


def save_tiny_decoder(tiny: nn.Module, folder: str | Path) -> None:
    """In diffusers' layout, dimensions included, but for a key that its own class does not know when loading."""
    tiny.save_pretrained(folder)
    config = Path(folder) / "config.json"
    _write_json({k: v for k, v in json.loads(config.read_text()).items() if k != "block_out_channels"}, config)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A folder of diffusers' layout."""

    module: nn.Module
    library: str
    weights: str  # their file's name without the suffix
    config: dict[str, Any]


def _diffusers_parts(models) -> dict[str, _Part]:
    unet, lgm, vae, encoder = models.unet, models.lgm, models.svd.vae, models.svd.image_encoder
    own = ("cond_encoder", "down_plucker", "mid_plucker", "up_plucker")
    conditioning = nn.ModuleDict({name: getattr(unet, name) for name in own})
    own_config = getattr(lgm, "config", None)
    reconstructor = dataclasses.asdict(own_config) if dataclasses.is_dataclass(own_config) else {}
    multiview = {k: v for k, v in dataclasses.asdict(unet.config).items() if k != "unet"}

    def config(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
        return {"_class_name": type(module).__name__, **values}

    return {
        "unet": _Part(unet.unet, "diffusers", DIFFUSERS_WEIGHTS, config(unet.unet, dict(unet.unet.config))),
        "vae": _Part(vae, "diffusers", DIFFUSERS_WEIGHTS, config(vae, dict(vae.config))),
        "image_encoder": _Part(encoder, "transformers", "model", encoder.config.to_dict()),
        "conditioning": _Part(conditioning, "ouroboros3d", DIFFUSERS_WEIGHTS, config(unet, multiview)),
        "lgm": _Part(lgm, "ouroboros3d", DIFFUSERS_WEIGHTS, config(lgm, reconstructor)),
    }


def save_diffusers(folder: str | Path, models, scheduler, dtype: torch.dtype | None = None) -> None:
    """Writes the layout of a diffusers pipeline: unet, vae, image_encoder, scheduler and feature_extractor load with
    their libraries' `from_pretrained(folder, subfolder=...)`; conditioning (adapters and ray encoders) and lgm are
    ours. `scheduler` is diffusers'. All or nothing. Raises OutputError.

    diffusers' U-Net and VAE know only 32 normalisation groups: with other `norm_groups` their own classes load the
    weights and compute something else. The folder then says so by `norm_groups` in conditioning/config.json.
    """
    folder = check_writable_dir(folder)
    parts = _diffusers_parts(models)
    index: dict[str, Any] = {"_class_name": "Ouroboros3D"}
    index |= {name: [part.library, type(part.module).__name__] for name, part in parts.items()}
    index |= {"conditioning": ["ouroboros3d", "MultiViewUNet"]}
    index |= {"scheduler": ["diffusers", type(scheduler).__name__]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    size = parts["image_encoder"].config["image_size"]
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        **{"do_resize": True, "size": {"shortest_edge": size}, "resample": 3},
        **{"do_center_crop": True, "crop_size": {"height": size, "width": size}},
        **{"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True},
        **{"image_mean": models.svd._mean.flatten().tolist(), "image_std": models.svd._std.flatten().tolist()},
    }
    with staged(folder) as stage:
        for name, part in parts.items():
            write_state(part.module.state_dict(), stage / name / f"{part.weights}.safetensors", dtype)
            _write_json(part.config, stage / name / "config.json")
        if models.svd.tiny_decoder is not None:
            save_tiny_decoder(models.svd.tiny_decoder, stage / "tiny_decoder")
        scheduler.save_pretrained(stage / "scheduler")
        (stage / "feature_extractor").mkdir()
        _write_json(preprocessing, stage / "feature_extractor" / "preprocessor_config.json")
        _write_json(index, stage / "model_index.json")


def _write_json(values: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def load_unet(path: str | Path, unet) -> None:
    """`mv_model_unet` into a MultiViewUNet, strictly; but adapters of the model's last maps may be absent."""
    state = from_release_names(read_state(path), unet.config.adapter.res_blocks)
    fit_state(unet, _with_new_adapters(state, unet, path), path)


def _with_new_adapters(state: State, unet, source: str | Path) -> State:
    """Adds silent adapters for the maps that the model has and the weights, which end before these, have not."""
    own = unet.state_dict()
    there = len({key.split(".")[1] for key in state if key.startswith("cond_encoder.")})
    for index, name in list(enumerate(unet.config.feedback))[there:]:
        silence(unet.cond_encoder[index])
        _log.warning("%s: has no adapter for the feedback map %s: a new one starts at zero effect", source, name)
        prefix = f"cond_encoder.{index}."
        state = state | {key: own[key] for key in own if key.startswith(prefix)}
    return state


def find_trained(folder: Path) -> Path | None:
    """The networks' weights in a training checkpoint: a file, or the folder of FSDP2's shards."""
    shards = folder / "pytorch_model_fsdp_0"
    known = [shards] if (shards / ".metadata").is_file() else []
    return next(iter(known + [path for name in TRAINED if (path := folder / name).is_file()]), None)


def load_trained(path: str | Path, models, wanted: Sequence[str] = ()) -> None:
    """The networks of a training checkpoint into `build.Models`, strictly: ours (a file, or a folder of any sharding)
    or the release's Lightning file. Those `wanted` must be in it. Raises CheckpointError."""
    path = Path(path)
    path = (find_trained(path) or path) if path.is_dir() else path
    state, found = _read_trained(path), []
    for name, network in (("unet", models.unet), ("lgm", models.lgm)):
        for prefix in PREFIXES[name]:
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if prefix == "mv_model.":
                own = from_release_names(own, network.config.adapter.res_blocks)
            if own:
                fit_state(network, own, path)
                found.append(name)
    if not found:
        raise CheckpointError(f"{path}: not the weights of a training checkpoint; weights of a folder go to --ckpt")
    if missing := set(wanted) - set(found):
        raise CheckpointError(
            f"{path}: was trained without {', '.join(sorted(missing))}, whose weights lie elsewhere; make a whole "
            "model with scripts/export.py --config <run>/config.yaml --trained"
        )


def _read_trained(path: Path) -> State:
    """The state in a training checkpoint, without what frameworks wrap around it."""
    if path.suffix == ".safetensors":
        return read_state(path)
    try:
        state = load_shards(path) if path.is_dir() else load_tensors(path)
    except Exception as error:  # zip's, pickle's and torch's own
        raise CheckpointError(f"{path}: unreadable or truncated ({one_line(error)})") from error
    for wrapper in ("state_dict", "module", "model"):  # Lightning's, DeepSpeed's, FSDP2's
        inner = state.get(wrapper) if isinstance(state, dict) else None
        state = inner if isinstance(inner, dict) else state
    tensors = (
        {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    )
    return {re.sub(r"^(_forward_module\.|module\.)+", "", key): value for key, value in tensors.items()}


def load_lgm(path: str | Path, lgm: nn.Module) -> None:
    """Public LGM weights: the time embedding's keys, and only those, may be missing; they keep their zero output."""
    fit_state(lgm, read_state(path), path, may_miss=r"^unet\.(time_embed\.|.*\.emb_layers\.)")
