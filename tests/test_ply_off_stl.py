"""PLY, OFF and STL files in every form: their polygons, colours and textures, and what does not fit their header."""

import struct

import numpy as np
import pytest

pytest.importorskip("embreex")
pytest.importorskip("mapbox_earcut")
from mesh_files import FACES, TEXTURE, UV, VERTICES, plain_views, psnr, views, warnings_of

from ouroboros3d.datagen.assets import AssetError
from ouroboros3d.datagen.meshes import load_surface

U = np.array([(0, 0), (1, 0), (1, 2), (2, 2), (2, 0), (3, 0), (3, 3), (0, 3)], float)


def line(row, end: str = "\n") -> str:
    return " ".join(map(str, row)) + end


def lines(rows) -> str:
    return "".join(map(line, rows))


def ply(names: str, vertices, faces: str, rows, comment: str = "") -> str:
    """A text file; names: of the vertices' properties, faces: the lines about other elements in its header."""
    head = f"ply\nformat ascii 1.0\n{comment}element vertex {len(vertices)}\n"
    head += "".join(f"property float {name}\n" for name in names.split())
    return f"{head}{faces}end_header\n{lines(vertices)}{lines(rows)}"


TRIANGLES = "element face 12\nproperty list uchar int vertex_index\n"


def packed(order: str, layout: str, row, end: str) -> bytes:
    """Binary in a byte order, or text."""
    return struct.pack(order + layout, *row) if order else line(row, end).encode()


def test_ply_in_every_form(tmp_path):
    """A beam with concave ends, in colours, as text and binary; the same as triangles."""
    points = np.concatenate([np.column_stack([U, np.full(8, z)]) for z in (0.0, 1.0)])
    faces = [list(range(8)), list(range(15, 7, -1))] + [[k, (k + 1) % 8, (k + 1) % 8 + 8, k + 8] for k in range(8)]
    tints = (points / 3 * 255).round().astype(int)
    reference = None
    for form, order in (("ascii", ""), ("binary_little_endian", "<"), ("binary_big_endian", ">")):
        for kind, letter, scale, names in (
            ("uchar", "B", 1, "red green blue"),
            ("float", "f", 1 / 255, "diffuse_red diffuse_green diffuse_blue"),
            ("ushort", "H", 257, "r g b"),
        ):
            head = f"ply\nformat {form} 1.0\ncomment by a test\nelement vertex 16\n"
            head += "".join(f"property double {axis}\n" for axis in "xyz")
            head += "".join(f"property {kind} {name}\n" for name in names.split())
            head += "element face 10\nproperty uchar flag\nproperty list uchar int vertex_indices\nend_header\n"
            coloured = zip(points, tints * scale, strict=True)
            body = b"".join(packed(order, f"ddd{letter * 3}", [*point, *tint], "\n") for point, tint in coloured)
            body += b"".join(packed(order, f"BB{len(face)}i", [7, len(face), *face], "\r\n") for face in faces)
            (tmp_path / "beam.ply").write_bytes(head.encode() + body)
            picture = views(tmp_path / "beam.ply")
            reference = picture if reference is None else reference
            assert psnr(picture, reference) > 40
            (tmp_path / "cut.ply").write_bytes(head.encode() + body[:-9])
            with pytest.raises(AssetError, match="cut short"):
                load_surface(tmp_path / "cut.ply")
    surface = load_surface(tmp_path / "beam.ply")
    assert surface.face_areas().sum() / surface.scale**2 == pytest.approx(2 * 7 + 16)
    off = lines([*p, *t, 255] for p, t in zip(points, tints, strict=True)) + lines([len(face), *face] for face in faces)
    (tmp_path / "beam.off").write_text("# a beam\nCOFF\n16 10 0\n" + off)
    assert psnr(views(tmp_path / "beam.off"), reference) > 40
    (tmp_path / "huge.ply").write_bytes(head.replace("vertex 16", "vertex 1000000000").encode() + body)
    with pytest.raises(AssetError, match="announces 1,000,000,000 vertex"):
        load_surface(tmp_path / "huge.ply")


def test_texture_and_strips_of_ply(tmp_path):
    (tmp_path / "t.png").write_bytes(TEXTURE)
    corners = np.column_stack([VERTICES, UV[:, 0], 1 - UV[:, 1]])
    triangles = [[3, *face] for face in FACES]
    wedges = [[3, *face, 6, *corners[face, 3:].ravel()] for face in FACES]
    strip = [48, *np.insert(FACES, 3, -1, axis=1).ravel()]
    for names, vertices, faces, rows in (
        ("x y z", VERTICES, TRIANGLES + "property list uchar float texcoord\n", wedges),
        ("x y z s t", corners, "element tristrips 1\nproperty list int int vertex_indices\n", [strip]),
        ("x y z s t", corners, TRIANGLES, triangles),
    ):
        (tmp_path / "t.ply").write_text(ply(names, vertices, faces, rows, "comment TextureFile t.png\n"))
        assert psnr(views(tmp_path / "t.ply"), plain_views()) > 30
    (tmp_path / "t.png").unlink()
    assert warnings_of(tmp_path / "t.ply") == ["texture 't.png' is missing"]


def test_colours_of_faces(tmp_path):
    paint = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).repeat(2, 0)
    faces = [[3, *face, *colour] for face, colour in zip(FACES, 255 * paint, strict=True)]
    colours = "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    (tmp_path / "f.ply").write_text(ply("x y z", VERTICES, TRIANGLES + colours, faces))
    (tmp_path / "f.off").write_text("OFF\n24 12 0\n" + lines([*VERTICES, *faces]))
    picture = views(tmp_path / "f.ply")
    assert psnr(picture, views(tmp_path / "f.off")) > 60
    for head, shifts, valid in ((b"COLOR=\0\0\0\0", (0, 5, 10), 0), (b"", (10, 5, 0), 1 << 15)):
        data = head.ljust(80, b" ") + struct.pack("<I", 12)
        for face, bits in zip(FACES, valid | (31 * paint << shifts).sum(1), strict=True):
            data += struct.pack("<12fH", 0, 0, 0, *VERTICES[face].ravel(), bits)
        (tmp_path / "f.stl").write_bytes(data)
        assert psnr(picture, views(tmp_path / "f.stl")) > 60
    (tmp_path / "f.stl").write_bytes(data[:-20])
    with pytest.raises(AssetError, match="cut short: 12 triangles need 684 bytes, it has 664"):
        load_surface(tmp_path / "f.stl")
    facets = "".join(TEXT_FACET.format(*VERTICES[face].ravel()) for face in FACES)
    (tmp_path / "t.stl").write_text(f"solid cube\n{facets}endsolid cube\n")
    assert len(load_surface(tmp_path / "t.stl").faces) == 12
    (tmp_path / "t.stl").write_text(f"solid cube\n{facets[:-40]}")
    with pytest.raises(AssetError, match="cut short"):
        load_surface(tmp_path / "t.stl")
    (tmp_path / "b.off").write_bytes(b"OFF BINARY\n\0\0\0\1")
    with pytest.raises(AssetError, match="binary OFF is not supported"):
        load_surface(tmp_path / "b.off")


CORNERS = "0 0 0\n1 0 0\n0 1 0\n"
PLY = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
PLY += "element face 1\nproperty list uchar int vertex_indices\n{more}end_header\n" + CORNERS + "3 0 1 2\n"
OFF = "OFF\n3 1 0\n" + CORNERS + "3 0 1 2\n"
FACET = struct.pack("<12fH", 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0)
TEXT_FACET = "facet normal 0 0 1\nouter loop\n" + 3 * "vertex {} {} {}\n" + "endloop\nendfacet\n"
STL = "solid s\n" + TEXT_FACET.format(0, 0, 0, 1, 0, 0, 0, 1, 0)
MORE, OPEN = "has more data than its header announces", "is cut short: it does not end with endsolid"


@pytest.mark.parametrize(
    ("name", "text", "warning"),
    [
        ("t.ply", PLY.format(more=""), None),
        ("t.ply", PLY.format(more="").replace("\n", "\r"), None),
        ("t.ply", PLY.format(more="element void 1000000000\n"), None),
        (
            "t.ply",
            PLY.format(more="element material 1\nproperty int red\n") + "9\n",
            "elements 'material' are not rendered",
        ),
        ("t.ply", PLY.format(more="") + "3 0 1 2\n", MORE),
        ("t.off", OFF, None),
        ("t.off", OFF + "3 0 1 2\n", MORE),
        ("t.stl", STL + "endsolid s\n", None),
        ("t.stl", STL, OPEN),
        ("t.stl", STL + "endsolid s\n" + STL, OPEN),
        ("t.stl", bytes(80) + struct.pack("<I", 1) + 2 * FACET, MORE),
    ],
)
def test_what_does_not_fit_its_header_is_reported(name, text, warning, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert warnings_of(tmp_path / name) == ([warning] if warning else [])
    assert len(load_surface(tmp_path / name).faces) in (1, 2)
