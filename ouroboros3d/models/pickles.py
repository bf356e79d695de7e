"""Tensors from training checkpoints of other programs, whose pickles and shards hold more than tensors."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# What a state dict is made of. Storages and dtypes are torch's own attributes.
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _Inert:
    """Stands for any other object in a pickle: takes everything, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _item: Any) -> None: ...

    def extend(self, _items: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors; no other code of the file's or of any library's runs."""

    def find_class(self, module: str, name: str) -> Any:
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype) or (isinstance(value, type) and name.endswith("Storage")):
            return value
        return super().find_class(module, name) if (module, name) in ALLOWED else _Inert


def load_tensors(path: Path) -> Any:
    """What torch.save wrote, e.g. Lightning or DeepSpeed: containers and tensors as they are, on the CPU, settings and
    loop states as inert objects."""
    reader = {"Unpickler": _Unpickler, "load": lambda file, **k: _Unpickler(file, **k).load()}
    module = SimpleNamespace(__name__="pickle", **reader)
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)


def load_shards(folder: Path) -> Any:
    """The whole state of a folder that torch.distributed.checkpoint wrote, one file per process (FSDP2)."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole.pt"
        dcp_to_torch_save(folder, whole)
        return load_tensors(whole)
