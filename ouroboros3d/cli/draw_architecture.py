"""Draws the two figures of docs/architecture.md: the loop and a training step, each box with its file.

python scripts/draw_architecture.py [--out docs/images]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ouroboros3d.cli.options import Parser
from ouroboros3d.files import ROOT

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 196, 62, 44, 46, 16  # pixels
COLOURS = {"network": "#dbe9f9", "method": "#fdebd0", "data": "#e8f3e2"}


@dataclass(frozen=True)
class Box:
    """A box in a grid. `file` is a path below ouroboros3d/."""

    name: str
    file: str
    column: int
    row: int
    kind: str = "method"

    @property
    def centre(self) -> tuple[float, float]:
        x = MARGIN + self.column * (WIDTH + GAP_X) + WIDTH / 2
        return x, MARGIN + self.row * (HEIGHT + GAP_Y) + HEIGHT / 2


@dataclass(frozen=True)
class Arrow:
    """From one box to another, with what flows."""

    start: str
    end: str
    text: str = ""


LOOP = (
    [
        Box("one picture", "inference/photo.py", 0, 0, "data"),
        Box("condition: CLIP, latent", "models/svd.py", 1, 0, "network"),
        Box("camera rays", "geometry.py", 2, 0),
        Box("adapters, ray encoders", "models/conditioning.py", 3, 0, "network"),
        Box("noise x", "sampler.py", 0, 1),
        Box("U-Net, guided", "models/multiview_unet.py", 1, 1, "network"),
        Box("clean latents x0", "diffusion.py", 2, 1),
        Box("feedback: colours, ccm", "feedback.py", 3, 1),
        Box("Euler step", "diffusion.py", 0, 2),
        Box("VAE decodes the views", "models/svd.py", 2, 2, "network"),
        Box("rendering", "rendering/__init__.py", 3, 2),
        Box("3D Gaussians", "gaussians.py", 1, 3, "data"),
        Box("LGM reconstructs", "models/lgm.py", 2, 3, "network"),
        Box("files for viewers", "export/object3d.py", 0, 3, "data"),
    ],
    [
        Arrow("one picture", "condition: CLIP, latent"),
        Arrow("condition: CLIP, latent", "U-Net, guided"),
        Arrow("camera rays", "adapters, ray encoders"),
        Arrow("noise x", "U-Net, guided"),
        Arrow("U-Net, guided", "clean latents x0", "v"),
        Arrow("clean latents x0", "VAE decodes the views"),
        Arrow("VAE decodes the views", "LGM reconstructs", "8 views"),
        Arrow("LGM reconstructs", "3D Gaussians"),
        Arrow("LGM reconstructs", "rendering"),
        Arrow("rendering", "feedback: colours, ccm"),
        Arrow("feedback: colours, ccm", "adapters, ray encoders", "next step"),
        Arrow("adapters, ray encoders", "U-Net, guided"),
        Arrow("U-Net, guided", "Euler step"),
        Arrow("Euler step", "noise x", "next step"),
        Arrow("3D Gaussians", "files for viewers"),
    ],
)
STEP = (
    [
        Box("orbits on disk", "data/orbits.py", 0, 0, "data"),
        Box("order of samples", "training/sample_order.py", 1, 0, "data"),
        Box("batch", "data/batch.py", 2, 0, "data"),
        Box("draws, noised latents", "objective.py", 3, 0),
        Box("save and resume", "training/checkpoints.py", 0, 1, "data"),
        Box("update, EMA, signals", "training/trainer.py", 1, 1),
        Box("diffusion loss", "objective.py", 2, 1),
        Box("U-Net: empty maps first", "models/multiview_unet.py", 3, 1, "network"),
        Box("validation", "evaluation/validation.py", 0, 2),
        Box("image losses, LPIPS", "objective.py", 1, 2),
        Box("decode, reconstruct", "models/lgm.py", 2, 2, "network"),
        Box("feedback, on a coin", "feedback.py", 3, 2),
        Box("metrics, trackers", "training/run_log.py", 0, 3, "data"),
        Box("rendering", "rendering/__init__.py", 2, 3),
    ],
    [
        Arrow("orbits on disk", "order of samples"),
        Arrow("order of samples", "batch"),
        Arrow("batch", "draws, noised latents"),
        Arrow("draws, noised latents", "U-Net: empty maps first"),
        Arrow("U-Net: empty maps first", "diffusion loss", "x0"),
        Arrow("U-Net: empty maps first", "decode, reconstruct"),
        Arrow("decode, reconstruct", "rendering"),
        Arrow("rendering", "image losses, LPIPS"),
        Arrow("rendering", "feedback, on a coin"),
        Arrow("feedback, on a coin", "U-Net: empty maps first", "second pass"),
        Arrow("image losses, LPIPS", "update, EMA, signals"),
        Arrow("diffusion loss", "update, EMA, signals"),
        Arrow("update, EMA, signals", "save and resume"),
        Arrow("update, EMA, signals", "validation"),
        Arrow("validation", "metrics, trackers"),
    ],
)
FIGURES = {"loop": LOOP, "training_step": STEP}


def draw(boxes: list[Box], arrows: list[Arrow]) -> str:
    """An SVG of boxes and straight arrows between their edges."""
    places = {box.name: box for box in boxes}
    columns, rows = max(b.column for b in boxes) + 1, max(b.row for b in boxes) + 1
    width = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP_X
    height = 2 * MARGIN + rows * HEIGHT + (rows - 1) * GAP_Y
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#444"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for arrow in arrows:
        start, end = places[arrow.start], places[arrow.end]
        (x1, y1), (x2, y2) = edge(start, end), edge(end, start)
        parts.append(f'<path d="M{x1:g} {y1:g} L{x2:g} {y2:g}" stroke="#444" fill="none" marker-end="url(#tip)"/>')
        if arrow.text:
            x, y = (x1 + x2) / 2 + 5, (y1 + y2) / 2 - 5
            parts.append(f'<text x="{x:g}" y="{y:g}" font-size="12" fill="#444">{arrow.text}</text>')
    for box in boxes:
        x, y = box.centre
        parts += [
            f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" '
            f'fill="{COLOURS[box.kind]}" stroke="#777"/>',
            f'<text x="{x:g}" y="{y - 5:g}" font-size="15" text-anchor="middle">{box.name}</text>',
            f'<text x="{x:g}" y="{y + 17:g}" font-size="12" text-anchor="middle" fill="#555">{box.file}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def edge(box: Box, other: Box) -> tuple[float, float]:
    """Where the line from a box's centre to the other's leaves it."""
    (x, y), (to_x, to_y) = box.centre, other.centre
    dx, dy = to_x - x, to_y - y
    share = min(WIDTH / 2 / abs(dx) if dx else 2, HEIGHT / 2 / abs(dy) if dy else 2)
    return x + share * dx, y + share * dy


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (default: docs/images)")
    options = parser.parse_args(arguments)
    for name, figure in FIGURES.items():
        (options.out / f"{name}.svg").write_text(draw(*figure))
