"""Both backends show the same thing where the matrices say. Needs no torch, so that it runs beside the bpy wheel:
python -m pytest --noconftest tests/test_blender.py
"""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")

import mesh_files  # noqa: E402

from ouroboros3d.datagen import blender  # noqa: E402
from ouroboros3d.datagen import orbit_renderer as render  # noqa: E402
from ouroboros3d.datagen.assets import Asset, AssetError, Findings  # noqa: E402
from ouroboros3d.datagen.meshes import load_surface  # noqa: E402
from ouroboros3d.datagen.raycast import Raycaster, orbit_pose  # noqa: E402
from ouroboros3d.datagen.surface import OBJECT_RADIUS  # noqa: E402
from ouroboros3d.errors import UserError  # noqa: E402

HAS_BPY = importlib.util.find_spec("bpy") is not None
needs_bpy = pytest.mark.skipif(not HAS_BPY, reason="the bpy wheel is not installed (optional extra 'blender')")
BACKENDS = ["light", pytest.param("blender", marks=needs_bpy)]
SIZE, SAMPLES = 64, {"light": 3, "blender": 8}

# A board with a colour in every quarter, seen from the front (the file's +z, y up): left and right, above and below.
QUARTERS = {(-0.25, 0.35): "red", (0.25, 0.35): "lime", (-0.25, -0.35): "blue", (0.25, -0.35): "yellow"}
COLOURS = {"red": (1, 0, 0), "lime": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}


def board(glb: bool) -> "trimesh.Trimesh":
    """The board, and a purple arm that sticks out behind and to the right; one texture for both."""
    texture = Image.new("RGB", (64, 64), (120, 0, 120))
    for (x, y), name in QUARTERS.items():
        texture.paste(
            tuple(255 * c for c in COLOURS[name]),
            (0 if x < 0 else 16, 0 if y > 0 else 32, 16 if x < 0 else 32, 32 if y > 0 else 64),
        )
    corners = np.array([[-0.5, -0.7, 0.1], [0.5, -0.7, 0.1], [0.5, 0.7, 0.1], [-0.5, 0.7, 0.1]])
    arm = trimesh.creation.box(bounds=[[0.1, -0.2, -0.9], [0.9, 0.0, 0.05]])
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=texture, metallicFactor=0.0, roughnessFactor=1.0)
    if not glb:
        material = trimesh.visual.material.SimpleMaterial(image=texture)
    uv = np.concatenate([[[0, 0], [0.5, 0], [0.5, 1], [0, 1]], np.full((len(arm.vertices), 2), 0.75)])
    faces = np.concatenate([[[0, 1, 2], [0, 2, 3]], arm.faces + 4])
    visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return trimesh.Trimesh(np.concatenate([corners, arm.vertices]), faces, visual=visual, process=False)


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    board(glb=True).export(folder / "board.glb")
    board(glb=False).export(folder / "board.obj")
    return folder


def open_scene(backend: str, path: Path, **settings) -> render.OpenAsset:
    options = {"size": SIZE, "samples": SAMPLES[backend], "threads": 1} | settings
    return render.OpenAsset.load(
        Asset("it", "train", path), render.Settings(Path("unused"), backend=backend, **options)
    )


def silhouette_iou(path: Path, poses: list[np.ndarray], **settings) -> float:
    """The smallest over the poses."""
    worst = 1.0
    scenes = [open_scene(backend, path, **settings).scene for backend in ("light", "blender")]
    for pose in poses:
        light, other = (s.render(pose, SIZE, n)[..., 3] > 127 for s, n in zip(scenes, SAMPLES.values(), strict=True))
        assert light.mean() > 0.05
        worst = min(worst, (light & other).sum() / (light | other).sum())
    print(f"{path.name}: intersection over union of the silhouettes at least {worst:.4f}")  # shown by pytest -s
    return worst


@pytest.mark.parametrize("suffix", ["glb", "obj"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_known_points_lie_where_the_meta_file_says(backend, suffix, assets, tmp_path):
    settings = render.Settings(tmp_path, size=SIZE, samples=SAMPLES[backend], orbits=1, backend=backend, threads=1)
    assert render.render_asset(Asset("board", "train", assets / f"board.{suffix}"), settings).failure is None
    meta = json.loads((tmp_path / "board_0/meta.json").read_text())
    assert meta["renderer"] == backend and meta["renderer_version"]
    fit, focal = meta["normalisation"], 0.5 * SIZE / np.tan(meta["camera_angle_x"] / 2)
    checked = 0
    for location in meta["locations"]:
        c2w = np.array(location["transform_matrix"])
        with Image.open(tmp_path / "board_0" / location["frames"][0]["name"]) as picture:
            rgba = np.array(picture.convert("RGBA")) / 255
        for (x, y), name in QUARTERS.items():
            point = fit["scale"] * (np.array([x, -0.1, y]) - fit["centre"])  # the front is the world's -y
            seen = c2w[:3, :3].T @ (point - c2w[:3, 3])
            if c2w[1, 3] / np.linalg.norm(c2w[:3, 3]) > -0.5:
                continue  # from behind or too much from the side
            column, row = SIZE / 2 + focal * seen[0] / -seen[2], SIZE / 2 - focal * seen[1] / -seen[2]
            pixel = rgba[int(row), int(column)]
            assert pixel[3] == 1 and (pixel[:3] / pixel[:3].max() > 0.5).tolist() == [c == 1 for c in COLOURS[name]]
            checked += 1
    assert checked >= 5 * 4


@needs_bpy
@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_both_backends_draw_one_silhouette(suffix, assets):
    poses = [orbit_pose(azimuth, elevation) for azimuth, elevation in ((-70, 20), (40, -5), (160, 60))]
    assert silhouette_iou(assets / f"board.{suffix}", poses) > 0.98


@needs_bpy
@pytest.mark.parametrize("up", ["y", "z"])
@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl"])
def test_every_format_stands_as_in_the_light_backend(suffix, up, assets, tmp_path):
    path = tmp_path / f"board.{suffix}"
    mesh = board(glb=True)
    mesh.apply_translation([5, 7, 9])
    mesh.export(path)
    surface, light = open_scene("blender", path, up=up).scene.surface, load_surface(path, up)
    np.testing.assert_allclose(surface.centre, light.centre, atol=1e-5)
    assert surface.scale == pytest.approx(light.scale, rel=1e-5)
    assert silhouette_iou(path, [orbit_pose(-50, 25)], up=up) > 0.98


@needs_bpy
def test_an_fbx_file_has_the_same_size_and_stands_upright(assets, tmp_path):
    import bpy

    light = load_surface(assets / "board.glb")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_scene.gltf(filepath=str(assets / "board.glb"))
    bpy.ops.export_scene.fbx(filepath=str(tmp_path / "board.fbx"))
    scene = open_scene("blender", tmp_path / "board.fbx").scene
    pose = orbit_pose(-70, 20)
    one, two = Raycaster(light).render(pose, SIZE)[..., 3] > 127, scene.render(pose, SIZE, 8)[..., 3] > 127
    assert (one & two).sum() / (one | two).sum() > 0.98


@needs_bpy
def test_a_seed_is_one_picture_and_the_sky_is_soft(assets):
    pose = orbit_pose(-70, 20)
    pictures = [
        open_scene("blender", assets / "board.glb", seed=seed).scene.render(pose, SIZE, 4) for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()
    light = open_scene("light", assets / "board.glb").scene.render(pose, SIZE)
    shown = (light[..., 3] == 255) & (pictures[0][..., 3] == 255)
    assert np.abs(light[shown].mean(0) - pictures[0][shown].mean(0)).max() < 30
    assert not pictures[0][pictures[0][..., 3] == 0].any()


@needs_bpy
def test_depth_and_fill_agree_with_the_light_backend(assets):
    options = {"fill": 0.5, "fov": 60.0, "distance": 2.0}
    scenes = [open_scene(backend, assets / "board.glb", **options).scene for backend in ("light", "blender")]
    depth = [scene.depth(orbit_pose(-70, 20, 2.0), 32, 60.0) for scene in scenes]
    np.testing.assert_allclose(depth[0], depth[1], atol=1e-5)
    assert scenes[1].surface.radius == scenes[0].surface.radius != OBJECT_RADIUS


@needs_bpy
def test_a_missing_texture_is_a_warning_and_no_pink(tmp_path):
    board(glb=False).export(tmp_path / "board.obj")
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    (tmp_path / "material.mtl").write_text("newmtl material_0\nKd 0 0.5 0\nmap_Kd gone.png\n")
    opened = open_scene("blender", tmp_path / "board.obj")
    assert opened.meta["warnings"] == ["material 'material_0': texture 'gone.png' is missing or broken"]
    rgba = opened.scene.render(orbit_pose(-70, 20), SIZE, 8).reshape(-1, 4)
    rgb = rgba[rgba[:, 3] == 255][:, :3].mean(0)
    assert rgb[1] > 60 and rgb[0] < 40 and rgb[2] < 40


@needs_bpy
def test_textures_of_scans_are_found(tmp_path):
    for folder in ("meshes", "materials/textures"):
        (tmp_path / folder).mkdir(parents=True)
    board(glb=False).export(tmp_path / "meshes/model.obj")
    (picture,) = (tmp_path / "meshes").glob("*.png")
    picture.rename(tmp_path / "materials/textures" / picture.name)
    opened = open_scene("blender", tmp_path / "meshes/model.obj")
    rgba = opened.scene.render(orbit_pose(-90, 0), SIZE, 8)
    assert opened.meta["warnings"] == [] and rgba[24, 24, 0] > 100 > rgba[24, 24, 1]


@needs_bpy
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.glb", "this is no glb", "cannot be read"),
        ("empty.obj", "v 0 0 0\n", "no triangles"),
        (
            "nan.ply",
            trimesh.Trimesh([[np.nan, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False),
            "finite number",
        ),
        ("many.ply", trimesh.creation.box(), "12 triangles are more than the limit of 8"),
        ("model.off", "OFF\n", "--backend light"),
    ],
    ids=lambda value: None if isinstance(value, str) else "mesh",
)
def test_bad_assets_are_named(name, content, reason, tmp_path):
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        content.export(tmp_path / name)
    with pytest.raises(AssetError, match=reason) as error:
        open_scene("blender", tmp_path / name, max_faces=8)
    assert name in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("default", "faces"), [(None, 12), (1, 80)])
def test_of_several_scenes_the_default_one_is_rendered(backend, default, faces, tmp_path):
    files = trimesh.Scene({"a": trimesh.creation.box(), "b": trimesh.creation.icosphere(1)}).export(file_type="gltf")
    tree = json.loads(files.pop("model.gltf"))
    roots = [next(i for i, node in enumerate(tree["nodes"]) if node.get("mesh") == k) for k in range(2)]
    tree["scenes"] = [{"nodes": [root]} for root in roots]
    tree.pop("scene", None)
    if default is not None:
        tree["scene"] = default
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "two.gltf").write_text(json.dumps(tree))
    assert len(open_scene(backend, tmp_path / "two.gltf").scene.surface.faces) == faces


def test_without_the_wheel_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(blender.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*\.\[blender\].*--backend light"):
        blender.require_bpy()


def show_base_colours(surface) -> None:
    """Makes every material shine in its base colour: the light backend's, and Blender's in the open scene."""
    import bpy

    surface.materials[:] = [replace(m, unlit=True, emission=None) for m in surface.materials]
    for material in bpy.data.materials:
        nodes, links = material.node_tree.nodes, material.node_tree.links
        shader = next((n for n in nodes if n.type == "BSDF_PRINCIPLED"), None)
        output = next((n for n in nodes if n.type == "OUTPUT_MATERIAL"), None)
        if shader is None or output is None:
            continue
        glow, clear, mix = (nodes.new(f"ShaderNode{kind}") for kind in ("Emission", "BsdfTransparent", "MixShader"))
        for socket, target in (
            (shader.inputs["Base Color"], glow.inputs["Color"]),
            (shader.inputs["Alpha"], mix.inputs[0]),
        ):
            if socket.is_linked:
                links.new(socket.links[0].from_socket, target)
            else:
                target.default_value = socket.default_value
        links.new(clear.outputs[0], mix.inputs[1])
        links.new(glow.outputs[0], mix.inputs[2])
        links.new(mix.outputs[0], output.inputs["Surface"])


def edges(image: np.ndarray) -> np.ndarray:
    """Pixels [h, w] whose neighbours differ from them by more than 0.1."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = [padded[i : i + len(image), j : j + len(image)] for i in range(3) for j in range(3)]
    return (np.max(around, 0) - np.min(around, 0)).max(-1) > 0.1


@needs_bpy
@pytest.mark.parametrize("feature", [*mesh_files.FEATURES, "obj", "obj map_d", "ply"])
def test_both_backends_read_the_same_base_colours(feature, tmp_path):
    """PSNR of the base colour where both show the object, and overlap of the silhouettes."""
    if feature.startswith("obj"):
        mask = "map_d a.png\n" if feature == "obj map_d" else ""
        path = mesh_files.obj_cube(tmp_path, "newmtl a\nKd 1 1 1\nmap_Kd -s 2 2 2 t.png\n" + mask)
        grey = np.array([[0, 255], [255, 255]], np.uint8)
        (tmp_path / "a.png").write_bytes(mesh_files.png(np.stack([grey] * 3, -1)))
    elif feature == "ply":
        path = tmp_path / "cube.ply"
        trimesh.Trimesh(
            mesh_files.VERTICES,
            mesh_files.FACES,
            vertex_colors=np.repeat(np.eye(3, dtype=np.uint8) * 255, 8, 0),
            process=False,
        ).export(path)
    else:
        path = mesh_files.special(tmp_path / "cube.glb", feature)
    figure, overlap = agreement(path)
    print(f"{feature}: {figure:.1f} dB, overlap {overlap:.3f}")  # shown by pytest -s
    assert figure > 30 and overlap > 0.98


def agreement(path: Path, size: int = SIZE) -> tuple[float, float]:
    """The smallest PSNR of base colours and overlap (IoU) of silhouettes of two views by both backends."""
    surface, blender_scene = load_surface(path), blender.BlenderScene(path, threads=1)
    show_base_colours(surface)
    light, figures, overlaps = Raycaster(surface), [], []
    for azimuth, elevation in ((30, 20), (200, -5)):
        pose = orbit_pose(azimuth, elevation)
        one, two = light.render(pose, size, 4) / 255, blender_scene.render(pose, size, 16) / 255
        a, b = one[..., 3] > 0.4, two[..., 3] > 0.4  # not 0.5: half covered pixels fall either way
        # Away from edges: a pixel of two colours is averaged as light by Blender, as sRGB values by the light backend.
        inside = (one[..., 3] == 1) & (two[..., 3] == 1) & ~(edges(one) | edges(two))
        assert inside.sum() > 200
        figures.append(-10 * np.log10(max(((one - two)[..., :3][inside] ** 2).mean(), 1e-10)))
        overlaps.append((a & b).sum() / (a | b).sum())
    return min(figures), min(overlaps)


CASES = os.environ.get("CASES", "")  # folders special/ and plain/ of mesh files, to be compared too


@needs_bpy
@pytest.mark.skipif(not CASES, reason="CASES names no folder")
@pytest.mark.parametrize(
    "path",
    sorted(p for p in Path(CASES or "none").rglob("*") if p.suffix in (".glb", ".gltf", ".obj", ".ply", ".stl")),
    ids=str,
)
def test_both_backends_agree_on_a_folder(path):
    """What one of them refuses or warns about is skipped."""
    findings = Findings()
    try:
        load_surface(path, findings=findings)
        blender.BlenderScene(path, threads=1, findings=findings)
    except AssetError as error:
        pytest.skip(str(error))
    if findings.warnings:
        pytest.skip(", ".join(findings.warnings))
    figure, overlap = agreement(path, 128)
    print(f"{path}: {figure:.1f} dB, overlap {overlap:.3f}")
    assert figure > 30 and overlap > 0.98
