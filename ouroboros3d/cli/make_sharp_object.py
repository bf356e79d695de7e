"""Makes a sharp object to test exports on: thin Gaussians on the surface of a procedural mesh, as a .ply.

    python scripts/make_sharp_object.py --out outputs/sharp.ply
    python scripts/convert.py outputs/sharp.ply --to splat spz glb --check

The small model's objects have 16,384 soft Gaussians; this one has 65,536, as the release's, and is not blurred.
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import Parser


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/sharp.ply"), help="file to write (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, default=65536, help="number of Gaussians (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="seed of the procedural object (default: %(default)s)")
    options = parser.parse_args(arguments)
    from ouroboros3d.gaussians import save_ply

    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_ply(options.out, sharp_object(options.seed, options.count))
    print(f"wrote {options.out}")


def sharp_object(seed: int, count: int):
    """`count` Gaussians, flat in the surface, spread evenly over the procedural object of this seed; y up."""
    import numpy as np
    import torch

    from ouroboros3d.datagen.procedural import random_object
    from ouroboros3d.export.frames import rotation_to_quaternion
    from ouroboros3d.gaussians import Gaussians

    surface, rng = random_object(seed, 1), np.random.default_rng(0)
    face, weights = surface.spread(count, rng)
    corners = surface.vertices[surface.faces[face]]
    along = corners[:, 1] - corners[:, 0]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    normal = np.cross(along, corners[:, 2] - corners[:, 0])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12
    y_up = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]])  # the mesh is z-up
    axes = y_up @ np.stack([along, np.cross(normal, along), normal], axis=2)
    radius = 0.8 * np.sqrt(surface.face_areas().sum() / count)
    scales = np.tile([radius, radius, 0.1 * radius], (count, 1))
    rgb = surface.rgba(face, weights)[:, :3]
    quats = rotation_to_quaternion(torch.from_numpy(axes))
    means = torch.from_numpy((corners * weights[..., None]).sum(axis=1) @ y_up.T)
    opacities = torch.full((count,), 0.95)
    rows = (means, quats, torch.from_numpy(scales), opacities, torch.from_numpy(rgb))
    return Gaussians(*(x[None].float() for x in rows))
