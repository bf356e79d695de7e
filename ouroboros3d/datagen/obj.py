"""Reads Wavefront .obj files with their materials (.mtl)."""

from __future__ import annotations

import codecs
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from .assets import AssetError, Findings
from .pictures import PictureError, Pictures, find_file
from .polygons import triangulate
from .surface import Material, Part, Texture, check_count, to_linear

FREE_FORM = {b"curv", b"curv2", b"surf", b"cstype", b"deg", b"parm", b"bzp", b"bsp", b"cdc", b"cdp", b"res"}
# Statements that change no picture here: groups, smoothing, and details of the free-form surfaces reported above.
SILENT = {b"", b"g", b"o", b"s", b"mg", b"vp", b"lod", b"bevel", b"c_interp", b"d_interp", b"shadow_obj", b"trace_obj"}
SILENT |= {b"bmat", b"step", b"trim", b"hole", b"scrv", b"sp", b"con", b"end", b"ctech", b"stech"}
_LAYOUTS = [  # of faces: numbers per corner, and what the line looks like
    (numbers, re.compile(rb"\s*%b(?:\s+%b)*\s*" % (corner, corner)))
    for numbers, corner in ((3, rb"\d+/\d+/\d+"), (2, rb"\d+/\d+"), (3, rb"\d+//\d+"), (1, rb"\d+"))
]
_OPTION = re.compile(r"-(\w+)\s+")
_NUMBERS = r"(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s+){1,3}"
_VALUES = {"mm": r"\S+\s+\S+\s+", **dict.fromkeys("ost", _NUMBERS)}


def read_obj(path: Path, pictures: Pictures, findings: Findings, max_faces: int | None) -> list[Part]:
    """The parts of a file, one or two per material. Raises AssetError."""
    rows, faces, libraries = _sort_lines(path.read_bytes(), findings)
    vertices, uv, normals = (_table(rows[key], key, least) for key, least in (("v", 3), ("vt", 1), ("vn", 3)))
    counts = len(vertices), len(uv), len(normals)
    library = _read_libraries(path, libraries, findings)
    parts, count = [], 0
    for name, groups in faces.items():
        corners = np.concatenate([_corners(lines, *kind, vertices, counts) for kind, lines in groups.items()])
        count += len(corners)
        check_count(count, max_faces)
        material = _find_material(name, library, libraries, findings)
        textured = (corners[..., 1] >= 0).all(1)
        for chosen in (corners[textured], corners[~textured]):
            if len(chosen):
                parts.append(_part(chosen, vertices, uv, normals, material, name, pictures, findings))
    return parts


def _sort_lines(data: bytes, findings: Findings):
    """What stands in the lines v, vt and vn; that of faces by material, and then by corners and layout; libraries."""
    rows, libraries, material = {"v": [], "vt": [], "vn": []}, [], ""
    faces: dict[str, dict[tuple[int, int], list[bytes]]] = defaultdict(lambda: defaultdict(list))
    strange: set[str] = set()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16").encode()
    if data.startswith(codecs.BOM_UTF8):
        findings.met("byte order mark")
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")
    for line in data.splitlines():
        if b"#" in line and not line.lstrip().startswith((b"usemtl", b"mtllib")):  # names may hold one
            line = line.partition(b"#")[0]
        key, rest = (*line.split(None, 1), b"", b"")[:2]
        if key in (b"v", b"vt", b"vn"):
            rows[key.decode()].append(rest)
        elif key in (b"f", b"fo"):
            corners, layout, rest = _layout(rest, *map(len, rows.values()))
            if corners > 2:
                faces[material][corners, layout].append(rest)
            else:
                findings.warn("faces of fewer than three corners are not rendered", "incomplete faces")
        elif key == b"usemtl":
            material = _text(rest)
        elif key == b"mtllib":
            libraries.append(_text(rest))
        elif key in (b"l", b"p"):
            kind = {b"l": "lines", b"p": "points"}[key]
            findings.warn(f"{kind} are not rendered", kind)
        elif key in FREE_FORM:
            findings.warn("free-form curves and surfaces are not rendered", "free-form geometry")
        elif key not in SILENT and len(strange) < 5:
            strange.add(_text(key)[:20])
    for key in sorted(strange):
        findings.warn(f"statement '{key}' is not rendered", "other OBJ statements")
    return rows, faces, libraries


def _table(lines: list[bytes], key: str, least: int) -> np.ndarray:
    """The numbers of lines of a kind [n, width]; missing ones are 1 for vertices (colours), else 0."""
    rows = [line.split() for line in lines]
    rows = [row[:3] if len(row) == 4 else row for row in rows]  # a weight, which only free-form surfaces use
    if min(map(len, rows), default=least) < least:
        raise AssetError(f"a line '{key}' has fewer than {least} numbers")
    width = max(map(len, rows), default=3)
    fill = [b"1" if key == "v" else b"0"] * width
    numbers = [number for row in rows for number in row + fill[len(row) :]]
    return np.array(numbers, dtype="S").astype(float).reshape(len(rows), width)


def _layout(text: bytes, *counts: int) -> tuple[int, int, bytes]:
    """Corners of a face, numbers per corner (1: v, 2: v vt, 3: v vt vn), and the numbers; 0 stands for none."""
    corners = len(text.split())
    for layout, pattern in _LAYOUTS:
        if pattern.fullmatch(text):
            return corners, layout, text.replace(b"//", b"/0/").replace(b"/", b" ")
    numbers = []
    for corner in text.split():  # counted from the end, or each corner in its own way
        given = [int(n) if n else 0 for n in [*corner.split(b"/"), b"", b""][:3]]
        numbers += [n + count + 1 if n < 0 else n for n, count in zip(given, counts, strict=True)]
    return corners, 3, b" ".join(b"%d" % n for n in numbers)


def _corners(lines: list[bytes], corners: int, layout: int, vertices: np.ndarray, counts: tuple) -> np.ndarray:
    """Triangles [t, 3 corners, 3] of indices of v, vt and vn; -1: none. Raises AssetError."""
    numbers = np.array(b" ".join(lines).split(), dtype="S").astype(int).reshape(len(lines), corners, layout) - 1
    for k, (kind, count) in enumerate(zip(("v", "vt", "vn")[:layout], counts, strict=False)):
        if numbers[..., k].max() >= count or numbers[..., k].min() < (0 if kind == "v" else -1):
            raise AssetError(f"a face uses {kind} {numbers[..., k].max() + 1} of {count}")
    which, cut = triangulate(vertices[numbers[..., 0], :3])
    out = np.full((len(which), 3, 3), -1)
    out[..., :layout] = numbers[which[:, None], cut]
    return out


def _part(corners, vertices, uv, normals, material: dict[str, str], name: str, pictures: Pictures, findings) -> Part:
    """A part of triangles [t, 3, 3] of one material, all with vt or all without."""
    corners = corners.reshape(-1, 3) + 1
    keys = (corners[:, 0] * (len(uv) + 1) + corners[:, 1]) * (len(normals) + 1) + corners[:, 2]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    v, vt, vn = (corners[first] - 1).T
    tints = None
    if vertices.shape[1] >= 6:
        findings.met("vertex colours")
        tints = np.concatenate([vertices[v, 3:6], np.ones((len(v), 1))], 1)
        tints[:, :3] = (tints[:, :3] / (255 if vertices[:, 3:6].max() > 1 else 1)).clip(0, 1)
    coordinates = np.pad(uv, ((0, 0), (0, 1)))[vt, :2] if (vt >= 0).all() and len(uv) else None
    paint = _material(material, f"material '{name}'", coordinates, pictures, findings)
    if tints is not None and not material:
        paint = replace(paint, colour=np.ones(4))
    return Part(vertices[v, :3], inverse.reshape(-1, 3), paint, tints, normals[vn, :3] if (vn >= 0).all() else None)


def _read_libraries(path: Path, statements: list[str], findings: Findings) -> dict[str, dict[str, str]]:
    """The statements of every material of all libraries, keys in small letters. What comes first counts."""
    library: dict[str, dict[str, str]] = {}
    for statement in dict.fromkeys(statements):
        whole = find_file(path.parent, statement.replace("\\", "/"))
        names = [statement] if whole else statement.partition(" #")[0].split()
        if len(names) > 1:
            findings.met("several names in one mtllib")
        for name in names:
            file = find_file(path.parent, name.replace("\\", "/"))
            file = file or find_file(path.parent, name.replace("\\", "/").rsplit("/", 1)[-1])
            if file is None:
                findings.warn(f"material file '{name}' is missing", "missing material files")
                continue
            current: dict[str, str] = {}
            for line in _text(file.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\\\n", b" ")).splitlines():
                key, *rest = line.strip().split(None, 1)[:2] or ("",)
                if key.lower() == "newmtl":
                    current = {}
                    library.setdefault(rest[0].strip() if rest else "", current)
                elif rest and not key.startswith("#"):
                    current[key.lower()] = rest[0].strip()
    return library


def _find_material(name: str, library: dict, libraries: list[str], findings: Findings) -> dict[str, str]:
    """Its statements, if need be in other capitals; none where it is nowhere, which is reported."""
    for given in (name, name.partition("#")[0].strip()):  # a # may begin a comment
        same = [key for key in library if key.casefold() == given.casefold()]
        if given in library or len(same) == 1:
            return library[given if given in library else same[0]]
    if name and (library or not libraries):
        findings.warn(f"material '{name}' is in no material file", "missing materials")
    return {}


def _material(data: dict[str, str], label: str, uv: np.ndarray | None, pictures: Pictures, findings) -> Material:
    """MTL: map_Kd times Kd, opacity d times map_d, and Ke."""

    def numbers(key: str) -> np.ndarray | None:
        if key not in data:
            return None
        try:
            values = np.array(data[key].partition("#")[0].removeprefix("-halo").split(), float)[:3]
            if len(values) != 2 and np.isfinite(values).all():
                return np.broadcast_to(values, 3)
        except ValueError:
            pass
        findings.warn(f"{label}: {key} '{data[key]}' is not understood", f"MTL {key}")
        return None

    for key in data.keys() & {"decal", "disp"}:
        findings.warn(f"{label}: {key} is not rendered", f"MTL {key}")
    kd, ke, solid, clear = (numbers(key) for key in ("kd", "ke", "d", "tr"))
    opacity = float(np.clip(solid[0] if solid is not None else 1 - clear[0] if clear is not None else 1, 0, 1))
    base = _texture(data, "map_kd", label, uv, pictures, findings)
    if base is not None:
        factor = np.ones(3) if kd is None or not kd.any() else kd  # exporters write black unasked
        base = base.times(np.append(factor.clip(0, 1), opacity))
    mask = _texture(data, "map_d", label, uv, pictures, findings)
    if mask is not None:
        findings.met("map_d")
        if base is not None:  # the opacity is the mask's alone
            even = np.full_like(base.pixels[..., 3], 255 * opacity)
            base = replace(base, pixels=np.dstack([base.pixels[..., :3], even]))
        if (mask.pixels[..., 3] == 255).all():
            grey = (mask.pixels[..., :3] @ [0.2126, 0.7152, 0.0722]).round().astype(np.uint8)
            mask = replace(mask, pixels=np.dstack([mask.pixels[..., :3], grey]))
    glow = _texture(data, "map_ke", label, uv, pictures, findings)
    if ke is None or not ke.any():
        ke = None if glow is None else np.ones(3)
    if ke is not None:
        findings.met("emission")
    colour = np.append(np.full(3, 0.7) if kd is None else kd.clip(0, 1), opacity)
    return Material(colour, base, mask, emission=None if ke is None else to_linear(ke), glow=glow)


def _texture(data, key: str, label: str, uv: np.ndarray | None, pictures: Pictures, findings) -> Texture | None:
    """A map with its options; None, and a warning, if it is missing or broken."""
    if key not in data:
        return None
    options: dict[str, list[str]] = {}
    name = data[key]
    while match := _OPTION.match(name):
        option, name = match[1].lower(), name[match.end() :]
        values = re.match(_VALUES.get(option, r"\S+\s+"), name)
        if values is None:
            break
        options[option], name = values[0].split(), name[values.end() :]
        if option in ("s", "o", "mm", "clamp"):
            findings.met(f"MTL -{option}")
        elif option not in ("blendu", "blendv", "boost", "texres", "bm", "type"):
            findings.warn(f"{label}: option -{option} of {key} is not supported", f"MTL -{option}")
    name = name.strip().strip('"')
    if uv is None:
        findings.warn(f"{label}: some faces have no coordinates for its texture '{name}'", "missing coordinates")
        return None
    try:
        pixels = pictures.named(name)
    except PictureError as error:
        findings.warn(f"{label}: texture {error}", "missing textures")
        return None
    if "mm" in options:
        low, gain = map(float, options["mm"])
        pixels = np.dstack([(low * 255 + gain * pixels[..., :3]).round().clip(0, 255).astype(np.uint8), pixels[..., 3]])
    scale, offset = (np.array([*options.get(o, ()), same, same][:2], float) for o, same in (("s", 1), ("o", 0)))
    clamp = options.get("clamp", [""])[0].lower() == "on"
    return Texture(pixels, uv * scale + offset, ("clamp",) * 2 if clamp else ("repeat",) * 2)


def _text(data: bytes) -> str:
    """UTF-8, or what older programs write."""
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        return data.decode("latin-1").strip()
