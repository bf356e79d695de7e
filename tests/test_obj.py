"""What an .obj file and its .mtl say is what is rendered, and what is not is reported."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("embreex")
pytest.importorskip("mapbox_earcut")
from mesh_files import (
    BASE,
    FACES,
    QUARTERS,
    VERTICES,
    colour_of,
    cube,
    obj_cube,
    plain_views,
    png,
    psnr,
    views,
    warnings_of,
)

from ouroboros3d.datagen.assets import AssetError
from ouroboros3d.datagen.meshes import load_surface

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
    assert psnr(views(path), plain_views()) > 30
    assert warnings_of(path) == []


def test_maps_of_opacity_and_light_and_factors_of_obj_files(tmp_path):
    hole = np.array([[[0] * 3, [255] * 3], [[255] * 3, [255] * 3]], np.uint8)
    path = obj_cube(tmp_path / "o", PLAIN_MTL + "map_d a.png\n")
    (tmp_path / "o" / "a.png").write_bytes(png(hole))
    cut = png(np.dstack([QUARTERS, hole[..., 0]]))
    same = cube(tmp_path / "c.glb", {"alphaMode": "BLEND"}, {BASE: cut})
    assert psnr(views(path), views(same)) > 30
    glow = colour_of(obj_cube(tmp_path / "k", "newmtl a\nKd 0 0 0\nKe 0 0.5 0\n"))
    assert glow[1] == pytest.approx(0.5, abs=0.03) and glow[0] < 0.06
    dark = obj_cube(tmp_path / "d", PLAIN_MTL.replace("1 1 1", "0.5 0.5 0.5"))
    twice = obj_cube(tmp_path / "s", "newmtl a\nmap_Kd -mm 0 0.5 t.png\n")
    assert psnr(views(dark), views(twice)) > 40
    black = obj_cube(tmp_path / "z", PLAIN_MTL.replace("1 1 1", "0 0 0"))  # as some exporters write it
    assert psnr(views(black), plain_views()) > 30
    pane = obj_cube(tmp_path / "t", "newmtl a\nKd 1 1 1\nTr 0.75\n")
    assert views(pane)[0, 24, 24, 3] == pytest.approx(1 - 0.75**2, abs=0.02)


def test_faces_of_obj_files_count_in_every_way(tmp_path):
    rows = [f"v {x} {y} {z}" for x, y, z in VERTICES]
    plain = rows + ["f {} {} {}".format(*(face + 1)) for face in FACES]
    back = rows + ["f {} {} {}".format(*(face - 24)) for face in FACES]
    forms = ["{}", "{}/1", "{}//1", "{}/1/1", "{}/"]
    mixed = [*rows, "vn 0 0 1", "vt 0 0"]
    mixed += ["f " + " ".join(forms[k % 5].format(i + 1) for i in face) for k, face in enumerate(FACES)]

    def written(lines: list[str]) -> Path:
        (tmp_path / "a.obj").write_text("\n".join(lines))
        return tmp_path / "a.obj"

    picture = views(written(plain))
    assert psnr(picture, views(written(back))) > 60 and psnr(picture, views(written(mixed))) > 60
    coloured = [f"{row} 255 0 0" for row in rows] + plain[24:]
    assert colour_of(written(coloured))[:2] == pytest.approx([0.75, 0.03], abs=0.25)
    with pytest.raises(AssetError, match="v 99 of 24"):
        load_surface(written([*plain, "f 1 2 99"]))


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
