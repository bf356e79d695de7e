"""Weights in and out: the release's two files, LGM's public weights, and the small model's frozen parts.

A checkpoint folder holds `mv_model_unet` (U-Net, adapters, ray encoders) and `recon_model` (LGM) as plain state
dicts, .safetensors or .pth; beside them, optionally, `vae` and `image_encoder`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ouroboros3d.errors import UserError
from ouroboros3d.files import atomic_path

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
State = dict[str, Tensor]


class CheckpointError(UserError, ValueError):
    """Weights that cannot be read or do not fit; the message is one line for the user."""


def find_weights(folder: str | Path, name: str) -> Path | None:
    """`folder/name` with the first known suffix there is."""
    return next((p for s in SUFFIXES if (p := Path(folder) / f"{name}{s}").is_file()), None)


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
        raise CheckpointError(f"{path}: unreadable or truncated ({_first_line(error)}); fetch it again") from error
    except Exception as error:  # pickle.UnpicklingError: something other than tensors inside
        raise CheckpointError(f"{path}: not a plain state dict of tensors ({_first_line(error)})") from error
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
            save_file(state, temporary)
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


def load_checkpoint(folder: str | Path, models) -> None:
    """Loads a checkpoint folder into `build.Models`, strictly; `vae` and `image_encoder` where the folder has them."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder (it holds mv_model_unet and recon_model)")
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


def load_unet(path: str | Path, unet) -> None:
    """`mv_model_unet` into a MultiViewUNet, strictly."""
    fit_state(unet, from_release_names(read_state(path), unet.config.adapter.res_blocks), path)


def load_lgm(path: str | Path, lgm: nn.Module) -> None:
    """Public LGM weights: the time embedding's keys, and only those, may be missing; they keep their zero output."""
    fit_state(lgm, read_state(path), path, may_miss=r"^unet\.(time_embed\.|.*\.emb_layers\.)")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160].replace(os.linesep, " ")
