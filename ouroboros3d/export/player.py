"""The recursion player: one self-contained HTML file that shows every step of the loop, without a network.

The renderer (web/splats.js) and the page's controls (web/player.js, player.css) are also those of the app. A page is
these files around one JSON object; `player_data` and `step_data` say what it holds.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ouroboros3d.camera_defaults import FOV
from ouroboros3d.cameras import Cameras
from ouroboros3d.export.frames import turn_degrees
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.export.packing import pack
from ouroboros3d.files import write_whole
from ouroboros3d.gaussians import Gaussians, turn_comment
from ouroboros3d.visualize import shrink, to_uint8, view_grid

COLUMNS = 4  # of a sheet of views
PICTURE = 128  # pixels per side of a view, at most
INPUT = 256  # of the input
NEAR = 0.2  # world units, the renderer's
ABOUT = "Ouroboros3D: drag to turn the object; the slider goes through the steps of the loop."
FILL = 0.85  # of the picture that such an object covers


def write_html(object3d: Object3D, path: Path, title: str | None = None, about: str = ABOUT) -> None:
    """The player of an object: all steps of its history, or the object alone if none was kept.

    `title` is the heading (the file's name without its ending), `about` the line below it.
    """
    write_whole(path, player_page(object_data(object3d, title or path.stem) | {"about": about}))


def object_data(object3d: Object3D, title: str) -> dict[str, Any]:
    """The JSON of one object's page."""
    steps = [step_data(s.gaussians, s.index, s.sigma, {"views": s.views, **s.maps}) for s in object3d.history]
    if not steps:
        pictures = {"views": object3d.views, "rgb": object3d.renders}
        shown = {name: views for name, views in pictures.items() if views is not None}
        steps = [step_data(object3d.gaussians, pictures=shown)]
    data = player_data(title, object3d.elevation, object3d.cameras, object3d.image)
    if object3d.cameras is None:
        data |= framing(object3d.gaussians)
    return data | {"total": len(steps), "steps": steps}


def player_data(
    title: str, elevation: float = 0.0, cameras: Cameras | None = None, image: Tensor | None = None
) -> dict[str, Any]:
    """What all steps share. `cameras` [1, V] of the views, `image` [3, H, W] in [0, 1], `elevation` of the input's
    camera in degrees, by which the object leans in the canonical frame."""
    data = {
        "title": title,
        "name": title.replace(" ", "_"),
        "about": ABOUT,
        "elevation": elevation,
        "target": [0.0, 0.0, 0.0],
        "near": NEAR,
        "columns": COLUMNS,
        "azimuths": [],
        "background": [1.0, 1.0, 1.0],
        "ply": ply_frame(elevation),
        "input": None if image is None else picture_uri(Image.fromarray(to_uint8(image)), INPUT),
        "steps": [],
    }
    return data if cameras is None else data | orbit_data(cameras, elevation)


def orbit_data(cameras: Cameras, elevation: float) -> dict[str, Any]:
    """Distance, field of view and azimuths (degrees) of an orbit [1, V] that leans by `elevation`."""
    centers = cameras.centers[0].double().cpu()
    tilt = math.radians(elevation)
    along = math.cos(tilt) * centers[:, 2] - math.sin(tilt) * centers[:, 1]
    azimuths = torch.rad2deg(torch.atan2(centers[:, 0], along)) % 360
    return {
        "distance": centers[0].norm().item(),
        "fov": cameras.fov[0, 0].item(),
        "azimuths": [round(azimuth, 3) for azimuth in azimuths.tolist()],
    }


def framing(gaussians: Gaussians) -> dict[str, Any]:
    """The camera that shows Gaussians of unknown place and size: their middle, and 95 % of them inside the picture."""
    visible = gaussians.means[0, gaussians.opacities[0] >= 0.1]
    means = (visible if len(visible) else gaussians.means[0]).double()
    target = means.median(0).values if len(means) else torch.zeros(3)
    radius = (means - target).norm(dim=-1).quantile(0.95).item() if len(means) > 0 else 1.0
    distance = max(radius, 1e-3) / FILL / math.sin(math.radians(FOV) / 2)
    return {"target": target.tolist(), "distance": distance, "fov": FOV, "near": 0.05 * distance}


def step_data(
    gaussians: Gaussians,
    index: int = 0,
    sigma: float | None = None,
    pictures: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """One step: its Gaussians (B = 1) and its sheets of views [V, 3, H, W] in [0, 1]."""
    packed = pack(gaussians)
    sheets = {name: sheet_uri(views) for name, views in (pictures or {}).items()}
    words = base64.b64encode(packed.words.tobytes()).decode()
    return {"index": index, "sigma": sigma, **packed.header(), "gaussians": words, "pictures": sheets}


def ply_frame(elevation: float) -> dict[str, Any]:
    """How the page turns its .ply: as `splats.write_ply` does, so that viewers show it upright."""
    turn = turn_degrees("-y", elevation)
    angle = math.radians(turn) / 2
    return {"quaternion": [math.cos(angle), math.sin(angle), 0.0, 0.0], "comment": turn_comment(turn, elevation)}


def sheet_uri(views: Tensor) -> str:
    """[V, 3, H, W] in [0, 1] as one picture of COLUMNS columns in a data: URI."""
    return picture_uri(view_grid(shrink(views, PICTURE), COLUMNS))


def picture_uri(picture: Image.Image, size: int | None = None) -> str:
    """A picture as webp in a data: URI, at most `size` pixels per side."""
    if size is not None:
        picture = picture.copy()
        picture.thumbnail((size, size))
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=90, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def player_page(data: Mapping[str, Any]) -> str:
    """The whole HTML file."""
    page = web_file("player.html")
    parts = {
        "title": html.escape(data["title"]),
        "css": web_file("player.css"),
        "js": player_script(),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no tags in the script
    }
    before, *after = page.split("{{")
    return before + "".join(parts[name] + text for name, text in (piece.split("}}", 1) for piece in after))


def player_script() -> str:
    """The JavaScript that defines `createPlayer(root, data, keys)`."""
    return web_file("splats.js") + web_file("player.js")


def web_file(name: str) -> str:
    return (files("ouroboros3d.export") / "web" / name).read_text(encoding="utf-8")
