"""What a .gltf or .glb file says is what is rendered: one that uses a feature looks like one that needs none."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("embreex")
pytest.importorskip("mapbox_earcut")
from mesh_files import (
    BASE,
    FEATURES,
    MORE_FEATURES,
    QUARTERS,
    TEXTURE,
    Gltf,
    colour_of,
    cube,
    encoded,
    plain_views,
    png,
    psnr,
    special,
    views,
    warnings_of,
)

from ouroboros3d.datagen import pictures
from ouroboros3d.datagen.assets import AssetError
from ouroboros3d.datagen.meshes import load_surface


@pytest.mark.parametrize("suffix", [".glb", ".gltf"])
@pytest.mark.parametrize("feature", [*FEATURES, *MORE_FEATURES])
def test_a_gltf_feature_looks_like_the_plain_file(feature, suffix, tmp_path):
    path = special(tmp_path / f"special{suffix}", feature)
    assert psnr(views(path), plain_views()) > 30
    assert warnings_of(path) == []


def test_alpha_modes_and_cutoffs(tmp_path):
    plain = plain_views()
    texture = {BASE: png(np.dstack([QUARTERS, np.array([[51, 51], [204, 204]], np.uint8)]))}

    def view(**material):
        return views(cube(tmp_path / "m.glb", material, texture))

    assert psnr(view(), plain) > 30 and psnr(view(alphaMode="MASK", alphaCutoff=0.1), plain) > 30
    half = view(alphaMode="MASK")
    assert 0.3 < half[..., 3].mean() / plain[..., 3].mean() < 0.99
    assert psnr(half, view(alphaMode="MASK", alphaCutoff=0.7)) > 25
    assert not view(alphaMode="MASK", alphaCutoff=0.9)[..., 3].any()
    pane = {"pbrMetallicRoughness": {"baseColorFactor": [1, 1, 1, 0.25]}, "alphaMode": "BLEND"}
    alpha = views(cube(tmp_path / "pane.glb", pane))[0, 24, 24, 3]
    assert alpha == pytest.approx(1 - 0.75**2, abs=0.02)  # front and back


def test_factors_and_vertex_colours_are_light_intensities(tmp_path):
    factor = {"pbrMetallicRoughness": {"baseColorFactor": [0.5, 0.5, 0.5, 0.1]}}  # opaque: no more is said
    half = views(cube(tmp_path / "f.glb", factor))
    for name, values in (("f4", 0.5), ("u2", 32768), ("u1", 128)):
        for width in (3, 4):
            colours = np.full((24, width), values)
            if width == 4:
                colours[:, 3] = 0.1 if name == "f4" else 3
            tinted = cube(tmp_path / "t.glb", {}, colours=(colours, name))
            assert psnr(half, views(tinted)) > 40
    textured = cube(tmp_path / "b.glb", factor, {BASE: TEXTURE})
    doubly = cube(tmp_path / "c.glb", {}, {BASE: TEXTURE}, (np.full((24, 3), 0.5), "f4"))
    assert psnr(views(textured), views(doubly)) > 40


def test_light_of_a_materials_own(tmp_path):
    black = {"pbrMetallicRoughness": {"baseColorFactor": [0, 0, 0, 1]}}
    green = colour_of(cube(tmp_path / "a.glb", black | {"emissiveFactor": [0, 0.5, 0]}))
    assert green[1] == pytest.approx(0.735, abs=0.02) and green[0] < 0.06
    strong = black | {
        "emissiveFactor": [0, 0.1, 0],
        "extensions": {"KHR_materials_emissive_strength": {"emissiveStrength": 5}},
    }
    assert colour_of(cube(tmp_path / "b.glb", strong))[1] == pytest.approx(0.735, abs=0.02)
    glowing = views(cube(tmp_path / "c.glb", black | {"emissiveFactor": [1, 1, 1]}, {"emissiveTexture": TEXTURE}))
    unlit = {"extensions": {"KHR_materials_unlit": {}}}
    flat = views(cube(tmp_path / "d.glb", unlit, {BASE: TEXTURE}, used=["KHR_materials_unlit"]))
    assert psnr(glowing, flat) > 25
    assert (flat[flat[..., 3] == 1][:, :3].max(1) > 0.99).mean() > 0.9  # no shading at all


def test_pictures_of_every_mode(tmp_path):
    grey = np.array([[0, 80], [160, 255]], np.uint8)
    deep = Image.fromarray(np.kron(grey, np.ones((64, 64))).astype(np.uint16) * 257)
    palette = Image.open(io.BytesIO(TEXTURE)).convert("P")

    def textured(data: bytes) -> np.ndarray:
        return views(cube(tmp_path / "t.glb", {}, {BASE: data}))

    assert psnr(textured(png(np.dstack([grey] * 3))), textured(encoded(deep))) > 40
    assert psnr(plain_views(), textured(encoded(palette))) > 30


def test_what_has_no_triangles_or_no_picture_is_reported(tmp_path):
    def broken(**change):
        g = Gltf()
        primitives = [g.cube()]
        materials = [{"name": "wood", "pbrMetallicRoughness": {"baseColorTexture": g.image(TEXTURE)}}]
        tree = {"meshes": [{"primitives": primitives}], "materials": materials}
        for key, value in change.items():
            if key == "mode":
                primitives.append({"attributes": primitives[0]["attributes"], "mode": value})
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
        moves = np.arange(count)[:, None] * [3, 0, 0]
        turns = np.tile([0, 0, 0, 127], (count, 1))
        attributes = {"TRANSLATION": g.array(moves), "ROTATION": g.array(turns, "i1", normalized=True)}
        node = {"mesh": 0, "extensions": {"EXT_mesh_gpu_instancing": {"attributes": attributes}}}
        meshes, used = [{"primitives": [g.cube()]}], ["EXT_mesh_gpu_instancing"]
        return g.write(tmp_path / "row.glb", meshes=meshes, materials=[{}], nodes=[node], extensionsUsed=used)

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
    big = cube(tmp_path / "big.glb", {}, {BASE: encoded(Image.new("1", (30_000, 30_000)))})
    assert "too many pixels" in " ".join(warnings_of(big))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    assert "128 x 128" in " ".join(warnings_of(cube(tmp_path / "cube.glb")))
