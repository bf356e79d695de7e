"""Rendered orbits: pictures agree with their matrices, and meta.json says where they come from."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("embreex")
from mesh_files import warnings_of  # noqa: E402
from orbit_folders import QUICK, SQUARE, box_file, orbit_dataset, run  # noqa: E402

from ouroboros3d.data.orbit_files import read_meta, read_rgba  # noqa: E402
from ouroboros3d.datagen import orbit_renderer as render  # noqa: E402
from ouroboros3d.datagen.assets import Asset, open_assets  # noqa: E402
from ouroboros3d.datagen.meshes import load_surface  # noqa: E402
from ouroboros3d.datagen.polygons import triangulate  # noqa: E402
from ouroboros3d.datagen.procedural import random_object  # noqa: E402
from ouroboros3d.datagen.raycast import Raycaster, orbit_pose  # noqa: E402
from ouroboros3d.datagen.surface import Material, Part, Texture, make_surface  # noqa: E402


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rendered")
    settings = render.Settings(out, size=48, samples=2, depth=16, seed=3)
    outcome = render.render_asset(Asset("box", "train", box_file(tmp_path_factory.mktemp("assets"))), settings)
    assert outcome.failure is None and outcome.views == 32 and not outcome.warnings
    return out


def test_silhouettes_agree_with_the_matrices(rendered):
    corners = np.array([[x, y, z] for x in (-0.2, 0.2) for y in (-0.3, 0.3) for z in (-0.4, 0.4)])
    corners *= 0.5 / np.linalg.norm(corners[0])
    for orbit in ("box_0", "box_1"):
        meta = read_meta(rendered / orbit / "meta.json", 16)
        for name, c2w in zip(meta.names, meta.c2w.numpy(), strict=True):
            rgba = read_rgba(rendered / orbit / name, 48).numpy()
            seen = (corners - c2w[:3, 3]) @ c2w[:3, :3]
            scale = 24 / np.tan(np.radians(meta.fov / 2)) / -seen[:, 2]
            u, v = 24 + seen[:, 0] * scale, 24 - seen[:, 1] * scale
            rows, columns = np.nonzero(rgba[..., 3] > 127)
            assert abs(columns.min() - u.min()) < 1 and abs(columns.max() + 1 - u.max()) < 1
            assert abs(rows.min() - v.min()) < 1 and abs(rows.max() + 1 - v.max()) < 1
            assert rgba[rows.min() + 6, 24, 0] > 80 > rgba[rows.min() + 6, 24, 2]  # red is up
            assert rgba[rows.max() - 6, 24, 2] > 80 > rgba[rows.max() - 6, 24, 0]


def test_orbits_are_what_training_expects(rendered):
    elevations = set()
    for orbit in ("box_0", "box_1"):
        meta = json.loads((rendered / orbit / "meta.json").read_text())
        assert meta["seed"] == 3 and -5 <= meta["elevation"] <= 30
        elevations.add(meta["elevation"])
        c2w = read_meta(rendered / orbit / "meta.json", 16).c2w.numpy()
        np.testing.assert_allclose(np.linalg.norm(c2w[:, :3, 3], axis=1), 1.7417)
        azimuth = np.unwrap(np.arctan2(c2w[:, 1, 3], c2w[:, 0, 3]))
        np.testing.assert_allclose(np.degrees(np.diff(azimuth)), 22.5)
        np.testing.assert_allclose(np.degrees(np.arcsin(c2w[:, 2, 3] / 1.7417)), meta["elevation"])
        np.testing.assert_allclose(-c2w[:, :3, 2] * 1.7417, -c2w[:, :3, 3])  # looks at the origin
    assert len(elevations) == 2
    (rendered / "train.txt").write_text("box_0\nbox_1\n")
    item = orbit_dataset(rendered, size=48, depth=True)[0]
    assert item["depth"].shape == (8, 1, 16, 16)
    assert ((item["depth"] > 0).float().mean() - item["alpha"].mean()).abs() < 0.02


def test_depth_lies_on_the_surface():
    quad = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1.0]])
    surface = make_surface([Part(quad, np.array([[0, 1, 2], [0, 2, 3]]))])
    depth = Raycaster(surface).depth(orbit_pose(0, 0), 16)
    np.testing.assert_allclose(depth[depth > 0], 1.7417, atol=1e-5)  # along the axis, not along the ray


def test_textures_stand_upright_and_holes_are_holes():
    quad = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, -1, 1.0]])
    texture = np.full((8, 8, 4), 255, np.uint8)
    texture[:4, :, 1:3] = 0  # the upper half is red,
    texture[4:, :4, 3] = 0  # a quarter, below and left, is cut out
    base = Texture(texture, np.array([[0, 0], [1, 0], [1, 1], [0, 1]]))
    part = Part(quad, np.array([[0, 1, 2], [0, 2, 3]]), Material(base=base))
    image = Raycaster(make_surface([part])).render(orbit_pose(0, 0), 32)
    assert image[10, 12, 0] > 100 > image[10, 12, 1] and image[10, 12, 3] == 255
    assert image[22, 22, 1] > 100 and image[22, 12, 3] == 0


def test_meta_says_where_an_orbit_comes_from(rendered, tmp_path):
    box = box_file(tmp_path)
    meta = json.loads((rendered / "box_0/meta.json").read_text())
    assert meta["renderer"] == "light" and "embreex" in meta["renderer_version"] and meta["samples"] == 2
    assert meta["source"] == "box.obj" and meta["warnings"] == []
    assert meta["source_sha256"] == hashlib.sha256(box.read_bytes()).hexdigest()
    assert meta["fill"] == pytest.approx(0.8325, abs=1e-4) and meta["camera_angle_x"] == pytest.approx(
        0.69112, abs=1e-5
    )
    back = read_meta(rendered / "box_0/meta.json", 16).c2w[0, :3, 2].numpy()
    azimuth, elevation = np.radians([meta["azimuth"], meta["elevation"]])
    expected = [np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)]
    np.testing.assert_allclose(back, expected, atol=1e-12)
    surface, fit = load_surface(box), meta["normalisation"]
    corner = np.array([0.2, -0.3, 0.4])  # x, y, z of the file are x, z, -y of the world
    world = fit["scale"] * (corner - fit["centre"])
    assert np.linalg.norm(surface.vertices - world, axis=1).min() < 1e-9 and np.linalg.norm(world) == pytest.approx(0.5)


def test_stretch_makes_variants_of_the_same_object(tmp_path, capsys):
    box_file(tmp_path)
    (tmp_path / "list.txt").write_text("box.obj\n")
    options = ["--assets", tmp_path / "list.txt", *QUICK, "--out", tmp_path / "out"]
    assert run(*options, "--stretch", 1.5) == 0
    fit = json.loads((tmp_path / "out/box_0/meta.json").read_text())["normalisation"]
    factors, settings = np.array(fit["stretch"]), render.Settings(tmp_path, stretch=1.5)
    assert (factors >= 1 / 1.5).all() and (factors <= 1.5).all() and len(set(factors)) == 3
    asset = Asset("box", "", tmp_path / "box.obj")
    assert render.stretch_factors(asset, settings) == fit["stretch"]
    assert render.stretch_factors(asset, replace(settings, seed=1)) != fit["stretch"]
    surface = render.OpenAsset.load(asset, settings).scene.surface
    corner = np.array([0.2, -0.3, 0.4])  # see above
    world = fit["scale"] * (factors * corner - fit["centre"])
    assert np.linalg.norm(surface.vertices - world, axis=1).min() < 1e-9 and np.linalg.norm(world) == pytest.approx(0.5)
    normals = np.abs(surface.corner_normals)
    np.testing.assert_allclose(normals.max(-1), 1, atol=1e-6)  # a stretched box is a box
    assert run(*options) == 2
    assert "stretch was 1.5 and is now 1.0" in capsys.readouterr().err


@pytest.mark.parametrize("source", (["--procedural", "1"], ["--assets", "a.txt", "--backend", "blender"]))
def test_stretch_is_refused_where_it_would_do_nothing(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*source, "--out", tmp_path, "--stretch", "1.4")
    assert ended.value.code == 2
    assert "--stretch is for the meshes" in capsys.readouterr().err


def test_fill_is_the_share_of_the_picture(tmp_path):
    trimesh.creation.icosphere(subdivisions=3).export(tmp_path / "ball.ply")
    asset = Asset("ball", "train", tmp_path / "ball.ply")
    for fill, fov, distance in ((0.5, 39.598, 1.7417), (0.9, 60.0, 3.0)):
        settings = render.Settings(tmp_path, size=64, fill=fill, fov=fov, distance=distance)
        rgba = render.OpenAsset.load(asset, settings).scene.render(orbit_pose(20, 10, distance), 64, 3, fov)
        assert np.ptp(np.nonzero(rgba[..., 3].max(0) > 127)) + 1 == pytest.approx(64 * fill, abs=1.1)


def test_huge_and_inside_out_objects_look_like_any_other():
    box = trimesh.creation.box((1, 2, 3))

    def picture(vertices, faces):
        return Raycaster(make_surface([Part(vertices, faces)])).render(orbit_pose(30, 20), 32, 2)

    plain = picture(box.vertices, box.faces)
    np.testing.assert_array_equal(plain, picture(box.vertices, box.faces[:, ::-1]))
    far = picture(box.vertices * 1e9 + [3e9, -1e9, 0], box.faces).astype(int)
    assert (plain[..., 3] > 0).mean() > 0.1 and np.abs(far - plain).max() <= 2
    assert np.abs(picture(box.vertices * 1e-9, box.faces).astype(int) - plain).max() <= 2


def test_polygons_keep_their_notches(tmp_path):
    outline = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 2), (3, 2), (3, 3), (0, 3)]  # an angular C
    for axes in ("x y 0", "0 x y", "y 0 x"):
        rows = ["v " + axes.replace("x", str(x)).replace("y", str(y)) for x, y in outline]
        for order in (range(1, 9), range(8, 0, -1)):
            (tmp_path / "c.obj").write_text("\n".join([*rows, "f " + " ".join(map(str, order))]) + "\n")
            surface = load_surface(tmp_path / "c.obj", up="z")
            assert surface.face_areas().sum() / surface.scale**2 == pytest.approx(7)
    flat = np.array([(x, y, 0.0) for x, y in outline])
    on_an_edge = np.insert(flat, 1, flat[0] * 0.5 + flat[1] * 0.5, 0)
    for outline in (on_an_edge, on_an_edge[::-1]):
        _, cut = triangulate(outline[None])
        a, b, c = (outline[cut[:, k]] for k in range(3))
        turns = np.cross(b - a, c - a)[:, 2]  # the outline's own winding
        assert abs(turns.sum()) == pytest.approx(14) and (turns * np.sign(turns.sum()) >= -1e-9).all()


def test_textures_are_found_where_scans_keep_them(tmp_path):
    (tmp_path / "Shoe/meshes").mkdir(parents=True)
    (tmp_path / "Shoe/materials/textures").mkdir(parents=True)
    obj = tmp_path / "Shoe/meshes/model.obj"
    obj.write_text(f"mtllib model.mtl\n{SQUARE}usemtl m\nf 1/1 2/2 3/3 4/4\n")
    (tmp_path / "Shoe/meshes/model.mtl").write_text("newmtl m\nmap_Kd -s 1 1 1 texture.png\n")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "Shoe/materials/textures/texture.png")
    assert warnings_of(obj) == []
    np.testing.assert_array_equal(load_surface(obj).materials[0].base.pixels[0, 0], [255, 0, 0, 255])
    with open_assets(tmp_path) as assets:
        assert [(a.id, a.path, a.source) for a in assets] == [("Shoe", obj, "Shoe/meshes/model.obj")]
    (tmp_path / "secret.png").write_bytes((tmp_path / "Shoe/materials/textures/texture.png").read_bytes())
    (tmp_path / "Shoe/meshes/model.mtl").write_text("newmtl m\nmap_Kd ../../secret.png\n")
    assert len(warnings_of(obj)) == 1  # outside of the object's own folders


def test_colours_of_vertices_and_faces(tmp_path):
    def colour(mesh: trimesh.Trimesh, name: str) -> np.ndarray:
        mesh.export(tmp_path / name)
        return Raycaster(load_surface(tmp_path / name)).render(orbit_pose(20, 60), 16, 2)[8, 8] / 255

    box = trimesh.creation.box()
    box.visual.vertex_colors = [255, 0, 0, 255]
    for name in ("vertex.ply", "vertex.glb"):
        red = colour(box, name)
        assert red[0] > 0.7 and red[1] < 0.1
    box = trimesh.creation.box()
    box.visual.face_colors = [0, 0, 255, 255]
    assert colour(box, "face.ply")[2] > 0.7


def test_procedural_objects_repeat_and_fit():
    for number in range(12):
        surface = random_object(0, number)
        assert np.linalg.norm(surface.vertices[np.unique(surface.faces)], axis=1).max() <= 0.5 + 1e-9
        np.testing.assert_array_equal(surface.vertices, random_object(0, number).vertices)
    assert len(random_object(0, 1).vertices) != len(random_object(1, 1).vertices)
