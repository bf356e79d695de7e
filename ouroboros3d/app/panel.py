"""The recursion player as a Gradio component: the same renderer and controls as the page that `--html` writes."""

from __future__ import annotations

import json
import uuid
from importlib.resources import files

import gradio as gr
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.export.object3d import Step3D
from ouroboros3d.export.player import player_data, player_script, step_data, web_file


def player_panel() -> gr.HTML:
    """An empty player. Its value is a message of `Messages`."""
    panel = (files("ouroboros3d.app") / "panel.js").read_text(encoding="utf-8")
    return gr.HTML(
        value="",
        html_template='<div class="player"></div>',
        css_template=web_file("player.css"),
        js_on_load=player_script() + panel,
        apply_default_css=False,
        elem_id="recursion",
    )


class Messages:
    """What the panel is told during one run: each message is a new step, and says what all steps share."""

    def __init__(self, title: str, elevation: float, cameras: Cameras, image: Tensor) -> None:
        """`image` [3, H, W] in [-1, 1]."""
        data = player_data(title, elevation, cameras, image * 0.5 + 0.5)
        self.shared = {"run": uuid.uuid4().hex, "data": data | {"about": ""}}

    def step(self, step: Step3D) -> str:
        self.shared["data"]["total"] = step.total
        data = step_data(step.gaussians, step.index, step.sigma, {"views": step.views, **step.maps})
        return json.dumps(self.shared | {"step": data})
