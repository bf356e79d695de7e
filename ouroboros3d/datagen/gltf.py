"""Reads glTF 2.0 (.gltf, .glb): static geometry, base colour and emitted light.

"3.6.2" and the like are sections of the glTF 2.0 specification. Unknown extensions are refused if the
file requires them, otherwise reported.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from .assets import AssetError, Findings, Unsupported
from .gltf_buffers import COMPRESSED, Buffers, data_uri, extensions_in, normalized, parse
from .pictures import PictureError, Pictures, optional
from .polygons import strip
from .surface import Material, Part, Texture, check_count, to_srgb

WRAPS = {10497: "repeat", 33071: "clamp", 33648: "mirror"}
NEAREST = 9728
MODES = {0: "points", 1: "lines", 2: "lines", 3: "lines", 4: "triangles", 5: "triangle strips", 6: "triangle fans"}
PICTURES = {"EXT_texture_webp", "EXT_texture_avif", "KHR_texture_basisu", "MSFT_texture_dds"}
RENDERED = COMPRESSED | PICTURES
RENDERED |= {"KHR_draco_mesh_compression", "KHR_mesh_quantization", "KHR_texture_transform", "KHR_node_visibility"}
RENDERED |= {"KHR_materials_unlit", "KHR_materials_pbrSpecularGlossiness", "KHR_materials_emissive_strength"}
RENDERED |= {"EXT_mesh_gpu_instancing"}
# Light that is mirrored or passes through: neither is rendered by this backend, and no base colour changes.
SHINE = "anisotropy clearcoat diffuse_transmission dispersion ior iridescence sheen specular transmission volume"
SHINE = {f"KHR_materials_{name}" for name in SHINE.split()}
# What changes no picture: lights and cameras of the file's own, other states, facts about the file.
UNSEEN = {"KHR_lights_punctual", "EXT_lights_image_based", "KHR_materials_variants", "KHR_animation_pointer"}
UNSEEN |= {"KHR_xmp_json_ld", "KHR_xmp", "EXT_mesh_features", "EXT_structural_metadata", "KHR_node_selectability"}
UNSEEN |= {"KHR_node_hoverability", "KHR_audio_emitter", "KHR_interactivity", "KHR_physics_rigid_bodies", "MSFT_lod"}
UNCHANGED = {"translation": (0.0, 0, 0), "rotation": (0.0, 0, 0, 1), "scale": (1.0, 1, 1)}


def read_gltf(path: Path, pictures: Pictures, findings: Findings, max_faces: int | None) -> list[Part]:
    """The parts of a file's default scene, or of its first, y up. Raises AssetError."""
    tree, chunk = parse(path.read_bytes())
    version = str(tree.get("asset", {}).get("version", "1.0"))
    if not version.startswith("2"):
        raise Unsupported("glTF 1.0", "is not read; only glTF 2.0 is")
    required = set(tree.get("extensionsRequired", ()))
    for name in sorted(required | set(tree.get("extensionsUsed", ())) | extensions_in(tree)):
        if name in RENDERED:
            findings.met(name)
        elif name in SHINE | UNSEEN:
            findings.met(name, "approximated" if name in SHINE else "rendered")
        elif name in required:
            raise Unsupported(name, "is required and not supported")
        else:
            findings.warn(f"{name} is not supported", name)
    return list(_Reader(path, tree, chunk, pictures, findings, max_faces).parts())


class _Reader:
    """One file while it is read. Indices are the file's."""

    def __init__(self, path: Path, tree: dict, chunk: bytes | None, pictures: Pictures, findings: Findings, most):
        self.tree, self.pictures = tree, pictures
        self.findings, self.max_faces, self.faces = findings, most, 0
        self.nodes = tree.get("nodes", [])
        self.parents = {}
        for number, node in enumerate(self.nodes):
            for child in node.get("children", ()):
                if self.parents.setdefault(child, number) != number:
                    raise AssetError(f"node {child} has two parents")
        self._worlds: dict[int, np.ndarray] = {}
        buffers = Buffers(path, tree, chunk, findings)
        self.view, self.accessor = buffers.view, buffers.accessor
        self.primitive = lru_cache(64)(self._primitive)

    # ------------------------------------------------------------ nodes

    def parts(self) -> Iterator[Part]:
        scenes = self.tree.get("scenes")
        everything = list(range(len(self.nodes)))
        roots = [number for number in everything if number not in self.parents] or everything  # none: a cycle
        waiting = list(reversed(scenes[self.tree.get("scene", 0)].get("nodes", ()) if scenes else roots))
        seen = set()
        while waiting:
            number = waiting.pop()
            node = self.nodes[number]
            if number in seen:
                raise AssetError(f"node {number} is in the scene twice")
            seen.add(number)
            if not node.get("extensions", {}).get("KHR_node_visibility", {}).get("visible", True):
                self.findings.met("hidden nodes")
                continue
            waiting += reversed(node.get("children", ()))
            if "mesh" in node:
                yield from self._mesh(number, node)

    def world(self, number: int) -> np.ndarray:
        """A node's matrix [4, 4] to the scene. Raises AssetError for cycles and what is no number."""
        chain = []
        while number is not None and number not in self._worlds:
            chain.append(number)
            if len(chain) > len(self.nodes):
                raise AssetError(f"node {number} is its own ancestor: the nodes form a cycle")
            number = self.parents.get(number)
        matrix = np.eye(4) if number is None else self._worlds[number]
        for number in reversed(chain):
            matrix = matrix @ _local(self.nodes[number])
            if not np.isfinite(matrix).all():
                raise AssetError(f"the matrix of node {number} is not made of finite numbers")
            self._worlds[number] = matrix
        return matrix

    def _mesh(self, number: int, node: dict) -> Iterator[Part]:
        mesh = self.tree["meshes"][node["mesh"]]
        weights = tuple(node.get("weights", mesh.get("weights", ())))
        world, joints = self.world(number)[None], None
        if "skin" in node:
            joints = self._joints(node["skin"])
            world = np.eye(4)[None]  # 3.7.3.3: the node's own transform does not count
        instancing = node.get("extensions", {}).get("EXT_mesh_gpu_instancing")
        if instancing:
            world = world @ self._instances(instancing["attributes"])
        for k in range(len(mesh["primitives"])):
            primitive = self.primitive(node["mesh"], k, weights)
            if primitive is None:
                continue
            part, skin = primitive
            self.faces += len(world) * len(part.faces)
            check_count(self.faces, self.max_faces)
            if joints is not None and skin:
                part = self._posed(part, skin, joints)
            for matrix in world:
                if np.linalg.matrix_rank(matrix[:3, :3]) < 2:  # 3.5.3: scaled away
                    self.findings.met("zero-scaled nodes")
                    continue
                yield part.moved(matrix)

    def _instances(self, attributes: dict[str, int]) -> np.ndarray:
        """The matrices [n, 4, 4] of EXT_mesh_gpu_instancing."""
        count = min(self.tree["accessors"][index]["count"] for index in attributes.values())
        check_count(count, self.max_faces)
        given = {key.lower(): self.accessor(index)[:count] for key, index in attributes.items()}
        return _transforms(*(given.get(key, np.tile(same, (count, 1))) for key, same in UNCHANGED.items()))

    def _joints(self, skin: int) -> np.ndarray:
        """Matrices [joints, 4, 4] from a skin's bind pose to the scene (3.7.3.1)."""
        self.findings.met("skins")
        skin = self.tree["skins"][skin]
        worlds = np.stack([self.world(joint) for joint in skin["joints"]])
        if "inverseBindMatrices" not in skin:
            return worlds
        return worlds @ self.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).swapaxes(1, 2)[: len(worlds)]

    def _posed(self, part: Part, skin: list[tuple[np.ndarray, np.ndarray]], joints: np.ndarray) -> Part:
        """A part where its joints hold it."""
        total = np.maximum(sum(weights.sum(1) for _, weights in skin), 1e-12)
        matrices = np.zeros((len(part.vertices), 4, 4))
        for numbers, weights in skin:
            for k in range(numbers.shape[1]):
                matrices += (weights[:, k] / total)[:, None, None] * joints[numbers[:, k].astype(int)]
        vertices = np.einsum("nij,nj->ni", matrices[:, :3, :3], part.vertices) + matrices[:, :3, 3]
        normals = None if part.normals is None else np.einsum("nij,nj->ni", matrices[:, :3, :3], part.normals)
        return Part(vertices, part.faces, part.material, part.tints, normals)

    # ------------------------------------------------------------ meshes

    def _primitive(self, mesh: int, number: int, weights: tuple[float, ...]):
        """A Part and its pairs of joints and weights; None if it holds no triangles."""
        primitive = self.tree["meshes"][mesh]["primitives"][number]
        kind = MODES[primitive.get("mode", 4)]
        if kind in ("points", "lines"):
            self.findings.warn(f"{kind} of mesh {mesh} are not rendered", kind)
            return None
        if kind != "triangles":
            self.findings.met(kind)
        attributes, indices = self._attributes(primitive)
        if "POSITION" not in attributes:
            return None
        for weight, target in zip(weights, primitive.get("targets", ()), strict=False):
            self.findings.met("morph targets")
            for key, index in target.items():
                if key in attributes and weight:
                    change = self.accessor(index)
                    wide = attributes[key].astype(float)
                    wide[:, : change.shape[1]] += weight * change
                    attributes[key] = wide
        positions = attributes["POSITION"].astype(float)
        for key, values in attributes.items():
            if len(values) != len(positions):
                raise AssetError(f"mesh {mesh} has {len(values)} {key} for {len(positions)} vertices")
        tints = attributes.get("COLOR_0")
        if tints is not None:
            self.findings.met("vertex colours")
            tints = np.concatenate([tints, np.ones((len(tints), 4 - tints.shape[1]))], 1).clip(0, 1)
        faces = _triangles(np.arange(len(positions)) if indices is None else indices, kind)
        if faces.size and int(faces.max()) >= len(positions):
            raise AssetError(f"mesh {mesh} uses vertex {faces.max()} of {len(positions)}")
        if primitive.get("mode", 4) == 4 and (len(positions) if indices is None else len(indices)) % 3:
            self.findings.warn(f"mesh {mesh}: the last triangle is not complete", "incomplete triangles")
        material = self._material(primitive.get("material"), attributes)
        if material.cutoff == 0 and tints is not None:
            tints[:, 3] = 1
        skin = [
            (attributes[f"JOINTS_{k}"], attributes[f"WEIGHTS_{k}"])
            for k in range(8)
            if f"JOINTS_{k}" in attributes and f"WEIGHTS_{k}" in attributes
        ]
        return Part(positions, faces, material, tints, attributes.get("NORMAL")), skin

    def _attributes(self, primitive: dict) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Arrays [n, width] by name, and the indices [m]."""
        draco = primitive.get("extensions", {}).get("KHR_draco_mesh_compression")
        if not draco:
            indices = self.accessor(primitive["indices"])[:, 0] if "indices" in primitive else None
            return {key: self.accessor(index) for key, index in primitive["attributes"].items()}, indices
        try:
            mesh = optional("DracoPy").decode(self.view(draco["bufferView"]))
        except ImportError as error:
            raise Unsupported("KHR_draco_mesh_compression", str(error)) from error
        found = {}
        for key, number in draco["attributes"].items():
            values = np.asarray(mesh.get_attribute_by_unique_id(number)["data"])
            shares = self.tree["accessors"][primitive["attributes"][key]].get("normalized")
            found[key] = normalized(values, shares and values.dtype.kind in "iu")
        return found, np.asarray(mesh.faces).reshape(-1)

    # ------------------------------------------------------------ materials

    def _material(self, index: int | None, attributes: dict[str, np.ndarray]) -> Material:
        """3.9. Without one: white, as the default material is."""
        data = {} if index is None else self.tree["materials"][index]
        more = data.get("extensions", {})
        label = f"material '{data.get('name', index)}'"
        old = more.get("KHR_materials_pbrSpecularGlossiness")
        pbr = data.get("pbrMetallicRoughness", {}) if old is None else old
        factor = np.array(pbr.get("baseColorFactor" if old is None else "diffuseFactor", (1, 1, 1, 1)), float)
        mode = data.get("alphaMode", "OPAQUE")
        if mode != "OPAQUE":
            self.findings.met(f"alpha mode {mode}")
        base = self._texture(pbr.get("baseColorTexture" if old is None else "diffuseTexture"), attributes, label)
        if base is not None:
            base = base.times(factor, linear=True)
        emission = np.array(data.get("emissiveFactor", (0, 0, 0)), float)
        emission *= more.get("KHR_materials_emissive_strength", {}).get("emissiveStrength", 1.0)
        glow = self._texture(data.get("emissiveTexture"), attributes, label) if emission.any() else None
        if emission.any():
            self.findings.met("emission")
        cutoff = {"OPAQUE": 0.0, "MASK": data.get("alphaCutoff", 0.5)}.get(mode)
        return Material(
            np.array([*to_srgb(factor[:3]), 1.0 if mode == "OPAQUE" else factor[3]]).clip(0, 1),
            base,
            cutoff=cutoff,
            emission=emission if emission.any() and not (glow is None and "emissiveTexture" in data) else None,
            glow=glow,
            linear=True,
            unlit="KHR_materials_unlit" in more,
        )

    def _texture(self, info: dict | None, attributes: dict[str, np.ndarray], label: str) -> Texture | None:
        """A texture with its coordinates moved by KHR_texture_transform; None, and a warning, if there is none."""
        if info is None:
            return None
        move = info.get("extensions", {}).get("KHR_texture_transform", {})
        name = f"TEXCOORD_{move.get('texCoord', info.get('texCoord', 0))}"
        if name not in attributes:
            self.findings.warn(f"{label}: its texture lies on {name}, which the mesh lacks", "missing textures")
            return None
        texture = self.tree["textures"][info["index"]]
        try:
            pixels = self._pixels(texture)
        except PictureError as error:
            self.findings.warn(f"{label}: texture {error}", "missing textures")
            return None
        if name != "TEXCOORD_0":
            self.findings.met("further texture coordinates")
        sampler = self.tree["samplers"][texture["sampler"]] if "sampler" in texture else {}
        wrap = tuple(WRAPS[sampler.get(key, 10497)] for key in ("wrapS", "wrapT"))
        nearest = sampler.get("magFilter") == NEAREST
        for kind in {*wrap, "nearest" if nearest else "repeat"} - {"repeat"}:
            self.findings.met(f"sampler {kind}")
        uv = attributes[name] * np.array(move.get("scale", (1, 1)), float)
        cos, sin = math.cos(move.get("rotation", 0)), math.sin(move.get("rotation", 0))
        uv = uv @ np.array([[cos, -sin], [sin, cos]]) + np.array(move.get("offset", (0, 0)), float)
        return Texture(pixels, np.stack([uv[:, 0], 1 - uv[:, 1]], -1), wrap, nearest)

    def _pixels(self, texture: dict) -> np.ndarray:
        """Of the first source that can be decoded: an extension's or the plain one. Raises PictureError."""
        extensions = texture.get("extensions", {})
        sources = [(value["source"], name) for name, value in extensions.items() if "source" in value]
        sources += [(texture["source"], "")] if "source" in texture else []
        reasons = []
        for index, extension in sources:
            image = self.tree["images"][index]
            try:
                return self._image(index, image)
            except PictureError as error:
                name = "" if "uri" in image else f"'{image.get('name', index)}' "
                reasons.append(f"{name}{error}{f' ({extension})' if extension else ''}")
        raise PictureError(", ".join(reasons) or "has no picture")

    def _image(self, index: int, image: dict) -> np.ndarray:
        uri = image.get("uri")
        if uri is None:
            return self.pictures.get(index, lambda: self.view(image["bufferView"]))
        if uri.startswith("data:"):
            return self.pictures.get(index, lambda: data_uri(uri))
        return self.pictures.named(urllib.parse.unquote(uri))


def _local(node: dict) -> np.ndarray:
    """A node's own matrix [4, 4] (3.5.3)."""
    if "matrix" in node:
        return np.array(node["matrix"], float).reshape(4, 4).T
    return _transforms(*(np.array([node.get(key, same)], float) for key, same in UNCHANGED.items()))[0]


def _transforms(move: np.ndarray, turn: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Matrices [n, 4, 4] of translations [n, 3], quaternions (x, y, z, w) [n, 4] and scales [n, 3]."""
    x, y, z, w = (turn / np.maximum(np.linalg.norm(turn, axis=1, keepdims=True), 1e-12)).T
    out = np.tile(np.eye(4), (len(move), 1, 1))
    out[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], -1)
    out[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], -1)
    out[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1)
    out[:, :3, :3] *= scale[:, None]
    out[:, :3, 3] = move
    return out


def _triangles(indices: np.ndarray, kind: str) -> np.ndarray:
    """[t, 3] of a list, strip or fan (3.7.2.1)."""
    indices = indices.astype(int)
    if kind == "triangles":
        return indices[: len(indices) // 3 * 3].reshape(-1, 3)
    if kind == "triangle strips":
        return strip(indices)
    k = np.arange(max(0, len(indices) - 2))
    return np.stack([indices[k + 1], indices[k + 2], indices[k * 0]], -1)
