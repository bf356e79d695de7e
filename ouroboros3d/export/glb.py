"""glTF 2.0 binary files: one mesh, unlit, coloured by vertices or a texture.

The colours are those of the pictures, light included, so the material is KHR_materials_unlit. Vertex colours are linear
by the specification and stored in 16 bits, because 8 would show bands in dark parts; a texture is sRGB.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ouroboros3d.export.colours import Mesh, to_linear
from ouroboros3d.export.frames import upright
from ouroboros3d.export.mesh import build_mesh
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.files import write_whole

COMPONENTS = {"float32": 5126, "uint32": 5125, "uint16": 5123}  # dtype -> glTF's componentType
VERTICES, INDICES = 34962, 34963  # bufferView targets


def write_glb(object3d: Object3D, path: Path, up: str = "y", faces: int = 40_000, texture: int = 0) -> None:
    """The object as a mesh of at most `faces` triangles, y up by glTF's specification; see `build_mesh`."""
    write_whole(path, glb_bytes(build_mesh(upright(object3d, up), faces, texture)))


def glb_bytes(mesh: Mesh) -> bytes:
    """The file: 12 bytes of header, then JSON and binary, each with a length, a type and padding to 4 bytes."""
    document, binary = _document(mesh)
    text = json.dumps(document, separators=(",", ":")).encode()
    chunks = [(b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", binary + bytes(-len(binary) % 4))]
    body = b"".join(struct.pack("<I", len(data)) + kind + data for kind, data in chunks)
    return struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body


def _document(mesh: Mesh) -> tuple[dict[str, Any], bytes]:
    buffer = _Buffer()
    positions = mesh.vertices.astype(np.float32)
    low, high = positions.min(axis=0).tolist(), positions.max(axis=0).tolist()
    attributes = {"POSITION": buffer.accessor(positions, "VEC3", VERTICES, min=low, max=high)}
    material: dict[str, Any] = {"metallicFactor": 0, "roughnessFactor": 1}
    document: dict[str, Any] = {}
    if mesh.texture is None:
        attributes["COLOR_0"] = buffer.accessor(_linear_rgba(mesh.colours), "VEC4", VERTICES, normalized=True)
    else:
        attributes["TEXCOORD_0"] = buffer.accessor(mesh.uv.astype(np.float32), "VEC2", VERTICES)
        document = {
            "images": [{"bufferView": buffer.add(_png(mesh.texture)), "mimeType": "image/png"}],
            "samplers": [{"magFilter": 9729, "minFilter": 9729, "wrapS": 33071, "wrapT": 33071}],  # linear, clamped
            "textures": [{"source": 0, "sampler": 0}],
        }
        material["baseColorTexture"] = {"index": 0}
    indices = buffer.accessor(mesh.faces.astype(np.uint32).ravel(), "SCALAR", INDICES)
    return {
        "asset": {"version": "2.0", "generator": "ouroboros3d"},
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": "object"}],
        "meshes": [{"primitives": [{"attributes": attributes, "indices": indices, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": material, "extensions": {"KHR_materials_unlit": {}}}],
        **document,
        "accessors": buffer.accessors,
        "bufferViews": buffer.views,
        "buffers": [{"byteLength": len(buffer.content)}],
    }, bytes(buffer.content)


class _Buffer:
    """The binary chunk as it grows, every part at a multiple of 4 bytes."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []

    def add(self, data: bytes, **view: Any) -> int:
        """Index of the new bufferView."""
        self.content += bytes(-len(self.content) % 4)
        self.views.append({"buffer": 0, "byteOffset": len(self.content), "byteLength": len(data), **view})
        self.content += data
        return len(self.views) - 1

    def accessor(self, values: np.ndarray, kind: str, target: int, **accessor: Any) -> int:
        """Index of the new accessor."""
        view = self.add(np.ascontiguousarray(values).tobytes(), target=target)
        component = COMPONENTS[str(values.dtype)]
        self.accessors.append(
            {"bufferView": view, "componentType": component, "count": len(values), "type": kind, **accessor}
        )
        return len(self.accessors) - 1


def _linear_rgba(colours: np.ndarray) -> np.ndarray:
    rgba = np.concatenate([to_linear(colours), np.ones((len(colours), 1))], axis=1)
    return np.rint(rgba * 65535).astype(np.uint16)


def _png(texture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(texture * 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
