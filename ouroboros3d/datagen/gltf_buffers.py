"""Reads a glTF 2.0 file's JSON tree, buffers, views and accessors, compressed or not.

"3.6.2" and the like are sections of the glTF 2.0 specification.
"""

from __future__ import annotations

import base64
import json
import struct
import urllib.parse
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .assets import AssetError, Findings, Unsupported
from .pictures import find_file, is_address, optional

TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
MAX_VALUES = 200_000_000  # of an accessor: a count beyond this is no mesh but a mistake
COMPRESSED = {"EXT_meshopt_compression", "KHR_meshopt_compression"}


class _Numbered(list):
    """Things that the file refers to by index. A negative one, as some exporters write for "none", is refused."""

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise AssetError(f"refers to index {index} of a list of {len(self)}")
        return super().__getitem__(index)


def parse(data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The JSON tree of a .gltf or .glb file, and the latter's binary chunk."""
    chunk = None
    if data.startswith(b"glTF"):
        version, length = struct.unpack("<II", data[4:12])
        if version != 2:
            raise Unsupported("glTF 1.0", "is not read; only glTF 2.0 is")
        if length > len(data):
            raise AssetError(f"is cut short: {len(data):,} of {length:,} bytes")
        chunks, at = {}, 12
        while at + 8 <= length:
            size, kind = struct.unpack("<II", data[at : at + 8])
            chunks.setdefault(kind, data[at + 8 : at + 8 + size])
            at += 8 + size
        data, chunk = chunks[0x4E4F534A], chunks.get(0x004E4942)
    tree = json.loads(data.decode("utf-8-sig"))
    return {key: _Numbered(value) if isinstance(value, list) else value for key, value in tree.items()}, chunk


def extensions_in(tree: Any) -> set[str]:
    """Names of all extensions that a JSON tree uses, listed in extensionsUsed or not."""
    found, waiting = set(), [tree]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, dict):
            waiting += thing.values()
            found |= set(thing["extensions"] if isinstance(thing.get("extensions"), dict) else ())
        elif isinstance(thing, list) and thing and isinstance(thing[0], (dict, list)):
            waiting += thing
    return found


class Buffers:
    """The buffers of one file. `accessor(i)`, `view(i)` and `buffer(i)` are read once; indices are the file's."""

    def __init__(self, path: Path, tree: dict, chunk: bytes | None, findings: Findings) -> None:
        self.path, self.tree, self.chunk, self.findings = path, tree, chunk, findings
        self.buffer, self.view, self.accessor = (lru_cache(None)(f) for f in (self._buffer, self._view, self._accessor))

    def _accessor(self, index: int) -> np.ndarray:
        """[count, width], with fractions where the file says normalized (3.6.2). Not to be changed."""
        data = self.tree["accessors"][index]
        dtype, width, count = np.dtype(TYPES[data["componentType"]]), WIDTHS[data["type"]], data["count"]
        if not 0 <= count * width <= MAX_VALUES:
            raise AssetError(f"accessor {index} claims {count:,} elements")
        values = np.zeros((count, width), dtype)
        if "bufferView" in data:
            values = self._elements(index, data, dtype, count, width)
        if "sparse" in data:
            self.findings.met("sparse accessors")
            sparse, values = data["sparse"], values.copy()
            kind = np.dtype(TYPES[sparse["indices"]["componentType"]])
            places = self._elements(index, sparse["indices"], kind, sparse["count"], 1)
            values[places[:, 0]] = self._elements(index, sparse["values"], dtype, sparse["count"], width)
        return normalized(values, data.get("normalized"))

    def _elements(self, index: int, where: dict, dtype: np.dtype, count: int, width: int) -> np.ndarray:
        """[count, width] of accessor `index`, at a place in a buffer view. Raises AssetError if that is too short."""
        view, offset = self.view(where["bufferView"]), where.get("byteOffset", 0)
        size = width * dtype.itemsize
        stride = self.tree["bufferViews"][where["bufferView"]].get("byteStride") or size
        if count and offset + (count - 1) * stride + size > len(view):
            text = f"accessor {index} of {count:,} elements ends behind its {len(view):,} bytes"
            raise AssetError(f"is cut short: {text}")
        return np.ndarray((count, width), dtype, view, offset, (stride, dtype.itemsize))

    def _view(self, index: int) -> bytes:
        data = self.tree["bufferViews"][index]
        packed = next((v for k, v in data.get("extensions", {}).items() if k in COMPRESSED), None)
        if packed:
            return self._unpacked(packed)
        buffer, start = self.buffer(data["buffer"]), data.get("byteOffset", 0)
        if start + data["byteLength"] > len(buffer):
            raise AssetError(f"is cut short: buffer view {index} ends behind its buffer of {len(buffer):,} bytes")
        return buffer[start : start + data["byteLength"]]

    def _unpacked(self, packed: dict) -> bytes:
        """The bytes of a view under EXT_meshopt_compression."""
        try:
            meshopt = optional("meshopt")
        except ImportError as error:
            raise Unsupported("EXT_meshopt_compression", str(error)) from error
        count, stride, start = packed["count"], packed["byteStride"], packed.get("byteOffset", 0)
        if count * stride > 4 * MAX_VALUES:
            raise AssetError(f"a compressed buffer view claims {count:,} elements")
        data = self.buffer(packed["buffer"])[start : start + packed["byteLength"]]
        rows = meshopt.decode_gltf_buffer(data, count, stride, packed["mode"], packed.get("filter"))
        return np.ascontiguousarray(rows if packed["mode"] == "ATTRIBUTES" else rows.astype(f"<u{stride}")).tobytes()

    def _buffer(self, index: int) -> bytes:
        uri = self.tree["buffers"][index].get("uri")
        if uri is None:
            if self.chunk is None or index:
                raise AssetError(f"buffer {index} has no data")
            return self.chunk
        if uri.startswith("data:"):
            return data_uri(uri)
        if is_address(uri):
            raise AssetError(f"'{uri[:80]}' is an address; nothing is fetched")
        path = find_file(self.path.parent, urllib.parse.unquote(uri))
        if path is None:
            raise AssetError(f"buffer '{uri}' is missing, or not in the file's own folder")
        return path.read_bytes()


def normalized(values: np.ndarray, normalized: bool | None) -> np.ndarray:
    """Integers as fractions (3.6.2.2), or as they are."""
    if not normalized:
        return values
    return np.maximum(values.astype(np.float32) / np.iinfo(values.dtype).max, -1)


def data_uri(uri: str) -> bytes:
    """What a data: address holds."""
    head, _, body = uri.partition(",")
    body = urllib.parse.unquote_to_bytes(body)
    return base64.b64decode(body) if head.endswith(";base64") else body
