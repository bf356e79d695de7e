"""Renders the pictures in testset/: RGBA cut-outs and photo-like JPEGs of furniture that no model was trained on.

Needs the folder that get_furniture.py wrote. Every object is from the test split.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ouroboros3d.cli.get_furniture import SPLIT_FILE
from ouroboros3d.cli.options import Parser
from ouroboros3d.datagen.assets import AssetError
from ouroboros3d.datagen.meshes import load_surface
from ouroboros3d.datagen.raycast import SKY_DIRECTION, Raycaster, orbit_pose, pixel_directions
from ouroboros3d.errors import UserError
from ouroboros3d.files import read_table

SIZE = 512

# File name, id, azimuth and elevation of the camera in degrees.
CUT_OUTS = [
    ("child_chair", "blendswap-cc-by_childchair", -55, 15),
    ("sofa", "katorlegaz_futon-couch", -60, 15),
    ("lamp", "scopia_livingroom-lamp1", -70, 10),
    ("tricycle", "scopia_tricycle", -45, 18),
    ("car", "katorlegaz_concept-sedan-02", -125, 16),
    ("plant", "blendswap-cc-by_mediumindoorplant", -80, 12),
    ("cup", "scopia_creamer", -60, 20),
    ("parasol", "blendswap-cc-0_umbrella", -90, 10),
    ("armchair", "scopia_modern-armchair", -35, 14),
    ("roast_chicken", "scopia_roasted-chicken", -50, 20),
]
# The same, and the colours of wall and floor.
PHOTOS = [
    ("photo_car", "katorlegaz_concept-sedan-01v1", -55, 16, (0.72, 0.78, 0.80), (0.56, 0.38, 0.23)),
    ("photo_bin", "katorlegaz_residential-trashcan", -40, 14, (0.86, 0.80, 0.70), (0.48, 0.46, 0.45)),
]


def photo(caster: Raycaster, pose: np.ndarray, wall: tuple, floor: tuple, size: int, samples: int) -> np.ndarray:
    """The object on a plank floor before a wall, with a soft shadow: [size, size, 3] uint8."""
    rng = np.random.default_rng(0)
    fine = size * samples
    directions = pixel_directions(pose, fine, 50.0)
    origin = pose[:3, 3]
    away = -pose[:3, 2] * [1, 1, 0]
    away /= np.linalg.norm(away)
    bottom, distance = caster.surface.vertices[np.unique(caster.surface.faces), 2].min() - 1e-4, 1.1
    with np.errstate(divide="ignore"):
        to_floor = np.where(directions[:, 2] < 0, (bottom - origin[2]) / directions[:, 2], np.inf)
        ahead = directions @ away
        to_wall = np.where(ahead > 0, (distance - origin @ away) / ahead, np.inf)
    on_floor = to_floor < to_wall
    points = origin + directions * np.minimum(to_floor, to_wall)[:, None]
    across = points @ np.array([-away[1], away[0], 0])
    along, height = points @ away, points[:, 2] - bottom

    grain = _noise(rng, across * 90, along * 4) * 0.10 + _noise(rng, across * 25, along * 2) * 0.10
    plank = np.floor(across / 0.16).astype(int)
    tone = 0.9 + 0.2 * rng.random(997)[plank % 997] + grain
    tone *= np.where(np.abs(across / 0.16 - plank - 0.5) > 0.485, 0.55, 1.0)  # gaps
    colour = np.where(on_floor[:, None], np.array(floor) * tone[:, None], np.array(wall))
    colour *= np.where(on_floor, 1, 0.96 + 0.04 * _noise(rng, across * 40, height * 40))[:, None]
    skirting = ~on_floor & (height < 0.12)
    colour[skirting] = 0.9 * np.where(height[skirting] > 0.11, 0.8, 1.0)[:, None]

    light = np.zeros(len(points))
    rays = 24
    for _ in range(rays):  # half of the light from a soft window, half from the whole room
        toward = rng.normal(size=points.shape)
        toward /= np.linalg.norm(toward, axis=1, keepdims=True)
        toward = np.where(rng.random((len(points), 1)) < 0.5, SKY_DIRECTION + 0.3 * toward, toward)
        normal = np.where(on_floor[:, None], [0, 0, 1.0], -away)
        toward = np.where((toward * normal).sum(1, keepdims=True) < 0, -toward, toward)
        toward /= np.linalg.norm(toward, axis=1, keepdims=True)
        light += ~caster.blocked(points + 1e-3 * normal, toward)
    falloff = 1.05 - 0.12 * np.linalg.norm(points - [0, 0, bottom], axis=1)
    colour *= ((0.25 + 0.75 * light / rays) * falloff)[:, None]
    room = colour.reshape(size, samples, size, samples, 3).mean((1, 3)).clip(0, 1)

    rgba = caster.render(pose, size, samples, fov=50.0) / 255
    picture = rgba[..., :3] * rgba[..., 3:] + room * (1 - rgba[..., 3:])
    picture += rng.normal(scale=0.008, size=picture.shape)  # a camera's noise
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _noise(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth noise in [-1, 1] with one knot a unit."""
    knots = rng.uniform(-1, 1, (64, 64))
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    a, b = knots[i % 64, j % 64], knots[(i + 1) % 64, j % 64]
    c, d = knots[i % 64, (j + 1) % 64], knots[(i + 1) % 64, (j + 1) % 64]
    return (a * (1 - u) + b * u) * (1 - v) + (c * (1 - u) + d * u) * v


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--furniture", type=Path, required=True, help="output folder of get_furniture.py")
    parser.add_argument("--out", type=Path, default=Path("testset"), help="output folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        rows = {row["id"]: row for row in read_table(SPLIT_FILE, ["id"])}
        args.out.mkdir(parents=True, exist_ok=True)
        lines = []

        def load(identity: str, name: str) -> Raycaster:
            row = rows[identity]
            if row["split"] != "test":
                raise ValueError(f"{identity} is no test object")
            lines.append(f"- `{name}`: {row['name']}, by {row['creator']}, {row['licence']} ({identity})")
            return Raycaster(load_surface(args.furniture / "models" / row["catalogue"] / row["model"]))

        for name, identity, azimuth, elevation in CUT_OUTS:
            caster = load(identity, f"{name}.webp")
            image = caster.render(orbit_pose(azimuth, elevation), SIZE, samples=4)
            Image.fromarray(image).save(args.out / f"{name}.webp", lossless=True, method=6)
        for name, identity, azimuth, elevation, wall, floor in PHOTOS:
            caster = load(identity, f"{name}.jpg")
            image = photo(caster, orbit_pose(azimuth, elevation, 1.6), wall, floor, SIZE, samples=3)
            Image.fromarray(image).save(args.out / f"{name}.jpg", quality=92)
    except (OSError, ValueError, KeyError, AssetError) as error:
        raise UserError(str(error)) from error
    (args.out / "README.md").write_text(_README + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pictures in {args.out}")


_README = """# Test pictures

Renderings (512 x 512) of objects that no model of this repository was trained on, made by
`scripts/make_testset.py`: RGBA cut-outs, and JPEGs with a background. The models come from Debian's package
`sweethome3d-furniture`; they were changed by rendering.

"""
