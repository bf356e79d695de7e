"""Cubes as files of every format, for the tests that read them. Needs no torch (tests/test_blender.py)."""

import base64
import functools
import io
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ouroboros3d.datagen.assets import Findings
from ouroboros3d.datagen.meshes import load_surface
from ouroboros3d.datagen.procedural import box
from ouroboros3d.datagen.raycast import Raycaster, orbit_pose

VERTICES, FACES, UV = box()  # [24, 3] in [-1, 1], [12, 3], [24, 2] with v downwards, as glTF counts
QUARTERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
BASE = "pbrMetallicRoughness/baseColorTexture"
COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(pixels: np.ndarray, repeat: int = 64) -> bytes:
    return encoded(Image.fromarray(np.kron(pixels, np.ones((repeat, repeat, 1), np.uint8))))


TEXTURE = png(QUARTERS)


class Gltf:
    """Builds a file: arrays become accessors, the rest of the tree is given as it is."""

    def __init__(self):
        self.blob, self.tree = b"", {"asset": {"version": "2.0"}, "accessors": [], "bufferViews": []}

    def view(self, data: bytes) -> int:
        self.tree["bufferViews"].append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data)})
        self.blob += data + bytes(-len(data) % 4)
        return len(self.tree["bufferViews"]) - 1

    def accessor(self, view: int | None, dtype: str, width: int, count: int, **more) -> int:
        accessor = {"bufferView": view, "componentType": COMPONENTS[dtype], "type": TYPES[width], "count": count}
        self.tree["accessors"].append({k: v for k, v in (accessor | more).items() if v is not None})
        return len(self.tree["accessors"]) - 1

    def array(self, values, dtype: str = "f4", **more) -> int:
        values = np.asarray(values, dtype)
        width = 1 if values.ndim == 1 else values.shape[1]
        return self.accessor(self.view(values.tobytes()), dtype, width, len(values), **more)

    def cube(self, **more) -> dict:
        """A primitive: the plain cube but for the attributes given."""
        plain = {"POSITION": VERTICES, "TEXCOORD_0": UV}
        attributes = {name: self.array(values) for name, values in plain.items() if name not in more} | more
        return {"attributes": attributes, "indices": self.array(FACES.ravel(), "u2"), "material": 0}

    def image(self, data: bytes) -> dict:
        self.tree.setdefault("images", []).append({"bufferView": self.view(data)})
        self.tree.setdefault("textures", []).append({"source": len(self.tree["images"]) - 1})
        return {"index": len(self.tree["textures"]) - 1}

    def write(self, path: Path, **tree) -> Path:
        self.tree |= tree
        if "extensionsRequired" in tree:
            self.tree["extensionsUsed"] = sorted({*tree["extensionsRequired"], *tree.get("extensionsUsed", ())})
        self.tree.setdefault("nodes", [{"mesh": 0}])
        self.tree.setdefault("scenes", [{"nodes": [0]}])
        if path.suffix == ".gltf":
            uri = "data:application/octet-stream;base64," + base64.b64encode(self.blob).decode()
            self.tree["buffers"] = [{"byteLength": len(self.blob), "uri": uri}]
            path.write_text(json.dumps(self.tree))
            return path
        self.tree["buffers"] = [{"byteLength": len(self.blob)}]
        text = json.dumps(self.tree).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(self.blob), 0x4E4942)
        path.write_bytes(struct.pack("<4sII", b"glTF", 2, 20 + len(text) + 8 + len(self.blob)) + chunks + self.blob)
        return path


def cube(path: Path, material: dict | None = None, textures: dict | None = None, colours=None, used=()) -> Path:
    """A .glb or .gltf of a cube under a material; textures: PNG data by the place of the texture in it, like
    emissiveTexture. By default the plain file: floats, triangles, one texture."""
    g = Gltf()
    more = {}
    if colours is not None:
        more["COLOR_0"] = g.array(*colours, normalized=True if colours[1] != "f4" else None)
    textures = {BASE: TEXTURE} if material is None else textures
    material = json.loads(json.dumps(material or {}))
    for place, data in (textures or {}).items():
        holder = material
        *way, last = place.split("/")
        for key in way:
            holder = holder.setdefault(key, {})
        holder[last] = g.image(data)
    meshes = [{"primitives": [g.cube(**more)]}]
    return g.write(path, meshes=meshes, materials=[material], extensionsUsed=list(used))


def obj_cube(folder: Path, mtl: str, lines: str = "mtllib m.mtl\nusemtl a") -> Path:
    """c.obj in `folder`, with m.mtl and its texture t.png."""
    folder.mkdir(exist_ok=True)
    (folder / "t.png").write_bytes(TEXTURE)
    (folder / "m.mtl").write_text(mtl)
    rows = [f"v {x} {y} {z}" for x, y, z in VERTICES] + [f"vt {u} {1 - v}" for u, v in UV]
    head, _, tail = lines.partition("\n")
    rows = [head, *rows, tail] + ["f " + " ".join(f"{i + 1}/{i + 1}" for i in face) for face in FACES]
    (folder / "c.obj").write_text("\n".join(rows) + "\n")
    return folder / "c.obj"


def views(path: Path, up: str = "y") -> np.ndarray:
    caster = Raycaster(load_surface(path, up))
    return np.stack([caster.render(orbit_pose(a, e), 48, 2) for a, e in ((20, 25), (130, -5), (250, 60))]) / 255


@functools.cache
def plain_views() -> np.ndarray:
    """Of the plain cube."""
    with tempfile.TemporaryDirectory() as folder:
        return views(cube(Path(folder) / "plain.glb"))


def colour_of(path: Path) -> np.ndarray:
    """Mean RGBA of the inside of a view."""
    return views(path)[0][20:28, 20:28].mean((0, 1))


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    seen = (one[..., 3] > 0) | (two[..., 3] > 0)
    one, two = (np.concatenate([x[..., :3] * x[..., 3:], x[..., 3:]], -1)[seen] for x in (one, two))
    return float(-10 * np.log10(max(((one - two) ** 2).mean(), 1e-10)))


def warnings_of(path: Path) -> list[str]:
    findings = Findings()
    load_surface(path, findings=findings)
    return list(findings.warnings)


# Which Blender reads as well, and which it does not or with a decoder alone.
FEATURES = [
    *("uv i8", "quantised", "plain integers", "texCoord 2", "transform", "mirrored", "clamped", "nearest", "strip"),
    *("matrix", "webp", "sparse only", "interleaved", "skin", "node weights", "mesh weights", "specular-glossiness"),
]
MORE_FEATURES = ["hidden", "draco", "meshopt"]


def special(path: Path, feature: str) -> Path:
    """A cube that needs `feature` to look like the plain one."""
    g = Gltf()
    vertices, uv, info, sampler, texture, node, more = VERTICES, UV, {}, {}, png(QUARTERS), {"mesh": 0}, {}
    attributes, mesh, mode, indices = {}, {}, {}, FACES.ravel()
    transform = {"offset": [0.5, 0.25], "rotation": 0.7, "scale": [0.5, 2.0]}
    if feature == "uv i8":
        attributes["TEXCOORD_0"] = g.array(np.round(uv * 127), "i1", normalized=True)
    elif feature == "quantised":
        attributes["POSITION"] = g.array(np.round(vertices * 127), "i1", normalized=True)
        attributes["TEXCOORD_0"] = g.array(np.round(uv * 255), "u1", normalized=True)
        more["extensionsRequired"] = ["KHR_mesh_quantization"]
    elif feature == "plain integers":
        attributes["POSITION"], node["scale"] = g.array(vertices * 20, "i2"), [0.05] * 3
    elif feature == "texCoord 2":
        attributes = {f"TEXCOORD_{i}": g.array(uv * (i == 2)) for i in range(3)}
        info = {"texCoord": 2}
    elif feature == "transform":
        cos, sin = np.cos(0.7), np.sin(0.7)
        turned = (uv - transform["offset"]) @ np.array([[cos, sin], [-sin, cos]]) / transform["scale"]
        attributes = {"TEXCOORD_0": g.array(uv * 0), "TEXCOORD_1": g.array(turned)}
        info = {"extensions": {"KHR_texture_transform": transform | {"texCoord": 1}}}
    elif feature == "mirrored":
        uv, sampler = 2 - uv, {"wrapS": 33648, "wrapT": 33648}
    elif feature == "clamped":
        uv, sampler = 3 * uv - 1, {"wrapS": 33071, "wrapT": 33071}
    elif feature == "nearest":
        texture, sampler = png(QUARTERS, 1), {"magFilter": 9728}
    elif feature == "strip":
        mode, indices = {"mode": 5}, np.concatenate([[*f, f[2]] for f in FACES[:, [0, 0, 1, 2]]])
    elif feature in ("node weights", "mesh weights"):
        mesh = {"weights": [0.0, 0.0]}
        (node if feature == "node weights" else mesh)["weights"] = [0.5, 1.0]
        vertices = VERTICES - [2, 0, 0] - 3 * UV[:, :1]
        moves = np.full((24, 3), [4.0, 0, 0]), 3 * UV[:, :1] * [1, 1, 1]
        mode = {"targets": [{"POSITION": g.array(move)} for move in moves]}
    elif feature == "matrix":
        node["matrix"] = np.diag([2.0, 2, 2, 1]).ravel().tolist()
    elif feature == "webp":
        texture = encoded(Image.open(io.BytesIO(texture)), "WEBP", lossless=True)
        more["extensionsRequired"] = ["EXT_texture_webp"]
    elif feature == "sparse only":
        sparse = {
            "count": 24,
            "indices": {"bufferView": g.view(np.arange(24, dtype="u1").tobytes()), "componentType": 5121},
            "values": {"bufferView": g.view(vertices.astype("f4").tobytes())},
        }
        attributes["POSITION"] = g.accessor(None, "f4", 3, 24, sparse=sparse)
    elif feature == "interleaved":
        view = g.view(np.concatenate([vertices, uv, uv * 0], 1).astype("f4").tobytes())
        g.tree["bufferViews"][view]["byteStride"] = 28
        attributes["POSITION"] = g.accessor(view, "f4", 3, 24, byteOffset=0)
        attributes["TEXCOORD_0"] = g.accessor(view, "f4", 2, 24, byteOffset=12)
    elif feature == "skin":
        upper = VERTICES[:, 1] > 0  # hangs on a joint that brings it back
        vertices = VERTICES - np.outer(upper, [2, 0, 0])
        attributes["JOINTS_0"] = g.array(np.outer(upper, [1, 0, 0, 0]), "u1")
        attributes["WEIGHTS_0"] = g.array(np.tile([255, 0, 0, 0], (24, 1)), "u1", normalized=True)
        inverse = [np.diag([0.5, 0.5, 0.5, 1]).ravel()] * 2
        more["skins"] = [{"joints": [1, 2], "inverseBindMatrices": g.array(inverse)}]
        more["nodes"] = [{"mesh": 0, "skin": 0, "translation": [9, 9, 9]}, {"children": [2], "scale": [2, 2, 2]}]
        more["nodes"].append({"translation": [1, 0, 0]})
        more["scenes"] = [{"nodes": [0, 1]}]
    elif feature == "hidden":
        more["nodes"] = [
            {"mesh": 0},
            {"mesh": 0, "translation": [5, 0, 0], "extensions": {"KHR_node_visibility": {"visible": False}}},
            {"scale": [0, 0, 0], "translation": [7, 7, 7], "children": [3]},
            {"mesh": 0},
        ]
        more["scenes"], more["extensionsUsed"] = [{"nodes": [0, 1, 2]}], ["KHR_node_visibility"]
    elif feature == "specular-glossiness":
        name = "KHR_materials_pbrSpecularGlossiness"
        more["materials"] = [{"extensions": {name: {"diffuseTexture": g.image(texture)}}}]
        more["extensionsUsed"] = [name]
    elif feature == "draco":
        draco, name = pytest.importorskip("DracoPy"), "KHR_draco_mesh_compression"
        data = draco.encode(VERTICES.astype("f4"), FACES.astype("u4"), tex_coord=UV, quantization_bits=16)
        kinds = {a["attribute_type"]: a["unique_id"] for a in draco.decode(data).attributes}
        names = {"POSITION": kinds[0], "TEXCOORD_0": kinds[3]}
        mode = {"extensions": {name: {"bufferView": g.view(data), "attributes": names}}}
        more["extensionsRequired"] = [name]
    elif feature == "meshopt":
        rows = np.pad(np.round(VERTICES * 127).astype("i1"), ((0, 0), (0, 1)))
        data = pytest.importorskip("meshopt").encode_gltf_buffer(rows, "ATTRIBUTES")
        view = g.view(data)
        packed = {"buffer": 0, "byteLength": len(data), "byteStride": 4, "count": 24, "mode": "ATTRIBUTES"}
        packed["byteOffset"] = g.tree["bufferViews"][view]["byteOffset"]
        g.tree["bufferViews"][view] |= {"byteStride": 4, "extensions": {"EXT_meshopt_compression": packed}}
        attributes["POSITION"] = g.accessor(view, "i1", 3, 24, normalized=True)
        more["extensionsRequired"] = ["EXT_meshopt_compression", "KHR_mesh_quantization"]
    attributes.setdefault("POSITION", g.array(vertices))
    attributes.setdefault("TEXCOORD_0", g.array(uv))
    primitive = {"attributes": attributes, "indices": g.array(indices, "u2"), "material": 0} | mode
    image = g.image(texture)
    if sampler:
        g.tree["samplers"], g.tree["textures"][-1]["sampler"] = [sampler], 0
    if feature == "webp":
        last = g.tree["textures"][-1]
        last["extensions"] = {"EXT_texture_webp": {"source": last.pop("source")}}
    more.setdefault("materials", [{"pbrMetallicRoughness": {"baseColorTexture": image | info}}])
    more.setdefault("nodes", [node])
    return g.write(path, meshes=[{"primitives": [primitive]} | mesh], **more)
