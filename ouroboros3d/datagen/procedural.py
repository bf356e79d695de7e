"""Random objects made of simple solids, to train on beside modelled ones.

An object depends only on (seed, number). Most are symmetric and stand like furniture, and many have strong colours: a
small model learns from them where surfaces are, and to copy colours from the input.
"""

from __future__ import annotations

import numpy as np

from .surface import OBJECT_RADIUS, Material, Part, Surface, Texture, make_surface

_TEXTURE_SIZE = 64
_ABOUT_X = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])  # quarter turns
_ABOUT_Y = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])


def random_object(seed: int, number: int, radius: float = OBJECT_RADIUS) -> Surface:
    """The procedural object `number` of the endless series `seed`, z up, inside the sphere of that radius."""
    rng = np.random.default_rng([seed, number])
    layouts = (_seat, _table, _lamp, _vehicle, _tower, _cabinet, _heap, _heap)
    builder = _Builder(rng)
    layouts[rng.integers(len(layouts))](builder)
    builder.turn(rng.uniform(0, 360))
    return make_surface(builder.parts, radius)


# Solids: vertices [n, 3] in [-1, 1], faces [t, 3] and uv [n, 2]; textures run around what is round.


def _lathe(profile: np.ndarray, sides: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A profile [p, 2] of (radius, height), turned about z. Returns vertices, faces, uv."""
    angle = np.linspace(0, 2 * np.pi, sides + 1)
    ring = np.stack([np.cos(angle), np.sin(angle)], -1)
    vertices = np.concatenate(
        [profile[:, None, :1] * ring, np.broadcast_to(profile[:, None, 1:], (len(profile), sides + 1, 1))], -1
    )
    u, v = np.meshgrid(angle / (2 * np.pi), np.linspace(0, 1, len(profile)))
    return vertices.reshape(-1, 3), _grid_faces(len(profile), sides + 1), np.stack([u, v], -1).reshape(-1, 2)


def _grid_faces(rows: int, columns: int) -> np.ndarray:
    i, j = (x.ravel() for x in np.meshgrid(range(rows - 1), range(columns - 1), indexing="ij"))
    a, b, c, d = i * columns + j, i * columns + j + 1, (i + 1) * columns + j, (i + 1) * columns + j + 1
    return np.concatenate([np.stack([a, b, d], -1), np.stack([a, d, c], -1)])


def box():
    """A cube of side 2: vertices, faces, uv; every face shows the whole texture."""
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float)
    vertices = [np.insert(square, axis, side, axis=1) for axis in range(3) for side in (-1.0, 1.0)]
    faces = [np.array([[0, 1, 2], [0, 2, 3]]) + 4 * k for k in range(6)]
    return np.concatenate(vertices), np.concatenate(faces), np.tile((square + 1) / 2, (6, 1))


def cylinder(top: float = 1.0, sides: int = 24):
    """Radius 1 at the bottom and `top` at the top, height 2, with lids; top = 0 is a cone."""
    return _lathe(np.array([[0, -1], [1, -1], [1, -1], [top, 1], [top, 1], [0, 1]]), sides)


def sphere(sides: int = 24):
    """The unit sphere."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 13)
    return _lathe(np.stack([np.cos(angle), np.sin(angle)], -1), sides)


def torus(thickness: float = 0.3, sides: int = 24):
    """A ring around z of outer radius 1; thickness: radius of the tube."""
    angle = np.linspace(0, 2 * np.pi, 13)
    return _lathe(np.stack([1 - thickness + thickness * np.cos(angle), thickness * np.sin(angle)], -1), sides)


class _Builder:
    """Collects parts; a palette of a few paints makes an object look as if made by one hand."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.parts: list[Part] = []
        self.palette = [_paint(rng) for _ in range(rng.integers(2, 5))]

    def add(self, solid, size, position, paint: int | None = None, tilt: np.ndarray | None = None) -> None:
        """Put a solid of half extents `size` [3] at `position` [3]; tilt: turn [3, 3] before moving."""
        vertices, faces, uv = solid
        vertices = vertices * np.asarray(size)
        if tilt is not None:
            vertices = vertices @ tilt.T
        colour, texture = self.palette[(self.rng.integers(99) if paint is None else paint) % len(self.palette)]
        material = Material(colour, None if texture is None else Texture(texture, uv))
        self.parts.append(Part(vertices + np.asarray(position), faces, material))

    def around(self, solid, size, position, count: int, paint: int, start: float = 45.0) -> None:
        """`count` copies around the z axis; position: of the first, before its turn by `start` degrees."""
        for k in range(count):
            turn = _about_z(start + 360 * k / count)
            self.add(solid, size, turn @ np.asarray(position), paint, turn)

    def four(self, solid, size, position, paint: int, tilt: np.ndarray | None = None) -> None:
        """One at each corner of the rectangle around the z axis of which `position` is one."""
        x, y, z = position
        for i in (-x, x):
            for j in (-y, y):
                self.add(solid, size, (i, j, z), paint, tilt)

    def turn(self, degrees: float) -> None:
        """Turn the whole object about z."""
        for part in self.parts:
            part.vertices = part.vertices @ _about_z(degrees).T

    def leg(self):
        return [box(), cylinder(), cylinder(0.6)][self.rng.integers(3)]

    def any_solid(self):
        rng = self.rng
        kind = rng.choice(6, p=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
        if kind == 4:
            return torus(rng.uniform(0.15, 0.4))
        if kind == 5:
            return cylinder(rng.uniform(0.3, 0.8), rng.integers(3, 8))
        return (box(), cylinder(), sphere(), cylinder(0.0))[kind]


def _about_z(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _tilted(rng: np.random.Generator) -> np.ndarray:
    """A quarter turn about x or y, or none, then any turn about z."""
    return _about_z(rng.uniform(0, 360)) @ (np.eye(3), _ABOUT_X, _ABOUT_Y)[rng.integers(3)]


def _colour(rng: np.random.Generator) -> np.ndarray:
    """RGBA: loud, muted, wooden or grey."""
    kind = rng.random()
    if kind < 0.5:
        h, s, v = rng.random(), rng.uniform(0.7, 1), rng.uniform(0.6, 1)
    elif kind < 0.75:
        h, s, v = rng.random(), rng.uniform(0.2, 0.6), rng.uniform(0.3, 0.95)
    elif kind < 0.88:
        h, s, v = rng.uniform(0.05, 0.11), rng.uniform(0.4, 0.8), rng.uniform(0.3, 0.85)
    else:
        h, s, v = 0.0, 0.0, rng.uniform(0.08, 1)
    k = (np.array([5.0, 3.0, 1.0]) + 6 * h) % 6
    return np.append(v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1), 1.0)


def _paint(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """A colour and, for two in five, a two-coloured texture [64, 64, 4] uint8."""
    first, second = _colour(rng), _colour(rng)
    if rng.random() < 0.6:
        return first, None
    y, x = np.mgrid[:_TEXTURE_SIZE, :_TEXTURE_SIZE] / _TEXTURE_SIZE
    n = int(rng.integers(2, 6))
    kind = rng.integers(5)
    if kind == 0:
        mask = (x * n) % 1 < 0.5
    elif kind == 1:
        mask = (y * n) % 1 < 0.5
    elif kind == 2:
        mask = (np.floor(x * n) + np.floor(y * n)) % 2 == 0
    elif kind == 3:
        mask = ((x * n) % 1 - 0.5) ** 2 + ((y * n) % 1 - 0.5) ** 2 < 0.09
    else:
        mask = y < rng.uniform(0.3, 0.7)
    return first, (np.where(mask[..., None], first, second) * 255).round().astype(np.uint8)


# Layouts. Lengths are relative, the object is scaled to the sphere in the end.


def _seat(b: _Builder) -> None:
    r = b.rng
    w, d, h, t = r.uniform(0.35, 1.2), r.uniform(0.35, 0.55), r.uniform(0.15, 0.5), r.uniform(0.03, 0.18)
    b.add(box(), (d, w, t), (0, 0, h + t), 0)
    back, thin = r.uniform(0.2, 0.7), r.uniform(0.03, 0.15)
    b.add(box(), (thin, w, back), (-d + thin, 0, h + 2 * t + back), int(r.integers(2)))
    if r.random() < 0.5:
        arm, width = r.uniform(0.1, 0.3), r.uniform(0.03, 0.15)
        for side in (-1, 1):
            b.add(box(), (d, width, arm), (0, side * (w - width), h + 2 * t + arm), 1)
    leg, s = b.leg(), r.uniform(0.03, 0.08)
    b.four(leg, (s, s, h / 2), (d - s, w - s, h / 2), 2)
    if r.random() < 0.3:
        b.add(sphere(), (0.1, w * 0.3, 0.15), (-d + 2 * thin + 0.1, 0, h + 2 * t + 0.15), 3)


def _table(b: _Builder) -> None:
    r = b.rng
    w, d, h, t = r.uniform(0.5, 1.1), r.uniform(0.4, 0.7), r.uniform(0.3, 0.9), r.uniform(0.03, 0.1)
    round_top = r.random() < 0.4
    b.add(cylinder(sides=32) if round_top else box(), (d, d if round_top else w, t), (0, 0, h + t), 0)
    if r.random() < 0.3:
        b.add(cylinder(r.uniform(0.3, 1)), (0.1, 0.1, h / 2), (0, 0, h / 2), 1)
        b.add(cylinder(0.7), (0.6 * d, 0.6 * d, 0.04), (0, 0, 0.04), 1)
    else:
        leg, s = b.leg(), r.uniform(0.03, 0.08)
        x, y = (0.65 * d, 0.65 * d) if round_top else (d - s, w - s)
        b.four(leg, (s, s, h / 2), (x, y, h / 2), 1)
    z = h + 2 * t
    for _ in range(r.integers(0, 4)):
        size = r.uniform(0.08, 0.22, 3)
        size[1] = size[0]
        b.add(b.any_solid(), size, (r.uniform(-0.5, 0.5) * d, r.uniform(-0.5, 0.5) * d, z + size[2]))


def _lamp(b: _Builder) -> None:
    r = b.rng
    base, h, shade = r.uniform(0.15, 0.4), r.uniform(0.3, 1.1), r.uniform(0.2, 0.5)
    b.add([cylinder(r.uniform(0.2, 1)), sphere(), box()][r.integers(3)], (base, base, 0.1), (0, 0, 0.1), 0)
    s = r.uniform(0.03, 0.09)
    b.add(cylinder(), (s, s, h), (0, 0, h), 1)
    for _ in range(r.integers(0, 4)):
        k = r.uniform(0.06, 0.2)
        b.add(sphere(), (k, k, k), (0, 0, r.uniform(0.2, 1.8) * h), 2)
    top = [cylinder(r.uniform(0.2, 0.9)), sphere(), cylinder(0.0)][r.integers(3)]
    tall = r.uniform(0.15, 0.45)
    b.add(top, (shade, shade, tall), (0, 0, 2 * h), int(r.integers(2, 4)))


def _vehicle(b: _Builder) -> None:
    r = b.rng
    length, width = r.uniform(0.6, 1.1), r.uniform(0.25, 0.5)
    h, wheel = r.uniform(0.12, 0.3), r.uniform(0.12, 0.25)
    b.add(box(), (length, width, h), (0, 0, wheel + h), 0)
    cabin = r.uniform(0.3, 0.7) * length
    at = r.uniform(-1, 1) * (length - cabin)
    body = [box(), sphere(), cylinder(0.6, 4)][r.integers(3)]
    b.add(body, (cabin, width * 0.9, r.uniform(0.15, 0.4)), (at, 0, wheel + 2 * h + 0.12), 1)
    b.four(cylinder(), (wheel, wheel, 0.07), (0.6 * length, width, wheel), 2, _ABOUT_X)
    if r.random() < 0.4:
        b.add(cylinder(0.7), (0.08, 0.08, 0.2), (0.6 * length, 0, wheel + 2 * h + 0.2), 3)


def _tower(b: _Builder) -> None:
    z = 0.0
    for _ in range(b.rng.integers(2, 6)):
        size = b.rng.uniform(0.15, 0.5, 3)
        if b.rng.random() < 0.8:
            size[1] = size[0]
        b.add(b.any_solid(), size, (0, 0, z + size[2]))
        z += 1.9 * size[2]
    if b.rng.random() < 0.5:
        k = b.rng.uniform(0.05, 0.15)
        height = b.rng.uniform(0.2, 0.8) * z
        b.around(b.any_solid(), (k, k, k), (0.4, 0, height), int(b.rng.integers(2, 6)), 1)


def _cabinet(b: _Builder) -> None:
    r = b.rng
    w, d, h = r.uniform(0.3, 0.9), r.uniform(0.25, 0.5), r.uniform(0.3, 1.0)
    foot = r.uniform(0.03, 0.2)
    b.add(box(), (d, w, h), (0, 0, 2 * foot + h), 0)
    columns, rows = r.integers(1, 3), r.integers(1, 5)
    for i in range(columns):
        for j in range(rows):
            y, z = (2 * i + 1 - columns) / columns * w, 2 * foot + (2 * j + 1) / rows * h
            b.add(box(), (0.02, 0.9 * w / columns, 0.85 * h / rows), (d + 0.02, y, z), 1)
            b.add(sphere(), (0.03, 0.03, 0.03), (d + 0.06, y, z), 2)
    leg = b.leg()
    b.four(leg, (0.05, 0.05, foot), (d - 0.06, w - 0.06, foot), 2)
    if r.random() < 0.5:
        k = r.uniform(0.1, 0.25)
        b.add(b.any_solid(), (k, k, k), (0, r.uniform(-0.5, 0.5) * w, 2 * foot + 2 * h + k), 3)


def _heap(b: _Builder) -> None:
    """Solids anywhere around the middle; every other heap is mirrored left to right."""
    r = b.rng
    mirrored = r.random() < 0.5
    for _ in range(r.integers(2, 7)):
        size, at = r.uniform(0.1, 0.5, 3), r.uniform(-0.5, 0.5, 3)
        solid, tilt = b.any_solid(), _tilted(r)
        paint = int(r.integers(99))
        b.add(solid, size, at, paint, tilt)
        if mirrored:
            flip = np.diag([1.0, -1.0, 1.0])
            b.add(solid, size, flip @ at, paint, flip @ tilt)
