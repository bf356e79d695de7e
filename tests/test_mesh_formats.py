"""What mesh files say is what is rendered: a file that uses a feature looks like one that needs none."""

import base64
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("embreex")
pytest.importorskip("mapbox_earcut")

from ouroboros3d.datagen import pictures
from ouroboros3d.datagen.assets import AssetError, Findings
from ouroboros3d.datagen.meshes import load_surface
from ouroboros3d.datagen.procedural import box
from ouroboros3d.datagen.raycast import Raycaster, orbit_pose

VERTICES, FACES, UV = box()  # [24, 3] in [-1, 1], [12, 3], [24, 2] with v downwards, as glTF counts
QUARTERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)


def png(pixels: np.ndarray, repeat: int = 64) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((repeat, repeat, 1), np.uint8))).save(file, "PNG")
    return file.getvalue()


TEXTURE = png(QUARTERS)
COMPONENTS = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


class Gltf:
    """Builds a file: arrays become accessors, the rest of the tree is given as it is."""

    def __init__(self):
        self.blob, self.tree = b"", {"asset": {"version": "2.0"}, "accessors": [], "bufferViews": []}

    def view(self, data: bytes) -> int:
        self.tree["bufferViews"].append({"buffer": 0, "byteOffset": len(self.blob), "byteLength": len(data)})
        self.blob += data + bytes(-len(data) % 4)
        return len(self.tree["bufferViews"]) - 1

    def array(self, values, dtype: str = "f4", **more) -> int:
        values = np.asarray(values, dtype)
        kind = TYPES[1 if values.ndim == 1 else values.shape[1]]
        self.tree["accessors"].append(
            {"bufferView": self.view(values.tobytes()), "componentType": COMPONENTS[dtype], "type": kind}
            | {"count": len(values)}
            | more
        )
        return len(self.tree["accessors"]) - 1

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


def cube(path: Path, vertices=VERTICES, uv=UV, texture: bytes | None = TEXTURE, factor=None, colours=None) -> Path:
    """The plain file: floats, one material, triangles."""
    g = Gltf()
    attributes = {"POSITION": g.array(vertices), "TEXCOORD_0": g.array(uv)}
    if colours is not None:
        attributes["COLOR_0"] = g.array(colours)
    pbr = {"baseColorTexture": g.image(texture)} if texture else {}
    if factor is not None:
        pbr["baseColorFactor"] = factor
    primitive = {"attributes": attributes, "indices": g.array(FACES.ravel(), "u2"), "material": 0}
    return g.write(path, meshes=[{"primitives": [primitive]}], materials=[{"pbrMetallicRoughness": pbr}])


def views(path: Path, up: str = "y") -> np.ndarray:
    caster = Raycaster(load_surface(path, up))
    return np.stack([caster.render(orbit_pose(a, e), 48, 2) for a, e in ((20, 25), (130, -5), (250, 60))]) / 255


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    seen = (one[..., 3] > 0) | (two[..., 3] > 0)
    one, two = (np.concatenate([x[..., :3] * x[..., 3:], x[..., 3:]], -1)[seen] for x in (one, two))
    return float(-10 * np.log10(max(((one - two) ** 2).mean(), 1e-10)))


def warnings_of(path: Path) -> dict[str, str]:
    findings = Findings()
    load_surface(path, findings=findings)
    return findings.warnings


def special(path: Path, feature: str) -> Path:
    """A cube that needs `feature` to look like the plain one."""
    g = Gltf()
    vertices, uv, info, sampler, texture, node, more = VERTICES, UV, {}, {}, TEXTURE, {"mesh": 0}, {}
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
        attributes["TEXCOORD_0"], sampler = g.array(2 - uv), {"wrapS": 33648, "wrapT": 33648}
    elif feature == "clamped":
        attributes["TEXCOORD_0"], sampler = g.array(3 * uv - 1), {"wrapS": 33071, "wrapT": 33071}
    elif feature == "nearest":
        texture, sampler = png(QUARTERS, 1), {"magFilter": 9728}
    elif feature == "strip":
        mode, indices = {"mode": 5}, np.concatenate([[*f, f[2]] for f in FACES[:, [0, 0, 1, 2]]])
    elif feature == "node weights":
        mesh = {"weights": [0.0, 0.0]}
        node["weights"] = [0.5, 1.0]
        vertices = VERTICES - [2, 0, 0] - 3 * UV[:, :1]
        targets = [
            {"POSITION": g.array(np.full((24, 3), [4.0, 0, 0]))},
            {"POSITION": g.array(3 * UV[:, :1] * [1, 1, 1])},
        ]
    elif feature == "matrix":
        node = {"mesh": 0, "matrix": np.diag([2.0, 2, 2, 1]).ravel().tolist()}
    elif feature == "webp":
        file = io.BytesIO()
        Image.fromarray(np.kron(QUARTERS, np.ones((16, 16, 1), np.uint8))).save(file, "WEBP", lossless=True)
        texture = file.getvalue()
    elif feature == "sparse only":
        attributes["POSITION"] = g.array(np.zeros((24, 3)))
        accessor = g.tree["accessors"][-1]
        del accessor["bufferView"]
        accessor["sparse"] = {
            "count": 24,
            "indices": {"bufferView": g.view(np.arange(24, dtype="u1").tobytes()), "componentType": 5121},
            "values": {"bufferView": g.view(vertices.astype("f4").tobytes())},
        }
    elif feature == "interleaved":
        rows = np.concatenate([vertices, uv, uv * 0], 1).astype("f4")
        view = g.view(rows.tobytes())
        g.tree["bufferViews"][view]["byteStride"] = 28
        for key, kind, offset in (("POSITION", "VEC3", 0), ("TEXCOORD_0", "VEC2", 12)):
            g.tree["accessors"].append(
                {"bufferView": view, "byteOffset": offset, "componentType": 5126, "type": kind, "count": 24}
            )
            attributes[key] = len(g.tree["accessors"]) - 1
    elif feature == "skin":
        attributes["JOINTS_0"] = g.array(np.tile([1, 0, 0, 0], (24, 1)), "u1")
        attributes["WEIGHTS_0"] = g.array(np.tile([255, 0, 0, 0], (24, 1)), "u1", normalized=True)
        inverse = [np.eye(4).ravel(), np.diag([0.5, 0.5, 0.5, 1]).ravel()]
        more["skins"] = [{"joints": [1, 2], "inverseBindMatrices": g.array(inverse)}]
        more["nodes"] = [{"mesh": 0, "skin": 0, "translation": [9, 9, 9]}, {"children": [2]}, {"scale": [3, 3, 3]}]
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
        more["materials"] = [
            {"extensions": {"KHR_materials_pbrSpecularGlossiness": {"diffuseTexture": g.image(TEXTURE)}}}
        ]
        more["extensionsUsed"] = ["KHR_materials_pbrSpecularGlossiness"]
    elif feature == "draco":
        mesh_ = pytest.importorskip("DracoPy")
        data = mesh_.encode(VERTICES.astype("f4"), FACES.astype("u4"), tex_coord=UV, quantization_bits=16)
        kinds = {a["attribute_type"]: a["unique_id"] for a in mesh_.decode(data).attributes}
        names = {"POSITION": kinds[0], "TEXCOORD_0": kinds[3]}
        mode = {"extensions": {"KHR_draco_mesh_compression": {"bufferView": g.view(data), "attributes": names}}}
        more["extensionsRequired"] = ["KHR_draco_mesh_compression"]
    elif feature == "meshopt":
        meshopt = pytest.importorskip("meshopt")
        rows = np.round(VERTICES * 127).astype("i1")
        rows = np.pad(rows, ((0, 0), (0, 1)))
        data = meshopt.encode_gltf_buffer(rows, "ATTRIBUTES")
        view = g.view(data)
        packed = {"buffer": 0, "byteLength": len(data), "byteStride": 4, "count": 24, "mode": "ATTRIBUTES"}
        packed["byteOffset"] = g.tree["bufferViews"][view]["byteOffset"]
        g.tree["bufferViews"][view] |= {"byteStride": 4, "extensions": {"EXT_meshopt_compression": packed}}
        g.tree["accessors"].append({"bufferView": view, "componentType": 5120, "type": "VEC3", "count": 24})
        g.tree["accessors"][-1]["normalized"] = True
        attributes["POSITION"] = len(g.tree["accessors"]) - 1
        more["extensionsRequired"] = ["EXT_meshopt_compression", "KHR_mesh_quantization"]
    attributes.setdefault("POSITION", g.array(vertices))
    attributes.setdefault("TEXCOORD_0", g.array(uv))
    primitive = {"attributes": attributes, "indices": g.array(indices, "u2"), "material": 0} | mode
    if feature == "node weights":
        primitive["targets"] = targets
    image = g.image(texture)
    if sampler:
        g.tree["samplers"], g.tree["textures"][-1]["sampler"] = [sampler], 0
    if feature == "webp":
        texture = g.tree["textures"][-1]
        texture["extensions"] = {"EXT_texture_webp": {"source": texture.pop("source")}}
        more["extensionsRequired"] = ["EXT_texture_webp"]
    more.setdefault("materials", [{"pbrMetallicRoughness": {"baseColorTexture": image | info}}])
    more.setdefault("nodes", [node])
    return g.write(path, meshes=[{"primitives": [primitive]} | mesh], **more)


FEATURES = [
    "uv i8",
    "quantised",
    "plain integers",
    "texCoord 2",
    "transform",
    "mirrored",
    "clamped",
    "nearest",
    "strip",
]
FEATURES += ["node weights", "matrix", "webp", "sparse only", "interleaved", "skin", "hidden", "specular-glossiness"]
FEATURES += ["draco", "meshopt"]


@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
@pytest.mark.parametrize("feature", FEATURES)
def test_a_gltf_feature_looks_like_the_plain_file(feature, suffix, tmp_path):
    path = special(tmp_path / f"special{suffix}", feature)
    figure = psnr(views(path), views(cube(tmp_path / "plain.glb")))
    assert figure > 30, figure
    assert warnings_of(path) == {}


def material_cube(path: Path, material: dict, textures: dict | None = None, colours=None, used=()) -> Path:
    """A cube under a material; textures: PNG data by the place of the texture in it, like emissiveTexture."""
    g = Gltf()
    attributes = {"POSITION": g.array(VERTICES), "TEXCOORD_0": g.array(UV)}
    if colours is not None:
        attributes["COLOR_0"] = g.array(*colours)
        g.tree["accessors"][-1]["normalized"] = colours[1] != "f4"
    material = json.loads(json.dumps(material))
    for place, data in (textures or {}).items():
        holder = material
        *way, last = place.split("/")
        for key in way:
            holder = holder.setdefault(key, {})
        holder[last] = g.image(data)
    primitive = {"attributes": attributes, "indices": g.array(FACES.ravel(), "u2"), "material": 0}
    return g.write(path, meshes=[{"primitives": [primitive]}], materials=[material], extensionsUsed=list(used))


def colour_of(path: Path) -> np.ndarray:
    """Mean RGBA of the inside of a view."""
    return views(path)[0][20:28, 20:28].mean((0, 1))


BASE = "pbrMetallicRoughness/baseColorTexture"
RGBA = np.dstack([QUARTERS, np.array([[51, 51], [204, 204]], np.uint8)])


def test_alpha_modes_and_cutoffs(tmp_path):
    plain = views(cube(tmp_path / "plain.glb"))
    texture = {BASE: png(RGBA)}

    def view(**material):
        return views(material_cube(tmp_path / "m.glb", material, texture))

    assert psnr(view(), plain) > 30 and psnr(view(alphaMode="MASK", alphaCutoff=0.1), plain) > 30
    half = view(alphaMode="MASK")
    assert 0.3 < half[..., 3].mean() / plain[..., 3].mean() < 0.99
    assert psnr(half, view(alphaMode="MASK", alphaCutoff=0.7)) > 25
    with pytest.raises(AssetError):  # nothing is left: found by the renderer of orbits
        if not view(alphaMode="MASK", alphaCutoff=0.9)[..., 3].any():
            raise AssetError("nothing is to be seen")
    pane = {"pbrMetallicRoughness": {"baseColorFactor": [1, 1, 1, 0.25]}, "alphaMode": "BLEND"}
    alpha = views(material_cube(tmp_path / "pane.glb", pane))[0, 24, 24, 3]
    assert alpha == pytest.approx(1 - 0.75**2, abs=0.02)  # front and back


def test_factors_and_vertex_colours_are_light_intensities(tmp_path):
    half = material_cube(tmp_path / "f.glb", {"pbrMetallicRoughness": {"baseColorFactor": [0.5, 0.5, 0.5, 1]}})
    for name, values in (("f4", 0.5), ("u2", 32768), ("u1", 128)):
        for width in (3, 4):
            colours = np.full((24, width), values)
            if width == 4:
                colours[:, 3] = 0.1 if name == "f4" else 3  # opaque as the material says no more
            tinted = material_cube(tmp_path / "t.glb", {}, colours=(colours, name))
            assert psnr(views(half), views(tinted)) > 40
    textured = cube(tmp_path / "b.glb", factor=[0.5, 0.5, 0.5, 1])
    doubly = material_cube(tmp_path / "c.glb", {}, {BASE: TEXTURE}, (np.full((24, 3), 0.5), "f4"))
    assert psnr(views(textured), views(doubly)) > 40


def test_light_of_a_materials_own(tmp_path):
    black = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0, 1]}}
    green = colour_of(material_cube(tmp_path / "a.glb", black | {"emissiveFactor": [0, 0.5, 0]}))
    assert green[1] == pytest.approx(0.735, abs=0.02) and green[0] < 0.06
    strong = black | {
        "emissiveFactor": [0, 0.1, 0],
        "extensions": {"KHR_materials_emissive_strength": {"emissiveStrength": 5}},
    }
    assert colour_of(material_cube(tmp_path / "b.glb", strong))[1] == pytest.approx(0.735, abs=0.02)
    glowing = views(
        material_cube(tmp_path / "c.glb", black | {"emissiveFactor": [1, 1, 1]}, {"emissiveTexture": TEXTURE})
    )
    unlit = {"extensions": {"KHR_materials_unlit": {}}}
    flat = views(material_cube(tmp_path / "d.glb", unlit, {BASE: TEXTURE}, used=["KHR_materials_unlit"]))
    assert psnr(glowing, flat) > 25
    assert (flat[flat[..., 3] == 1][:, :3].max(1) > 0.99).mean() > 0.9  # no shading at all


def test_pictures_of_every_mode(tmp_path):
    grey = np.array([[0, 80], [160, 255]], np.uint8)
    plain = views(cube(tmp_path / "p.glb", texture=png(np.dstack([grey] * 3))))
    file = io.BytesIO()
    Image.fromarray(np.kron(grey, np.ones((64, 64))).astype(np.uint16) * 257).save(file, "PNG")
    assert psnr(plain, views(cube(tmp_path / "g.glb", texture=file.getvalue()))) > 40
    file = io.BytesIO()
    Image.open(io.BytesIO(TEXTURE)).convert("P").save(file, "PNG")
    assert psnr(views(cube(tmp_path / "rgb.glb")), views(cube(tmp_path / "pal.glb", texture=file.getvalue()))) > 30


def test_what_has_no_triangles_or_no_picture_is_reported(tmp_path):
    def broken(**change):
        g = Gltf()
        attributes = {"POSITION": g.array(VERTICES), "TEXCOORD_0": g.array(UV)}
        primitives = [{"attributes": attributes, "indices": g.array(FACES.ravel(), "u2"), "material": 0}]
        materials = [{"name": "wood", "pbrMetallicRoughness": {"baseColorTexture": g.image(TEXTURE)}}]
        tree = {"meshes": [{"primitives": primitives}], "materials": materials}
        for key, value in change.items():
            if key == "images":
                tree["images"] = value
            elif key == "mode":
                primitives.append({"attributes": attributes, "mode": value})
            elif key == "texCoord":
                materials[0]["pbrMetallicRoughness"]["baseColorTexture"]["texCoord"] = value
            else:
                tree[key] = value
        return " ".join(warnings_of(g.write(tmp_path / "b.gltf", **tree)))

    assert broken() == ""
    assert broken(images=[{"uri": "gone%20.png"}]) == "material 'wood': texture 'gone .png' is missing"
    assert "'http://x/y.png' is an address" in broken(images=[{"uri": "http://x/y.png"}])
    (tmp_path.parent / "outside.png").write_bytes(TEXTURE)
    assert "'../outside.png' is missing" in broken(images=[{"uri": "../outside.png"}])
    assert "is no picture" in broken(images=[{"uri": "data:image/png;base64,AAAA"}])
    assert "TEXCOORD_3" in broken(texCoord=3)
    assert "points of mesh 0" in broken(mode=0) and "lines of mesh 0" in broken(mode=3)
    assert broken(extensionsUsed=["VENDOR_magic"]) == "VENDOR_magic is not supported"
    assert broken(nodes=[{"mesh": 0, "extensions": {"VENDOR_x": {}}}]) == "VENDOR_x is not supported"  # nor listed
    postscript = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n").decode()
    assert "is not run" in broken(images=[{"uri": f"data:image/png;base64,{postscript}"}])


def refused(tree: dict, blob: bytes, path: Path) -> str:
    g = Gltf()
    g.blob = blob
    with pytest.raises(AssetError) as error:
        load_surface(g.write(path, **tree), max_faces=10_000)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extensionsRequired": ["VENDOR_magic"]}, "VENDOR_magic is required"),
        ({"asset": {"version": "1.0"}}, "glTF 1.0"),
        ({"nodes": [{"children": [1]}, {"children": [0], "mesh": 0}]}, "twice|cycle"),
        ({"nodes": [{"children": [1]}, {"children": [2]}, {"children": [1], "mesh": 0}]}, "two parents"),
        ({"nodes": [{"children": [1], "mesh": 0}, {"children": [0]}], "scenes": []}, "twice|cycle"),
        ({"nodes": [{"mesh": -1}]}, "index -1"),
        ({"nodes": [{"mesh": 0, "skin": -1}], "skins": [{"joints": [0]}]}, "index -1"),
        ({"nodes": [{"mesh": 0, "translation": [float("nan"), 0, 0]}]}, "finite"),
        ({"nodes": [{"mesh": 0, "rotation": [float("nan"), 0, 0, 1]}]}, "finite"),
        ({"nodes": [{"mesh": 0, "scale": [1e200, 1e200, 1e200]}]}, "too large"),
        ({"accessors": [{"componentType": 5126, "type": "VEC3", "count": 10**9}]}, "claims 1,000,000,000"),
        ({"accessors": [{"bufferView": 0, "componentType": 5126, "type": "VEC3", "count": 9}]}, "cut short"),
        ({"bufferViews": [{"buffer": 0, "byteLength": 10**12}]}, "cut short"),
        ({"buffers": [{"byteLength": 36, "uri": "http://example.com/b.bin"}]}, "is an address"),
        ({"buffers": [{"byteLength": 36, "uri": "../b.bin"}]}, "folder"),
        ({"buffers": [{"byteLength": 36, "uri": "/etc/hostname"}]}, "folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_gltf_files_are_refused_by_name(change, reason, tmp_path):
    (tmp_path.parent / "b.bin").write_bytes(bytes(36))
    g = Gltf()
    accessor = g.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    g.write(tmp_path / "t.gltf", meshes=[{"primitives": [{"attributes": {"POSITION": accessor}}]}])
    assert len(load_surface(tmp_path / "t.gltf").faces) == 1
    (tmp_path / "t.gltf").write_text(json.dumps(g.tree | change))
    with pytest.raises(AssetError, match=reason) as error:
        load_surface(tmp_path / "t.gltf", max_faces=10_000)
    assert str(tmp_path / "t.gltf") in str(error.value)


def test_instances_count_before_they_are_made(tmp_path):
    def row(count: int) -> Path:
        g = Gltf()
        primitive = {"attributes": {"POSITION": g.array(VERTICES)}, "indices": g.array(FACES.ravel(), "u2")}
        moves = np.zeros((count, 3))
        moves[:, 0] = 3 * np.arange(count)
        turns = np.tile([0, 0, 0, 127], (count, 1))
        attributes = {"TRANSLATION": g.array(moves), "ROTATION": g.array(turns, "i1", normalized=True)}
        node = {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": attributes}}}
        used = ["EXT_mesh_gpu_instancing"]
        return g.write(tmp_path / "row.glb", meshes=[{"primitives": [primitive]}], nodes=[node], extensionsUsed=used)

    surface = load_surface(row(3))
    assert len(surface.faces) == 36
    assert np.ptp(surface.vertices, 0) / surface.scale == pytest.approx([8, 2, 2])
    with pytest.raises(AssetError, match="limit of 1,000"):
        load_surface(row(900), max_faces=1000)


def compressed(path: Path, feature: str) -> Path:
    """A triangle whose data only a decoder understands."""
    g = Gltf()
    packed = {"bufferView": g.view(b"packed  "), "attributes": {"POSITION": 7}}
    primitive = {"attributes": {"POSITION": g.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])}}
    if feature == "KHR_draco_mesh_compression":
        primitive["extensions"] = {feature: packed}
    else:
        view = {"buffer": 0, "byteLength": 8, "byteStride": 12, "count": 3, "mode": "ATTRIBUTES"}
        g.tree["bufferViews"][-1]["extensions"] = {feature: view}
    return g.write(path, meshes=[{"primitives": [primitive]}], extensionsRequired=[feature])


@pytest.mark.parametrize("feature", ["KHR_draco_mesh_compression", "EXT_meshopt_compression"])
def test_a_decoder_is_used_or_named(feature, tmp_path, monkeypatch):
    """With a stand-in for the decoders, so that it is tested where they are not installed."""
    corners = np.array([[0, 0, 0], [2, 0, 0], [0, 1, 0]], "f4")

    class Decoder:
        faces = np.array([[0, 1, 2]])

        def decode(self, data):
            assert data == b"packed  "
            return self

        def get_attribute_by_unique_id(self, number):
            return {"data": corners} if number == 7 else None

        def decode_gltf_buffer(self, data, count, stride, mode, filter_):
            return corners

    def missing(module: str):
        raise ImportError(f"needs the package {module}: pip install {module}")

    path = compressed(tmp_path / "t.glb", feature)
    for name in ("gltf", "gltf_buffers"):
        monkeypatch.setattr(f"ouroboros3d.datagen.{name}.optional", lambda module: Decoder())
    surface = load_surface(path)
    assert np.ptp(surface.vertices, 0) / surface.scale == pytest.approx([2, 0, 1])
    for name in ("gltf", "gltf_buffers"):
        monkeypatch.setattr(f"ouroboros3d.datagen.{name}.optional", missing)
    with pytest.raises(AssetError, match=f"{feature} needs the package"):
        load_surface(path)


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(file, "PNG")
    findings = Findings()
    load_surface(cube(tmp_path / "big.glb", texture=file.getvalue()), findings=findings)
    assert "too many pixels" in " ".join(findings.warnings)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    assert "128 x 128" in " ".join(warnings_of(cube(tmp_path / "cube.glb")))


# ---------------------------------------------------------------- OBJ


def obj_cube(folder: Path, mtl: str, lines: str = "mtllib m.mtl\nusemtl a", uv=UV, texture: str = "t.png") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / texture).write_bytes(TEXTURE)
    (folder / "m.mtl").write_text(mtl)
    rows = [f"v {x} {y} {z}" for x, y, z in VERTICES] + [f"vt {u} {1 - v}" for u, v in uv]
    head, _, tail = lines.partition("\n")
    rows = [head, *rows, tail] + ["f " + " ".join(f"{i + 1}/{i + 1}" for i in face) for face in FACES]
    (folder / "c.obj").write_text("\n".join(rows) + "\n")
    return folder / "c.obj"


PLAIN_MTL = "newmtl a\nKd 1 1 1\nmap_Kd t.png\n"


@pytest.mark.parametrize(
    ("mtl", "lines"),
    [
        (PLAIN_MTL, "mtllib m.mtl\nusemtl a"),
        (PLAIN_MTL, "mtllib M.MTL\nusemtl A"),
        (PLAIN_MTL.replace("t.png", "sub\\T.PNG"), "mtllib m.mtl\nusemtl a"),
        (PLAIN_MTL.replace("map_Kd", "\tmap_kd -blendu on -mm 0 1"), "mtllib other.mtl m.mtl\nusemtl a"),
        ("\ufeff" + PLAIN_MTL.replace("\n", "\r\n"), "\ufeffmtllib m.mtl\nusemtl a"),
        (PLAIN_MTL.replace("newmtl a", "newmtl a b"), "mtllib m.mtl\nusemtl a b  # with a space"),
        (PLAIN_MTL.replace("t.png", "-s 1 1 1 -o 2 3 0 t.png"), "mtllib m.mtl\nusemtl a"),
        (PLAIN_MTL + "Ks 1 1 1\nd 1\nillum 2\n", "mtllib m.mtl\nusemtl \\\na"),
        (PLAIN_MTL.replace("newmtl a", "newmtl a #25"), "mtllib m.mtl # all\nusemtl a #25"),
        (PLAIN_MTL.replace("1 1 1", "1 1 1 # white"), "mtllib m.mtl\nusemtl a"),
    ],
)
def test_materials_of_obj_files(mtl, lines, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "other.mtl").write_text("newmtl z\nKd 0 1 0\n")
    path = obj_cube(tmp_path / "o", mtl, lines)
    assert psnr(views(path), views(cube(tmp_path / "plain.glb"))) > 30
    assert warnings_of(path) == {}


def test_maps_of_opacity_and_light_and_factors_of_obj_files(tmp_path):
    hole = np.array([[[0] * 3, [255] * 3], [[255] * 3, [255] * 3]], np.uint8)
    path = obj_cube(tmp_path / "o", PLAIN_MTL + "map_d a.png\n")
    (tmp_path / "o" / "a.png").write_bytes(png(hole))
    cut = png(np.dstack([QUARTERS, hole[..., 0]]))
    same = material_cube(tmp_path / "c.glb", {"alphaMode": "BLEND"}, {BASE: cut})
    assert psnr(views(path), views(same)) > 30
    glow = colour_of(obj_cube(tmp_path / "k", "newmtl a\nKd 0 0 0\nKe 0 0.5 0\n"))
    assert glow[1] == pytest.approx(0.5, abs=0.03) and glow[0] < 0.06
    dark = obj_cube(tmp_path / "d", PLAIN_MTL.replace("1 1 1", "0.5 0.5 0.5"))
    twice = obj_cube(tmp_path / "s", "newmtl a\nmap_Kd -mm 0 0.5 t.png\n")
    assert psnr(views(dark), views(twice)) > 40
    black = obj_cube(tmp_path / "z", PLAIN_MTL.replace("1 1 1", "0 0 0"))  # as some exporters write it
    assert psnr(views(black), views(cube(tmp_path / "plain.glb"))) > 30
    pane = obj_cube(tmp_path / "t", "newmtl a\nKd 1 1 1\nTr 0.75\n")
    assert views(pane)[0, 24, 24, 3] == pytest.approx(1 - 0.75**2, abs=0.02)


def test_faces_of_obj_files_count_in_every_way(tmp_path):
    rows = [f"v {x} {y} {z}" for x, y, z in VERTICES]
    plain, back, mixed = ([*rows] for _ in range(3))
    plain += ["f {} {} {}".format(*(face + 1)) for face in FACES]
    back += ["f {} {} {}".format(*(face - 24)) for face in FACES]
    mixed += ["vn 0 0 1", "vt 0 0"]
    forms = ["{}", "{}/1", "{}//1", "{}/1/1", "{}/"]
    mixed += ["f " + " ".join(forms[k % 5].format(i + 1) for i in face) for k, face in enumerate(FACES)]
    pictures_ = []
    for name, lines in (("plain", plain), ("back", back), ("mixed", mixed)):
        (tmp_path / f"{name}.obj").write_text("\n".join(lines))
        pictures_.append(views(tmp_path / f"{name}.obj"))
    assert psnr(*pictures_[:2]) > 60 and psnr(pictures_[0], pictures_[2]) > 60
    coloured = [f"{row} {r} {g} {b}" for row, (r, g, b) in zip(rows, np.repeat([[255, 0, 0]], 24, 0), strict=True)]
    (tmp_path / "tints.obj").write_text("\n".join(coloured + plain[24:]))
    assert colour_of(tmp_path / "tints.obj")[:2] == pytest.approx([0.75, 0.03], abs=0.25)
    (tmp_path / "bad.obj").write_text("\n".join([*plain, "f 1 2 99"]))
    with pytest.raises(AssetError, match="v 99 of 24"):
        load_surface(tmp_path / "bad.obj")


def test_what_is_lost_of_an_obj_file_is_reported(tmp_path):
    def lost(mtl: str, lines: str = "mtllib m.mtl\nusemtl a") -> str:
        return " | ".join(warnings_of(obj_cube(tmp_path / "o", mtl, lines)))

    assert lost(PLAIN_MTL, "mtllib gone.mtl\nusemtl a") == "material file 'gone.mtl' is missing"
    assert lost(PLAIN_MTL, "mtllib m.mtl\nusemtl b") == "material 'b' is in no material file"
    assert (
        lost("newmtl a\nmap_Kd http://x/y.png\n")
        == "material 'a': texture 'http://x/y.png' is an address; nothing is fetched"
    )
    assert "option -cc" in lost(PLAIN_MTL.replace("t.png", "-cc on t.png"))
    assert "lines are not rendered" in lost(PLAIN_MTL, "mtllib m.mtl\nusemtl a\nl 1 2")
    assert "free-form" in lost(PLAIN_MTL, "mtllib m.mtl\nusemtl a\ncstype bspline")
    assert lost(PLAIN_MTL, "mtllib m.mtl\nusemtl a\nusemap t\ns 1") == "statement 'usemap' is not rendered"
    assert "fewer than three" in lost(PLAIN_MTL, "mtllib m.mtl\nusemtl a\nf 1 2")
    assert lost(PLAIN_MTL + "decal t.png\n") == "material 'a': decal is not rendered"
    for key, value in (("d", "half"), ("kd", "1 nan 1"), ("kd", "1 1"), ("ke", "x")):
        assert lost(f"{PLAIN_MTL}{key} {value}") == f"material 'a': {key} '{value}' is not understood"
    assert "map_d" not in lost(PLAIN_MTL) and "'a.png' is missing" in lost(PLAIN_MTL + "map_d a.png\n")


# ---------------------------------------------------------------- PLY, OFF, STL

U = np.array([(0, 0), (1, 0), (1, 2), (2, 2), (2, 0), (3, 0), (3, 3), (0, 3)], float)


def test_ply_in_every_form(tmp_path):
    """A beam with concave ends, in colours, as text and binary; the same as triangles."""
    points = np.concatenate([np.column_stack([U, np.full(8, z)]) for z in (0.0, 1.0)])
    faces = [list(range(8)), list(range(15, 7, -1))] + [[k, (k + 1) % 8, (k + 1) % 8 + 8, k + 8] for k in range(8)]
    tints = (points / 3 * 255).round().astype(int)
    reference = None
    for form in ("ascii", "binary_little_endian", "binary_big_endian"):
        for kind, names in (
            ("uchar", "red green blue"),
            ("float", "diffuse_red diffuse_green diffuse_blue"),
            ("ushort", "r g b"),
        ):
            order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[form]
            scale = {"uchar": 1, "float": 1 / 255, "ushort": 257}[kind]
            head = ["ply", f"format {form} 1.0", "comment by a test", "element vertex 16"]
            head += [f"property double {axis}" for axis in "xyz"] + [
                f"property {kind} {name}" for name in names.split()
            ]
            head += ["element face 10", "property uchar flag", "property list uchar int vertex_indices", "end_header"]
            body = b""
            letter = {"uchar": "B", "float": "f", "ushort": "H"}[kind]
            for point, tint in zip(points, tints * scale, strict=True):
                row = [*point, *(tint.tolist() if kind == "float" else tint.astype(int).tolist())]
                body += (
                    struct.pack(f"{order}ddd{letter * 3}", *row) if order else (" ".join(map(str, row)) + "\n").encode()
                )
            for face in faces:
                row = [7, len(face), *face]
                body += (
                    struct.pack(f"{order}BB{len(face)}i", *row)
                    if order
                    else (" ".join(map(str, row)) + "\r\n").encode()
                )
            (tmp_path / "beam.ply").write_bytes("\n".join(head).encode() + b"\n" + body)
            picture = views(tmp_path / "beam.ply")
            reference = picture if reference is None else reference
            assert psnr(picture, reference) > 40
            (tmp_path / "cut.ply").write_bytes("\n".join(head).encode() + b"\n" + body[:-9])
            with pytest.raises(AssetError, match="cut short"):
                load_surface(tmp_path / "cut.ply")
    surface = load_surface(tmp_path / "beam.ply")
    assert surface.face_areas().sum() / surface.scale**2 == pytest.approx(2 * 7 + 16)
    off = [
        "COFF",
        "16 10 0",
        *(" ".join(map(str, [*p, *t, 255])) for p, t in zip(points, tints, strict=True)),
    ]
    off += [" ".join(map(str, [len(face), *face])) for face in faces]
    (tmp_path / "beam.off").write_text("# a beam\n" + "\n".join(off))
    assert psnr(views(tmp_path / "beam.off"), reference) > 40
    huge = "\n".join(head).replace("vertex 16", "vertex 1000000000").encode() + b"\n" + body
    (tmp_path / "huge.ply").write_bytes(huge)
    with pytest.raises(AssetError, match="announces 1,000,000,000 vertex"):
        load_surface(tmp_path / "huge.ply")


def test_texture_and_strips_of_ply(tmp_path):
    (tmp_path / "t.png").write_bytes(TEXTURE)
    rows = "\n".join(" ".join(map(str, [*p, u, 1 - v])) for p, (u, v) in zip(VERTICES, UV, strict=True))
    wedges = "\n".join(
        f"3 {a} {b} {c} 6 " + " ".join(f"{UV[k, 0]} {1 - UV[k, 1]}" for k in (a, b, c)) for a, b, c in FACES
    )
    head = "ply\nformat ascii 1.0\ncomment TextureFile t.png\nelement vertex 24\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz")
    faces = "element face 12\nproperty list uchar int vertex_index\n"
    (tmp_path / "s.ply").write_text(
        f"{head}property float s\nproperty float t\n{faces}end_header\n{rows}\n"
        + "\n".join(f"3 {a} {b} {c}" for a, b, c in FACES)
    )
    (tmp_path / "w.ply").write_text(
        f"{head}{faces}property list uchar float texcoord\nend_header\n"
        + "\n".join(" ".join(map(str, p)) for p in VERTICES)
        + f"\n{wedges}\n"
    )
    plain = views(cube(tmp_path / "plain.glb"))
    assert psnr(views(tmp_path / "s.ply"), plain) > 30 and psnr(views(tmp_path / "w.ply"), plain) > 30
    strip = " ".join(f"{a} {b} {c} -1" for a, b, c in FACES)
    text = (tmp_path / "s.ply").read_text().replace("face 12", "tristrips 1").partition(f"{rows}\n")
    (tmp_path / "strips.ply").write_text(text[0].replace("vertex_index", "vertex_indices") + text[1] + f"48 {strip}\n")
    (tmp_path / "strips.ply").write_text(
        (tmp_path / "strips.ply").read_text().replace("list uchar int", "list int int")
    )
    assert psnr(views(tmp_path / "strips.ply"), plain) > 30
    (tmp_path / "t.png").unlink()
    assert list(warnings_of(tmp_path / "s.ply")) == ["texture 't.png' is missing"]


def test_colours_of_faces(tmp_path):
    rows = [" ".join(map(str, p)) for p in VERTICES]
    paint = ["255 0 0", "0 255 0", "0 0 255", "255 255 0", "0 255 255", "255 0 255"]
    ply = "ply\nformat ascii 1.0\nelement vertex 24\n" + "".join(f"property float {a}\n" for a in "xyz")
    ply += "element face 12\nproperty list uchar int vertex_indices\n"
    ply += "".join(f"property uchar {c}\n" for c in ("red", "green", "blue")) + "end_header\n" + "\n".join(rows) + "\n"
    faces = [f"3 {a} {b} {c} {paint[k // 2]}" for k, (a, b, c) in enumerate(FACES)]
    (tmp_path / "f.ply").write_text(ply + "\n".join(faces) + "\n")
    (tmp_path / "f.off").write_text("OFF\n24 12 0\n" + "\n".join(rows + faces))
    assert psnr(views(tmp_path / "f.ply"), views(tmp_path / "f.off")) > 60
    colours = np.array([[*map(int, p.split())] for p in paint]) // 255 * 31
    for head, shifts, valid in ((b"COLOR=\0\0\0\0", (0, 5, 10), 0), (b"", (10, 5, 0), 1 << 15)):
        data = head.ljust(80, b" ") + struct.pack("<I", 12)
        for k, face in enumerate(FACES):
            bits = valid | sum(int(c) << s for c, s in zip(colours[k // 2], shifts, strict=True))
            data += struct.pack("<12fH", 0, 0, 0, *VERTICES[face].ravel(), bits)
        (tmp_path / "f.stl").write_bytes(data)
        assert psnr(views(tmp_path / "f.ply"), views(tmp_path / "f.stl")) > 60
    (tmp_path / "f.stl").write_bytes(data[:-20])
    with pytest.raises(AssetError, match="cut short: 12 triangles need 684 bytes, it has 664"):
        load_surface(tmp_path / "f.stl")
    facets = "\n".join(
        "facet normal 0 0 0\nouter loop\n"
        + "\n".join("vertex {} {} {}".format(*VERTICES[k]) for k in face)
        + "\nendloop\nendfacet"
        for face in FACES
    )
    (tmp_path / "t.stl").write_text(f"solid cube\n{facets}\nendsolid cube\n")
    assert len(load_surface(tmp_path / "t.stl").faces) == 12
    (tmp_path / "t.stl").write_text(f"solid cube\n{facets[:-40]}")
    with pytest.raises(AssetError, match="cut short"):
        load_surface(tmp_path / "t.stl")
    (tmp_path / "b.off").write_bytes(b"OFF BINARY\n\0\0\0\1")
    with pytest.raises(AssetError, match="binary OFF is not supported"):
        load_surface(tmp_path / "b.off")


PLY_HEAD = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
PLY_FACES = "element face 1\nproperty list uchar int vertex_indices\n"
PLY_BODY = "end_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"
FACET = struct.pack("<12fH", 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0)
STL = "solid s\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"


@pytest.mark.parametrize(
    ("name", "text", "warning"),
    [
        ("t.ply", PLY_HEAD + PLY_FACES + PLY_BODY, None),
        ("t.ply", (PLY_HEAD + PLY_FACES + PLY_BODY).replace("\n", "\r"), None),
        ("t.ply", PLY_HEAD + PLY_FACES + "element void 1000000000\n" + PLY_BODY, None),
        (
            "t.ply",
            PLY_HEAD + PLY_FACES + "element material 1\nproperty int red\n" + PLY_BODY + "9\n",
            "elements 'material' are not rendered",
        ),
        ("t.ply", PLY_HEAD + PLY_FACES + PLY_BODY + "3 0 1 2\n", "has more data than its header announces"),
        ("t.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", None),
        ("t.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n3 0 1 2\n", "has more data than its header announces"),
        ("t.stl", STL + "endsolid s\n", None),
        ("t.stl", STL, "is cut short: it does not end with endsolid"),
        ("t.stl", STL + "endsolid s\n" + STL, "is cut short: it does not end with endsolid"),
        ("t.stl", bytes(80) + struct.pack("<I", 1) + 2 * FACET, "has more data than its header announces"),
    ],
)
def test_what_does_not_fit_its_header_is_reported(name, text, warning, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert list(warnings_of(tmp_path / name)) == ([warning] if warning else [])
    assert len(load_surface(tmp_path / name).faces) in (1, 2)
