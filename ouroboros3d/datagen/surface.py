"""Normalised triangles with materials, made by every mesh reader and rendered by every backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from .assets import AssetError

OBJECT_RADIUS = 0.5
_GLASS = 0.7
# Corner normals further than this from their face are not used, so that hard edges stay hard.
_CREASE_COSINE = float(np.cos(np.radians(40.0)))


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 1] as light intensities in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """The inverse of to_linear."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


@dataclass(frozen=True, eq=False)
class Texture:
    """A picture and where it lies on a part.

    pixels: [h, w, 4] uint8 RGBA, sRGB; uv: [n, 2] of the part's vertices, v upwards, so the first row is at v = 1;
    wrap: what happens outside [0, 1] in u and in v, each "repeat", "mirror" or "clamp"; nearest: no interpolation.
    """

    pixels: np.ndarray
    uv: np.ndarray
    wrap: tuple[str, str] = ("repeat", "repeat")
    nearest: bool = False

    def at(self, corners: np.ndarray, bary: np.ndarray) -> np.ndarray:
        """RGBA [n, 4] in [0, 1] at points of triangles: corners [n, 3] vertex indices, bary [n, 3]."""
        uv = np.nan_to_num((self.uv[corners] * bary[..., None]).sum(1))
        sides = (*self.pixels.shape[1::-1],)
        places = (uv[:, 0] * sides[0], (1 - uv[:, 1]) * sides[1])
        if self.nearest:
            x, y = (_wrapped(np.floor(p).astype(int), n, w) for p, n, w in zip(places, sides, self.wrap, strict=True))
            return self.pixels[y, x].astype(np.float32) / 255
        x, y = (p - 0.5 for p in places)
        x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
        fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
        x0, x1 = (_wrapped(k, sides[0], self.wrap[0]) for k in (x0, x0 + 1))
        y0, y1 = (_wrapped(k, sides[1], self.wrap[1]) for k in (y0, y0 + 1))
        top = self.pixels[y0, x0] * (1 - fx) + self.pixels[y0, x1] * fx
        bottom = self.pixels[y1, x0] * (1 - fx) + self.pixels[y1, x1] * fx
        return (top * (1 - fy) + bottom * fy) / 255

    def times(self, factor: np.ndarray, linear: bool = False) -> Texture:
        """With RGBA times `factor` [4]; linear: the colours' factors are of light intensities, else of sRGB values."""
        if (factor == 1).all():
            return self
        values = np.arange(256.0)[:, None] * factor
        if linear:
            values[:, :3] = 255 * to_srgb(to_linear(np.arange(256)[:, None] / 255) * factor[:3])
        table = values.round().clip(0, 255).astype(np.uint8)
        return replace(self, pixels=np.stack([table[self.pixels[..., k], k] for k in range(4)], -1))


def _wrapped(index: np.ndarray, size: int, wrap: str) -> np.ndarray:
    """Texel numbers brought into [0, size)."""
    if wrap == "clamp":
        return index.clip(0, size - 1)
    if wrap == "mirror":
        index = index % (2 * size)
        return np.minimum(index, 2 * size - 1 - index)
    return index % size


@dataclass(frozen=True, eq=False)
class Material:
    """Colour and light of a part's own.

    colour: RGBA in [0, 1], sRGB; base: a texture that counts in its place (the colour is in its pixels already);
    opacity: a texture whose alpha is a further factor; cutoff: None blends by alpha, else what reaches it is opaque
    and all other is not there (0: opaque throughout); emission: light intensities [3], times those of `glow`;
    linear: tints are factors of light intensities, else of sRGB values; unlit: shown as it is, whatever the light.
    """

    colour: np.ndarray = field(default_factory=lambda: np.array([0.7, 0.7, 0.7, 1.0]))
    base: Texture | None = None
    opacity: Texture | None = None
    cutoff: float | None = None
    emission: np.ndarray | None = None
    glow: Texture | None = None
    linear: bool = False
    unlit: bool = False

    def rgba(self, corners: np.ndarray, bary: np.ndarray, tints: np.ndarray | None) -> np.ndarray:
        """RGBA [n, 4] in [0, 1], sRGB, at points as in Texture.at; tints: [N, 4] in [0, 1] by vertex."""
        if self.base is not None:
            out = self.base.at(corners, bary)
        else:
            out = np.repeat(np.asarray(self.colour, np.float32)[None], len(corners), 0)
        if tints is not None:
            tint = (tints[corners] * bary[..., None]).sum(1)
            out[:, :3] = to_srgb(to_linear(out[:, :3]) * tint[:, :3]) if self.linear else out[:, :3] * tint[:, :3]
            out[:, 3] *= tint[:, 3]
        if self.opacity is not None:
            out[:, 3] *= self.opacity.at(corners, bary)[:, 3]
        if self.cutoff is not None:
            out[:, 3] = out[:, 3] >= self.cutoff
        return out

    def light(self, corners: np.ndarray, bary: np.ndarray) -> np.ndarray:
        """Emitted light intensities [n, 3] at points as in Texture.at."""
        glow = 1.0 if self.glow is None else to_linear(self.glow.at(corners, bary)[:, :3])
        return np.broadcast_to(self.emission * glow, (len(corners), 3))


@dataclass(eq=False)
class Part:
    """Triangles of one material: vertices [n, 3], faces [t, 3], and by vertex maybe tints [n, 4] in [0, 1] (factors
    of the colour) and normals [n, 3]."""

    vertices: np.ndarray
    faces: np.ndarray
    material: Material = field(default_factory=Material)
    tints: np.ndarray | None = None
    normals: np.ndarray | None = None

    def moved(self, matrix: np.ndarray) -> Part:
        """The part under an affine matrix [4, 4], which may be singular."""
        turn, normals = matrix[:3, :3], None
        if self.normals is not None:
            cofactors = np.cross(np.roll(turn, -1, 0), np.roll(turn, -2, 0))  # move normals, also where no inverse does
            normals = self.normals @ cofactors.T
        return Part(self.vertices @ turn.T + matrix[:3, 3], self.faces, self.material, self.tints, normals)


@dataclass(eq=False)
class Surface:
    """A triangle soup that fits into a sphere around the origin.

    vertices: [N, 3], world units, z up; faces: [T, 3] int; material: [T] int, index into `materials` and `starts`;
    starts: [M] int, the vertex at which a material's own arrays begin; tints: [N, 4] in [0, 1], or None;
    corner_normals: [T, 3, 3] unit normals, either side;
    centre [3], scale, radius: vertices = scale * (the file's vertices, z up, - centre), in a sphere of that radius.
    """

    vertices: np.ndarray
    faces: np.ndarray
    material: np.ndarray
    materials: list[Material]
    starts: np.ndarray
    tints: list[np.ndarray | None]
    corner_normals: np.ndarray
    centre: np.ndarray
    scale: float
    radius: float

    def face_areas(self) -> np.ndarray:
        """[T] areas in square world units."""
        return 0.5 * np.linalg.norm(_face_cross(self.vertices, self.faces), axis=1)

    def glass_fraction(self) -> float:
        """The share of the surface area, in [0, 1], whose material is see-through as a whole."""
        area = self.face_areas()
        glass = np.array([m.cutoff is None and m.colour[3] < _GLASS for m in self.materials])
        return float(area[glass[self.material]].sum() / max(area.sum(), 1e-12))

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points [count, 3], spread evenly over the whole surface."""
        face, bary = self.spread(count, rng)
        a, b, c = (self.vertices[self.faces[face, k]] for k in range(3))
        return a + bary[:, 1:2] * (b - a) + bary[:, 2:] * (c - a)

    def spread(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Places spread evenly over the whole surface: faces [count], barycentric [count, 3]."""
        area = self.face_areas()
        face = rng.choice(len(area), count, p=area / area.sum())
        u, v = rng.random((2, count))
        u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
        return face, np.stack([1 - u - v, u, v], -1)

    def rgba(self, face: np.ndarray, bary: np.ndarray) -> np.ndarray:
        """RGBA [n, 4] in [0, 1] at points of faces."""
        out = np.empty((len(face), 4), np.float32)
        for index, chosen in self._by_material(face):
            corners = self.faces[face[chosen]] - self.starts[index]
            out[chosen] = self.materials[index].rgba(corners, bary[chosen], self.tints[index])
        return out

    def lit(self, face: np.ndarray, bary: np.ndarray, rgb: np.ndarray, shaded: np.ndarray) -> np.ndarray:
        """Shaded colours [n, 3] with what emits light of its own, and `rgb` in place of those that are unlit."""
        if not any(m.unlit or m.emission is not None for m in self.materials):
            return shaded
        for index, chosen in self._by_material(face):
            material = self.materials[index]
            if material.unlit:
                shaded[chosen] = rgb[chosen]
            if material.emission is not None:
                corners = self.faces[face[chosen]] - self.starts[index]
                shaded[chosen] = to_srgb(to_linear(shaded[chosen]) + material.light(corners, bary[chosen])).clip(0, 1)
        return shaded

    def _by_material(self, face: np.ndarray):
        """Yields every material in use and the positions of its faces in `face`."""
        material = self.material[face]
        order = np.argsort(material, kind="stable")
        numbers, first = np.unique(material[order], return_index=True)
        yield from zip(numbers.tolist(), np.split(order, first[1:]), strict=True) if len(face) else ()


def check_count(faces: int, max_faces: int | None) -> None:
    """Raises AssetError if there are too many triangles."""
    if max_faces is not None and faces > max_faces:
        raise AssetError(f"{faces:,} triangles are more than the limit of {max_faces:,} (--max_faces)")


def make_surface(parts: list[Part], radius: float = OBJECT_RADIUS, max_faces: int | None = None) -> Surface:
    """Join parts (z up) into one surface and fit it into the sphere of that radius around the origin.

    Every backend normalises here: the centre is that of the bounding box of the vertices in use, and the furthest of
    them comes to lie on the sphere, all in float64.
    Raises AssetError when no part has a face or there are too many, or the extent is zero or not finite.
    """
    parts = [p for p in parts if len(p.faces)]
    if not parts:
        raise AssetError("no triangles")
    check_count(sum(len(p.faces) for p in parts), max_faces)
    starts = np.cumsum([0, *(len(p.vertices) for p in parts)])
    v = np.concatenate([np.asarray(p.vertices, float) for p in parts])
    f = np.concatenate([np.asarray(p.faces, int) + o for p, o in zip(parts, starts[:-1], strict=True)])
    used = v[np.unique(f)]  # stray vertices must not shrink the object
    if not np.isfinite(used).all():
        raise AssetError("a vertex is not a finite number")
    centre = used.min(0) / 2 + used.max(0) / 2
    with np.errstate(over="ignore"):
        extent = np.linalg.norm(used - centre, axis=1).max()
    if not np.isfinite(extent):
        raise AssetError("the coordinates are too large to work with")
    if not extent > 1e-12 * np.abs(used).max():
        raise AssetError("all vertices lie in one point")
    scale = radius / extent
    v = np.nan_to_num((v - centre) * scale)
    normals = [
        _corner_normals(v[start : start + len(p.vertices)], np.asarray(p.faces, int), p.normals)
        for p, start in zip(parts, starts[:-1], strict=True)
    ]
    return Surface(
        v,
        f,
        np.repeat(np.arange(len(parts)), [len(p.faces) for p in parts]),
        [p.material for p in parts],
        starts[:-1],
        [None if p.tints is None else np.asarray(p.tints, np.float32) for p in parts],
        np.concatenate(normals).astype(np.float32),
        centre,
        scale,
        radius,
    )


def _face_cross(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return np.cross(b - a, c - a)


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] at length 1; zero stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _corner_normals(vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray | None) -> np.ndarray:
    """Normals per face corner [T, 3, 3], flat across creases. `normals` [N, 3]: the file's own, if any."""
    flat = unit(_face_cross(vertices, faces))[:, None]
    if normals is None:
        normals = np.zeros_like(vertices)
        for k in range(3):  # weighted by the angle at the corner, so that it does not matter how polygons are cut
            one, two = (unit(vertices[faces[:, k - j]] - vertices[faces[:, k]]) for j in (1, 2))
            angle = np.arccos((one * two).sum(-1, keepdims=True).clip(-1, 1))
            np.add.at(normals, faces[:, k], angle * flat[:, 0])
    corner = unit(np.nan_to_num(normals))[faces]
    cosine = (corner * flat).sum(-1, keepdims=True)
    corner = np.where(cosine < 0, -corner, corner)  # files disagree about the side, the light does not care
    return np.where(np.abs(cosine) < _CREASE_COSINE, flat, corner)
