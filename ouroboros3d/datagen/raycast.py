"""Ray-cast pictures of textured meshes on the CPU (trimesh for loading, Embree for the rays).

World frame: right-handed, z up, the object centred in a sphere of radius 0.5 (or as asked for). Cameras are
Blender/OpenGL camera-to-world matrices (x right, y up, looking along -z), the convention of the training files.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .assets import AssetError, find_texture
from .polygons import triangulate_concave

FOV_DEGREES = 39.598
DISTANCE = 1.7417
OBJECT_RADIUS = 0.5

# Rays go on through surfaces less opaque than this (leaf textures, panes), at most this many times.
_OPAQUE = 0.5
_MAX_LAYERS = 8
_GLASS = 0.7
# Corner normals further than this from their face are not used, so that hard edges stay hard.
_CREASE_COSINE = float(np.cos(np.radians(40.0)))
# The sky light comes from everywhere, most from this direction of the world, and never quite fades.
SKY_DIRECTION = np.array([0.4, -0.45, 0.8], np.float32) / np.linalg.norm([0.4, -0.45, 0.8])
_AMBIENT = 0.45
# Nothing is quite black: without some sheen a black object would be a shapeless hole.
_SHEEN = 0.04


@dataclass
class Surface:
    """A triangle soup with one material per face.

    vertices: [N, 3], world units, z up; faces: [T, 3] int; uv: [N, 2], v upwards, repeating outside [0, 1];
    material: [T] int, index into `colours` and `textures`; colours: [M, 4] RGBA in [0, 1];
    textures: one [h, w, 4] float array in [0, 1] or None per material (then the colour counts);
    corner_normals: [T, 3, 3] unit normals, either side; tints: [N, 4] in [0, 1], factors of the colour, or None;
    centre [3], scale, radius: vertices = scale * (the file's vertices, z up, - centre), in a sphere of that radius.
    """

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    colours: np.ndarray
    textures: list[np.ndarray | None]
    corner_normals: np.ndarray
    tints: np.ndarray | None
    centre: np.ndarray
    scale: float
    radius: float

    def face_areas(self) -> np.ndarray:
        """[T] areas in square world units."""
        return 0.5 * np.linalg.norm(_face_cross(self.vertices, self.faces), axis=1)

    def glass_fraction(self) -> float:
        """The share of the surface area, in [0, 1], whose material is see-through as a whole."""
        area = self.face_areas()
        return float(area[self.colours[self.material, 3] < _GLASS].sum() / max(area.sum(), 1e-12))

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Points [count, 3], spread evenly over the whole surface."""
        area = self.face_areas()
        face = rng.choice(len(area), count, p=area / area.sum())
        u, v = rng.random((2, count, 1))
        u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
        a, b, c = (self.vertices[self.faces[face, k]] for k in range(3))
        return a + u * (b - a) + v * (c - a)


def _face_cross(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    return np.cross(b - a, c - a)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _corner_normals(vertices: np.ndarray, faces: np.ndarray, normals: np.ndarray | None) -> np.ndarray:
    """Normals per face corner [T, 3, 3], flat across creases. `normals` [N, 3]: the file's own, if any."""
    flat = _face_cross(vertices, faces)
    if normals is None:
        normals = np.zeros_like(vertices)
        for k in range(3):
            np.add.at(normals, faces[:, k], flat)  # weighted by area
    flat = _unit(flat)[:, None]
    corner = _unit(normals)[faces]
    cosine = (corner * flat).sum(-1, keepdims=True)
    corner = np.where(cosine < 0, -corner, corner)  # files disagree about the side, the light does not care
    return np.where(np.abs(cosine) < _CREASE_COSINE, flat, corner)


def make_surface(parts: list[dict], radius: float = OBJECT_RADIUS, max_faces: int | None = None) -> Surface:
    """Join parts into one surface and fit it into the sphere of that radius around the origin.

    Each part: vertices [n, 3] (z up), faces [t, 3], colour RGBA in [0, 1], and optionally uv [n, 2],
    texture [h, w, 4] in [0, 1], tints [n, 4] in [0, 1] and normals [n, 3]. Colours are sRGB.
    Every backend normalises here: the centre is that of the bounding box of the vertices in use, and the furthest of
    them comes to lie on the sphere, all in float64.
    Raises AssetError when no part has a face or there are too many, or the extent is zero or not finite.
    """
    parts = [p for p in parts if len(p["faces"])]
    if not parts:
        raise AssetError("no triangles")
    offsets = np.cumsum([0, *(len(p["vertices"]) for p in parts)])
    v = np.concatenate([np.asarray(p["vertices"], float) for p in parts])
    f = np.concatenate([np.asarray(p["faces"], int) + o for p, o in zip(parts, offsets[:-1], strict=True)])
    if max_faces is not None and len(f) > max_faces:
        raise AssetError(f"{len(f):,} triangles are more than the limit of {max_faces:,} (--max-faces)")
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
    uv, tints, textures, corners = [], [], [], []
    for part, start, stop in zip(parts, offsets[:-1], offsets[1:], strict=True):
        count = stop - start
        corners.append(_corner_normals(v[start:stop], np.asarray(part["faces"], int), part.get("normals")))
        textured = part.get("texture") is not None and part.get("uv") is not None
        uv.append(np.asarray(part["uv"], float) if textured else np.zeros((count, 2)))
        textures.append(np.asarray(part["texture"], np.float32) if textured else None)
        tints.append(np.asarray(part.get("tints", np.ones((count, 4))), np.float32))
    return Surface(
        v,
        f,
        np.concatenate(uv),
        np.concatenate([np.full(len(p["faces"]), index) for index, p in enumerate(parts)]),
        np.asarray([p["colour"] for p in parts], np.float32),
        textures,
        np.concatenate(corners).astype(np.float32),
        np.concatenate(tints) if any("tints" in p for p in parts) else None,
        centre,
        scale,
        radius,
    )


def load_surface(
    path: str | Path,
    up: str = "y",
    max_texture: int = 512,
    radius: float = OBJECT_RADIUS,
    max_faces: int | None = None,
) -> Surface:
    """Load a mesh file (anything trimesh reads: obj, glb, ply, stl, ...) and fit it into a sphere.

    up: the file's up axis, "y" (obj and glTF by custom) or "z". max_texture: larger textures are reduced to
    this many pixels a side. Of several scenes in a glTF file the default one counts, or the first if none is. A
    missing texture leaves the material's plain colour (assets.missing_textures names it).
    Raises AssetError when the file is missing, unreadable, empty or too large.
    """
    import trimesh

    path = Path(path)
    if not path.is_file():
        raise AssetError(f"{path}: no such file")
    if path.suffix.lower() == ".fbx":
        raise AssetError(f"{path}: fbx is read by Blender alone; render with --backend blender")

    class Resolver(trimesh.resolvers.FilePathResolver):
        def get(self, name: str) -> bytes:
            texture = find_texture(path, name)
            return texture.read_bytes() if texture else super().get(name)

    try:
        data = path.read_bytes()
        data = triangulate_concave(data) if path.suffix.lower() == ".obj" else data
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type=path.suffix[1:].lower(), resolver=Resolver(str(path)), process=False
        )
        parts = []
        for node in scene.graph.nodes_geometry:
            transform, name = scene.graph[node]
            mesh = scene.geometry[name]
            if isinstance(mesh, trimesh.Trimesh) and len(mesh.faces):
                parts.append(_part(mesh, np.asarray(transform), up, max_texture, path.suffix.lower()))
    except Exception as error:  # the readers of trimesh raise whatever they stumble over
        raise AssetError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    try:
        return make_surface(parts, radius, max_faces)
    except AssetError as error:
        raise AssetError(f"{path}: {error}") from error


Z_UP = {"y": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]), "z": np.eye(3)}  # from files with that up axis


def to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB values in [0, 1] as light intensities in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """The inverse of to_linear."""
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)


def _part(mesh, transform: np.ndarray, up: str, max_texture: int, suffix: str) -> dict:
    rotation = Z_UP[up] @ transform[:3, :3]
    part = {
        "vertices": np.asarray(mesh.vertices) @ rotation.T + Z_UP[up] @ transform[:3, 3],
        "faces": np.asarray(mesh.faces),
        "colour": np.array([0.7, 0.7, 0.7, 1.0]),
    }
    if mesh.vertex_normals is not None and "vertex_normals" in mesh._cache.cache:
        part["normals"] = np.asarray(mesh.vertex_normals) @ np.linalg.inv(rotation)
    visual, tints = mesh.visual, None
    if visual.kind == "texture" and visual.material is not None:
        material = visual.material
        kwargs = getattr(material, "kwargs", None) or {}
        linear, opaque = hasattr(material, "baseColorFactor"), False  # of glTF, else of an MTL file
        if linear:
            factor, opaque = material.baseColorFactor, material.alphaMode in (None, "OPAQUE")
            part["colour"] = np.ones(4) if factor is None else np.asarray(factor, float) / 255
            tints = visual.vertex_attributes.get("color")
        elif material.main_color is not None:
            part["colour"] = np.asarray(material.main_color, float) / 255
        if "d" in kwargs:  # trimesh keeps the opacity of an MTL file but does not use it
            part["colour"][3] = float(kwargs["d"][-1])
        texture = _texture(getattr(material, "image", None) or getattr(material, "baseColorTexture", None), max_texture)
        uv = visual.uv
        if texture is not None and uv is not None and len(uv) == len(mesh.vertices):
            if linear and (part["colour"] != 1).any():
                texture[..., :3] = to_srgb(to_linear(texture[..., :3]) * part["colour"][:3])
                texture[..., 3] *= part["colour"][3]
            if opaque:
                texture[..., 3] = 1
            part["uv"], part["texture"] = np.asarray(uv), texture
        if linear:
            part["colour"][:3] = to_srgb(part["colour"][:3])
        if opaque:
            part["colour"][3] = 1
    elif visual.kind == "face":
        part["vertices"], tints = part["vertices"][part["faces"]].reshape(-1, 3), np.repeat(visual.face_colors, 3, 0)
        part["faces"] = np.arange(len(part["vertices"])).reshape(-1, 3)
        part.pop("normals", None)
    elif visual.kind == "vertex":
        tints = visual.vertex_colors
    if tints is not None and len(tints) == len(part["vertices"]):
        tints = np.asarray(tints)
        tints = tints / np.iinfo(tints.dtype).max if tints.dtype.kind == "u" else tints.astype(float)
        tints = np.concatenate([tints, np.ones((len(tints), 4 - tints.shape[1]))], 1)
        if suffix in (".glb", ".gltf"):  # of light intensities
            tints[:, :3] = to_srgb(tints[:, :3])
        part["tints"] = tints.clip(0, 1)
        if visual.kind != "texture":
            part["colour"] = np.ones(4)
    return part


def _texture(image, max_texture: int) -> np.ndarray | None:
    """A picture as [h, w, 4] in [0, 1], or None if there is none or it cannot be decoded."""
    if image is None:
        return None
    try:
        image = image.convert("RGBA")
    except OSError:
        return None
    image.thumbnail((max_texture, max_texture))
    return np.asarray(image, np.float32) / 255


def orbit_pose(azimuth: float, elevation: float, distance: float = DISTANCE) -> np.ndarray:
    """Camera-to-world [4, 4] (OpenGL axes) on a sphere around the origin, looking at it, z up.

    Degrees; azimuth counts from +x towards +y, elevation from the horizon upwards.
    """
    a, e = np.radians(azimuth), np.radians(elevation)
    back = np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)])
    right = np.array([-np.sin(a), np.cos(a), 0.0])
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2] = right, np.cross(back, right), back
    pose[:3, 3] = distance * back
    return pose


class Raycaster:
    """Renders one surface from any number of cameras."""

    def __init__(self, surface: Surface):
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        self.surface = surface
        self._scene = EmbreeScene()
        triangles = surface.vertices[surface.faces].astype(np.float32)
        self._mesh = TriangleMesh(self._scene, triangles)  # Embree keeps a pointer only

    def render(self, c2w: np.ndarray, size: int, samples: int = 3, fov: float = FOV_DEGREES) -> np.ndarray:
        """One picture, [size, size, 4] uint8 RGBA (colour not multiplied by alpha, empty = 0).

        c2w: [4, 4] OpenGL camera-to-world; samples: rays per pixel and axis; fov: horizontal, degrees.
        """
        fine = size * samples
        directions = pixel_directions(c2w, fine, fov)
        rays, face, bary, _ = self._hits(c2w[:3, 3], directions)
        out = np.zeros((fine * fine, 4), np.float32)
        if len(rays):
            out[rays, :3] = self._shade(face, bary, directions[rays])
            out[rays, 3] = 1
        out = out.reshape(size, samples, size, samples, 4).sum((1, 3))
        out[..., :3] /= np.maximum(out[..., 3:], 1)
        out[..., 3] /= samples * samples
        return (out * 255 + 0.5).clip(0, 255).astype(np.uint8)

    def depth(self, c2w: np.ndarray, size: int, fov: float = FOV_DEGREES) -> np.ndarray:
        """Distance along the camera's axis through every pixel centre, [size, size] float32, 0 = empty."""
        directions = pixel_directions(c2w, size, fov)
        rays, _, _, distance = self._hits(c2w[:3, 3], directions)
        out = np.zeros(size * size, np.float32)
        out[rays] = distance * (directions[rays] @ -c2w[:3, 2])
        return out.reshape(size, size)

    def blocked(self, points: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Whether the object is hit by rays from points [n, 3] along unit directions [n, 3]: [n] bool."""
        hit = self._scene.run(points.astype(np.float32), directions.astype(np.float32), output=1)
        return hit["primID"] >= 0

    def _hits(self, origin: np.ndarray, directions: np.ndarray):
        """First opaque hit: indices of the rays that hit [n], face [n], barycentric [n, 3], distance [n]."""
        # Only rays into the object's sphere can hit; that is about half of them.
        closest = origin - (directions @ origin)[:, None] * directions
        rays = np.flatnonzero((closest**2).sum(1) <= (self.surface.radius * 1.001) ** 2)
        travelled = np.zeros(len(rays), np.float32)
        done = []
        for _ in range(_MAX_LAYERS):
            if not len(rays):
                break
            start = origin + directions[rays] * travelled[:, None]
            hit = self._scene.run(start.astype(np.float32), directions[rays].astype(np.float32), output=1)
            keep = hit["primID"] >= 0
            rays, face = rays[keep], hit["primID"][keep]
            u, v = hit["u"][keep], hit["v"][keep]
            travelled = travelled[keep] + hit["tfar"][keep]
            bary = np.stack([1 - u - v, u, v], -1)
            opaque = self._albedo(face, bary)[:, 3] >= _OPAQUE
            done.append((rays[opaque], face[opaque], bary[opaque], travelled[opaque]))
            rays, travelled = rays[~opaque], travelled[~opaque] + 1e-4
        if not done:
            return np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3)), np.zeros(0)
        return tuple(np.concatenate(x) for x in zip(*done, strict=True))

    def _albedo(self, face: np.ndarray, bary: np.ndarray) -> np.ndarray:
        """RGBA [n, 4] in [0, 1] at points of faces."""
        s = self.surface
        material = s.material[face]
        colour = s.colours[material]
        for index in np.unique(material):
            texture = s.textures[index]
            if texture is not None:
                chosen = np.flatnonzero(material == index)
                uv = (s.uv[s.faces[face[chosen]]] * bary[chosen, :, None]).sum(1)
                colour[chosen] = _lookup(texture, uv)
        if s.tints is not None:
            colour *= (s.tints[s.faces[face]] * bary[..., None]).sum(1)
        return colour

    def _shade(self, face: np.ndarray, bary: np.ndarray, directions: np.ndarray) -> np.ndarray:
        normal = _unit((self.surface.corner_normals[face] * bary[..., None]).sum(1))
        # Two-sided: light the side that is seen.
        normal = np.where((normal * directions).sum(1, keepdims=True) > 0, -normal, normal)
        light = _AMBIENT + (1 - _AMBIENT) * (0.5 + 0.5 * normal @ SKY_DIRECTION)
        albedo = _SHEEN + (1 - _SHEEN) * self._albedo(face, bary)[:, :3]
        return albedo * light[:, None]


def _lookup(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear look-up in a repeating texture; the image's first row is at v = 1."""
    height, width = texture.shape[:2]
    x = np.nan_to_num(uv[:, 0] % 1.0) * width - 0.5
    y = np.nan_to_num((1 - uv[:, 1]) % 1.0) * height - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = (x - x0)[:, None].astype(np.float32), (y - y0)[:, None].astype(np.float32)
    x1, y1, x0, y0 = (x0 + 1) % width, (y0 + 1) % height, x0 % width, y0 % height
    top = texture[y0, x0] * (1 - fx) + texture[y0, x1] * fx
    bottom = texture[y1, x0] * (1 - fx) + texture[y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def pixel_directions(c2w: np.ndarray, size: int, fov: float) -> np.ndarray:
    """Unit world directions through pixel centres, [size * size, 3], rows from the top."""
    focal = 0.5 * size / np.tan(np.radians(fov / 2))
    t = (np.arange(size) + 0.5 - size / 2) / focal
    x, y = np.meshgrid(t, -t)
    return _unit(np.stack([x, y, -np.ones_like(x)], -1).reshape(-1, 3) @ c2w[:3, :3].T)
