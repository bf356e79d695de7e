"""The app's page, and the function that each event calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from ouroboros3d.app.jobs import Framing, Prepared, Settings, Worker
from ouroboros3d.app.panel import Messages, player_panel
from ouroboros3d.errors import UserError
from ouroboros3d.export import FORMATS
from ouroboros3d.export.object3d import Object3D

KEEP = 3600  # seconds for which an object can be downloaded
BACKGROUND_CHOICES = [("Remove", "remove"), ("Remove white", "white"), ("Keep", "keep")]
ELEVATIONS = (-30, 60)  # degrees, of the slider
DEVICE = {"concurrency_id": "device", "concurrency_limit": 1}  # one job at a time, the others queue


@dataclass
class Made:
    """A finished object of one user."""

    name: str
    object3d: Object3D


class Page:
    """The functions behind the page. Errors of the user's are lines in the status; the app keeps serving."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.jobs: dict[str, threading.Event] = {}  # session -> set when its run is cancelled

    def prepare(self, path: str | None, background: str, border: float, threshold: float) -> tuple:
        """(prepared picture, cut-out, framing, status, generate button)"""
        if path is None:
            return None, None, None, "Drop a picture, or choose an example.", gr.Button(interactive=False)
        try:
            prepared = self.worker.prepare(path, Framing(background, border, int(threshold)))
        except UserError as error:
            return None, None, None, problem(error, path), gr.Button(interactive=False)
        size = prepared.image.shape[-1]
        text = f"The networks will see the object at {size} x {size} pixels. Correct cut-out and framing, or generate."
        return prepared, *prepared.pictures(), text, gr.Button(interactive=True)

    def generate(
        self,
        prepared: Prepared | None,
        seed: float,
        steps: float,
        elevation: float,
        candidates: float,
        request: gr.Request,
    ) -> Iterator[tuple]:
        """(player, status, object, make-files button) per step of the loop."""
        off, on = gr.Button(interactive=False), gr.Button(interactive=True)
        if prepared is None:
            yield gr.skip(), "Drop a picture first.", None, off
            return
        cancelled = self.jobs[request.session_hash] = threading.Event()
        settings = Settings(int(seed), int(steps), float(elevation), int(candidates))
        try:
            cameras = self.worker.pipeline.cameras([settings.elevation])
            messages = Messages(prepared.name, settings.elevation, cameras, prepared.image)
            for result in self.worker.run(prepared, settings, cancelled):
                if isinstance(result, Object3D):
                    done = f"Done: {len(result.history)} steps, seed {result.seed}. Turn the object, download it below."
                    yield gr.skip(), done, Made(prepared.name, result), on
                else:
                    yield messages.step(result), f"Step {result.index + 1} of {result.total}", None, off
        except UserError as error:
            yield gr.skip(), problem(error), None, off

    def cancel(self, request: gr.Request) -> str:
        """Ends the loop of this user after the step that is running."""
        if (event := self.jobs.pop(request.session_hash, None)) is not None:
            event.set()
        return "Cancelled."

    def make_files(self, made: Made | None, formats: list[str]) -> Iterator[tuple]:
        """(files, status) per format that is ready."""
        if made is None:
            yield None, "Generate an object first."
            return
        paths: list[str] = []
        try:
            for path in self.worker.save(made.object3d, made.name, formats):
                paths.append(str(path))
                yield paths, f"Wrote {path.name}, {path.stat().st_size / 1e6:.2f} MB."
        except UserError as error:
            yield paths or None, problem(error)


def problem(error: UserError, path: str | None = None) -> str:
    """One readable line, without the folder of an upload."""
    text = str(error) if path is None else str(error).replace(path, Path(path).name)
    return f"⚠ {text}"


def build_page(worker: Worker, examples: list[Path], limit_mb: int) -> gr.Blocks:
    """The page; `examples` are pictures, uploads are refused above `limit_mb` megabytes."""
    page, config = Page(worker), worker.pipeline.config
    with gr.Blocks(title="Ouroboros3D", analytics_enabled=False, delete_cache=(600, KEEP)) as blocks:
        gr.Markdown("# Ouroboros3D\nOne picture in, a 3D object out. Watch the recursion, step by step.")
        prepared, made = gr.State(), gr.State(time_to_live=KEEP)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = _upload(f"Picture, at most {limit_mb} MB")
                with gr.Row():
                    cut, seen = _preview("Cut-out", "cut"), _preview("As the networks see it", "seen")
                background = gr.Radio(BACKGROUND_CHOICES, value="remove", label="Background", elem_id="background")
                border = gr.Slider(0, 0.6, 0.2, step=0.01, label="Border, share of the picture", elem_id="border")
                threshold = gr.Slider(1, 255, 12, step=1, label="Alpha threshold, of 255", elem_id="threshold")
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", interactive=False, elem_id="generate")
                    cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
                with gr.Accordion("Settings of the loop", open=False):
                    seed = gr.Number(config.sampler.seed, label="Seed", precision=0, minimum=0, elem_id="seed")
                    steps = gr.Slider(1, 50, config.sampler.steps, step=1, label="Steps", elem_id="steps")
                    elevation = gr.Slider(
                        *ELEVATIONS,
                        config.cameras.elevation,
                        step=1,
                        elem_id="elevation",
                        label="Elevation: degrees that the picture's camera looks down",
                    )
                    candidates = gr.Slider(
                        1, 8, 1, step=1, elem_id="candidates", label="Candidates: seeds tried, the best is finished"
                    )
                gr.Examples([[str(path)] for path in examples], [picture], examples_per_page=16, cache_examples=False)
            with gr.Column(scale=3, min_width=340):
                status = gr.Markdown("Drop a picture, or choose an example.", elem_id="status")
                player = player_panel()
                formats = gr.CheckboxGroup(list(FORMATS), value=["ply"], label="Formats", elem_id="formats")
                make = gr.Button("Make files", interactive=False, elem_id="make")
                downloads = gr.File(
                    label="Downloads", file_count="multiple", interactive=False, height=150, elem_id="downloads"
                )

        framing = [picture, background, border, threshold]
        shown = [prepared, cut, seen, status, generate]
        for event in (picture.change, background.change, border.release, threshold.release):
            event(page.prepare, framing, shown, show_progress="minimal", trigger_mode="always_last")
        settings, results = [seed, steps, elevation, candidates], [player, status, made, make]
        running = generate.click(page.generate, [prepared, *settings], results, show_progress="hidden", **DEVICE)
        writing = make.click(page.make_files, [made, formats], [downloads, status], **DEVICE)
        cancel.click(page.cancel, None, status, cancels=[running, writing], queue=False)
    return blocks


def _preview(label: str, name: str) -> gr.Image:
    return gr.Image(label=label, interactive=False, height=190, elem_id=name, format="png", buttons=[])


def _upload(label: str) -> gr.Image:
    """An image whose file is opened by open_picture alone, which knows its limits and says what is wrong."""
    image = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=220, elem_id="picture")
    image.preprocess = lambda payload: None if payload is None else payload.path  # a subclass would write a .pyi
    return image
