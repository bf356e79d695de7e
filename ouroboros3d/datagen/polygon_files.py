"""Reads PLY, OFF and STL: polygons with colours, and PLY's one texture."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from .assets import AssetError, Findings, Unsupported
from .pictures import PictureError, Pictures
from .polygons import strip, triangulate
from .surface import Material, Part, Texture

PLY_TYPES = {"char": "i1", "short": "i2", "int": "i4", "uchar": "u1", "ushort": "u2", "uint": "u4"}
PLY_TYPES |= {"float": "f4", "double": "f8"}
PLY_TYPES |= {np.dtype(kind).name: kind for kind in PLY_TYPES.values()}
COLOURS = [("red", "green", "blue", "alpha"), ("diffuse_red", "diffuse_green", "diffuse_blue", "diffuse_alpha")]
COLOURS += [("r", "g", "b", "a")]
COORDINATES = [("s", "t"), ("u", "v"), ("texture_u", "texture_v"), ("texture_s", "texture_t")]
_CUT = "is cut short: the header announces {:,} {}, the file ends before"


def read_ply(path: Path, pictures: Pictures, findings: Findings, _max_faces: int | None) -> list[Part]:
    """The parts of a .ply file, text or binary. Raises AssetError."""
    elements, textures = _parse_ply(path.read_bytes(), findings)
    vertex, face = elements.get("vertex", {}), elements.get("face", {})
    if "diffuse_red" in vertex:
        findings.met("diffuse_ colours")
    vertices = _columns(vertex, [("x", "y", "z")])
    if vertices is None:
        raise AssetError("has no vertices x, y, z")
    for name in elements.keys() - {"vertex", "face", "tristrips"}:
        if elements[name]:
            findings.warn(f"elements '{name}' are not rendered", "lines" if name == "edge" else "other PLY elements")
    polygons = next((face[key] for key in ("vertex_indices", "vertex_index") if key in face), [])
    triangles, which, cut = _triangles(vertices, polygons)
    if "tristrips" in elements:
        findings.met("triangle strips")
        strips = np.concatenate([_strips(s) for s in next(iter(elements["tristrips"].values()))])
        if len(strips) and not 0 <= strips.min() <= strips.max() < len(vertices):
            raise AssetError("a strip names a vertex outside the range")
        triangles = np.concatenate([triangles, strips])
        which, cut = None, None
    uv, wedges = _columns(vertex, COORDINATES), face.get("texcoord")
    normals, tints = _columns(vertex, [("nx", "ny", "nz")]), _ply_colours(vertex)
    of_faces = _ply_colours(face) if which is not None and tints is None else None
    part = Part(vertices, triangles, Material(), tints, normals)
    if of_faces is not None or (wedges is not None and which is not None):
        part = _apart(part, None if of_faces is None else of_faces[which])
        if wedges is not None:
            uv = np.concatenate([np.reshape(wedges[p], (-1, 2))[c] for p, c in zip(which, cut, strict=True)])
    if textures and len(set(np.ravel(face.get("texnumber", 0)))) > 1:
        raise Unsupported("several textures", "in a PLY file are not supported")
    part = _painted(part, findings, "vertex colours" if of_faces is None else "face colours")
    if textures and uv is None:
        findings.warn(f"texture '{textures[0]}' has no coordinates", "missing textures")
    elif textures:
        try:
            part.material = Material(base=Texture(pictures.named(textures[0]), uv))
        except PictureError as error:
            findings.warn(f"texture {error}", "missing textures")
    return [part]


def _parse_ply(data: bytes, findings: Findings) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Elements as columns by property, lists as arrays [n, k] or lists of arrays; and the names of textures."""
    head, mark, body = data.partition(b"end_header")
    if not head.startswith(b"ply") or not mark:
        raise AssetError("is no PLY file, or is cut short in its header")
    body = body.partition(b"\n" if b"\n" in head else b"\r")[2]
    form, textures, layout = "ascii", [], []
    for line in head.decode("latin-1").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            form = words[1]
        elif words[:2] == ["comment", "TextureFile"]:
            textures.append(line.split(None, 2)[2].strip())
        elif words[:1] == ["element"]:
            layout.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"]:
            types = [PLY_TYPES[word] for word in words[1:-1] if word != "list"]
            layout[-1][2].append((words[-1], types))
    order = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}[form]
    source = _Body(body, order)
    elements = {name: source.element(name, count, properties) for name, count, properties in layout}
    if len(source.data) - source.at >= 8:
        findings.warn("has more data than its header announces", "superfluous data")
    return elements, textures


class _Body:
    """The body of a PLY file, read from the start on. Text is taken for binary numbers of 8 bytes."""

    def __init__(self, data: bytes, order: str):
        self.order, self.at = order, 0
        self.data = data if order else np.array(data.split(), dtype="S").astype(float).tobytes()

    def take(self, type_: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, self.dtype(type_), count, self.at) if count else np.zeros(0)
        self.at += values.nbytes
        return values

    def dtype(self, type_: str) -> str:
        return self.order + type_ if self.order else "f8"

    def row(self, properties: list[tuple[str, list[str]]]) -> list[np.ndarray]:
        """The next row: arrays [k] of lists, [] of numbers."""
        return [self.item(*types) for _, types in properties]

    def item(self, type_: str, of_list: str = "") -> np.ndarray:
        first = self.take(type_, 1)
        return self.take(of_list, int(first[0])) if of_list else first[0]

    def element(self, name: str, count: int, properties: list[tuple[str, list[str]]]) -> dict[str, Any]:
        """The columns of the next `count` rows: arrays [n], of lists [n, k] or lists of arrays.

        Raises AssetError if the file ends before."""
        if not count or not properties:
            return {}
        try:
            start, first = self.at, self.row(properties)
            fields, lengths = [], {}
            for (key, types), values in zip(properties, first, strict=True):
                if len(types) == 2:
                    lengths[key] = len(values)
                    fields.append((f"{key} size", self.dtype(types[0])))
                fields.append((key, self.dtype(types[-1]), values.shape))
            size = count * np.dtype(fields).itemsize
            if len(self.data) - start >= size or not lengths:  # enough, should all lists be as long as the first
                table = np.frombuffer(self.data, fields, count, start)
                if all((table[f"{key} size"] == length).all() for key, length in lengths.items()):
                    self.at = start + size
                    return {key: table[key].astype(types[-1], copy=False) for key, types in properties}
            self.at = start
            columns = zip(*(self.row(properties) for _ in range(count)), strict=True)
        except ValueError as error:
            raise AssetError(_CUT.format(count, name)) from error
        named = zip(properties, columns, strict=True)
        return {key: list(c) if key in lengths else np.array(c).astype(types[0]) for (key, types), c in named}


def _columns(element: dict[str, Any], names: list[tuple[str, ...]]) -> np.ndarray | None:
    """[n, k] of the first names that are all there, as floats."""
    for keys in names:
        if all(key in element for key in keys):
            return np.stack([np.asarray(element[key], float) for key in keys], -1)
    return None


def _ply_colours(element: dict[str, Any]) -> np.ndarray | None:
    """RGBA [n, 4] in [0, 1]: integers are shares of their type's range, or of 255 where that is too wide."""
    for names in COLOURS:
        if all(key in element for key in names[:3]):
            columns = [np.asarray(element.get(key, np.ones(len(element[names[0]])))) for key in names]
            ranges = [(65535 if c.itemsize == 2 else 255) if c.dtype.kind in "iu" else 1 for c in columns]
            colours = np.stack([c.astype(float) / most for c, most in zip(columns, ranges, strict=True)], -1)
            return (colours / (255 if len(colours) and colours[:, :3].max() > 1 else 1)).clip(0, 1)
    return None


def _triangles(vertices: np.ndarray, polygons) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triangles [t, 3] of polygons (an array [n, k] or a list of arrays), the polygon of each, and its corners."""
    alike = isinstance(polygons, np.ndarray)
    sizes = np.full(len(polygons), polygons.shape[1]) if alike else np.array([len(p) for p in polygons], int)
    out = [(np.zeros((0, 3), int), np.zeros(0, int), np.zeros((0, 3), int))]
    for size in dict.fromkeys(sizes[sizes > 2].tolist()):
        numbers = np.flatnonzero(sizes == size)
        index = np.asarray(polygons if alike else [polygons[n] for n in numbers]).astype(int)
        if index.min() < 0 or index.max() >= len(vertices):
            raise AssetError(f"a face names vertex {index.max()}, outside the range of {len(vertices)} vertices")
        which, cut = triangulate(vertices[index])
        out.append((index[which[:, None], cut], numbers[which], cut))
    return tuple(np.concatenate(x) for x in zip(*out, strict=True))


def _apart(part: Part, colours: np.ndarray | None) -> Part:
    """The part with a vertex for every corner, and colours [t, 4] by triangle, if given."""
    corners = part.faces.reshape(-1)
    tints, normals = (None if x is None else x[corners] for x in (part.tints, part.normals))
    tints = tints if colours is None else np.repeat(colours, 3, 0)
    return Part(part.vertices[corners], np.arange(len(corners)).reshape(-1, 3), part.material, tints, normals)


def _painted(part: Part, findings: Findings, kind: str) -> Part:
    """The part in white where it has colours of this kind."""
    if part.tints is not None:
        findings.met(kind)
        part.material = Material(np.ones(4))
    return part


def _strips(numbers: np.ndarray) -> np.ndarray:
    """Triangles [t, 3] of strips that are separated by -1."""
    strips = np.split(numbers.astype(int), np.flatnonzero(numbers < 0))
    return np.concatenate([strip(indices[indices >= 0]) for indices in strips])


# ---------------------------------------------------------------- OFF


def read_off(path: Path, _pictures: Pictures, findings: Findings, _max_faces: int | None) -> list[Part]:
    """The part of a .off file (Geomview's ASCII form). Raises AssetError."""
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    text = re.sub("#.*", "", text).lstrip()
    kind = re.match(r"(ST)?(C)?(N)?(4)?(n)?OFF", text)
    if not kind:
        raise AssetError("is no OFF file: it must begin with OFF")
    rows = [words for line in text[kind.end() :].splitlines() if (words := line.split())]
    if kind[5] or rows[:1] == [["BINARY"]]:
        raise Unsupported("nOFF" if kind[5] else "binary OFF", "is not supported")
    try:
        count, faces = map(int, rows[0][:2])
    except (ValueError, IndexError) as error:
        raise AssetError("says no number of vertices and faces") from error
    if len(rows) < 1 + count + faces:
        raise AssetError(_CUT.format(count + faces, "vertices and faces"))
    if len(rows) > 1 + count + faces:
        findings.warn("has more data than its header announces", "superfluous data")
    table, rows = rows[1 : 1 + count], rows[1 + count : 1 + count + faces]
    width = min(map(len, table), default=3)
    numbers = np.array([row[:width] for row in table], float).reshape(count, -1)
    size = 4 if kind[4] else 3
    if numbers.shape[1] < size:
        raise AssetError(f"a vertex has fewer than {size} numbers")
    vertices = numbers[:, :3] / (numbers[:, 3:4] if kind[4] else 1)
    normals = numbers[:, size : size + 3] if kind[3] else None
    colours = numbers[:, size + 3 * bool(kind[3]) : width - 2 * bool(kind[1])]
    tints = _off_colours(colours) if colours.shape[1] >= 3 else None
    polygons = [np.array(row[1 : 1 + int(row[0])], int) for row in rows]
    if any(len(polygon) < int(row[0]) for polygon, row in zip(polygons, rows, strict=True)):
        raise AssetError("a face is cut short")
    triangles, which, _ = _triangles(vertices, polygons)
    part = Part(vertices, triangles, Material(), tints, normals)
    paints = [row[1 + len(polygon) :] for row, polygon in zip(rows, polygons, strict=True)]
    if any(len(paint) == 1 for paint in paints):
        findings.warn("colours by number in a colour map are not supported", "colour maps")
    painted = np.array([len(paint) in (3, 4) for paint in paints])
    if tints is None and painted.any():
        of_faces = np.full((len(paints), 4), [0.7, 0.7, 0.7, 1])
        of_faces[painted] = _off_colours(
            np.array([[*paint, np.nan][:4] for paint in paints if len(paint) in (3, 4)], float)
        )
        return [_painted(_apart(part, of_faces[which]), findings, "face colours")]
    return [_painted(part, findings, "vertex colours")]


def _off_colours(values: np.ndarray) -> np.ndarray:
    """RGBA [n, 4] in [0, 1] of 3 or 4 numbers up to 1, or up to 255; NaN: not given."""
    values = np.pad(values[:, :4], ((0, 0), (0, 4 - min(4, values.shape[1]))), constant_values=np.nan)
    values = values / (255 if np.nanmax(values[:, :3], initial=0) > 1 else 1)
    return np.where(np.isnan(values), 1, values).clip(0, 1)


# ---------------------------------------------------------------- STL


def read_stl(path: Path, _pictures: Pictures, findings: Findings, _max_faces: int | None) -> list[Part]:
    """The part of an .stl file, text or binary, with the colours that some programs put into the latter."""
    data = path.read_bytes()
    count = int.from_bytes(data[80:84], "little")
    binary = len(data) >= 84 and len(data) == 84 + 50 * count
    if not binary and data.lstrip()[:5].lower() == b"solid" and (b"facet" in data or b"endsolid" in data):
        vertices = re.findall(rb"vertex\s+(\S+)\s+(\S+)\s+(\S+)", data, re.I)
        if len(vertices) != 3 * len(re.findall(rb"endfacet|end\s+facet", data, re.I)):
            raise AssetError("is cut short, or a facet has not three vertices")
        if not re.search(rb"end\s*solid[^\n]*\s*$", data, re.I):
            findings.warn("is cut short: it does not end with endsolid", "cut files")
        vertices, tints = np.array(vertices, dtype="S").astype(float).reshape(-1, 3), None
    else:
        if len(data) < 84 + 50 * count:
            raise AssetError(f"is cut short: {count:,} triangles need {84 + 50 * count:,} bytes, it has {len(data):,}")
        if len(data) > 84 + 50 * count:
            findings.warn("has more data than its header announces", "superfluous data")
        facets = np.frombuffer(data, np.dtype([("", "<f4", 3), ("v", "<f4", (3, 3)), ("c", "<u2")]), count, 84)
        vertices, tints = facets["v"].reshape(-1, 3).astype(float), _stl_colours(data[:80], facets["c"])
    return [_painted(Part(vertices, np.arange(len(vertices)).reshape(-1, 3), tints=tints), findings, "face colours")]


def _stl_colours(head: bytes, attributes: np.ndarray) -> np.ndarray | None:
    """RGBA [3 n, 4] of Materialise Magics (COLOR= in the header) or of VisCAM and SolidView; None without."""
    parts = np.stack([attributes >> shift & 31 for shift in (0, 5, 10)], -1) / 31
    own = attributes >> 15 == 1
    whole = np.array([0.7, 0.7, 0.7])
    if (at := head.find(b"COLOR=")) >= 0 and len(head) >= at + 10:
        own, whole = ~own, np.frombuffer(head, np.uint8, 3, at + 6) / 255
    else:
        parts = parts[:, ::-1]
        if not own.any():
            return None
    return np.repeat(np.column_stack([np.where(own[:, None], parts, whole), np.ones(len(own))]), 3, 0)
