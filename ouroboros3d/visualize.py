"""Pictures and videos of the recursion's results.

Shapes: V views, H = W pixels. Images are float tensors in [0, 1]; frames are uint8 [H, W, 3] arrays.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ouroboros3d.camera_defaults import TURNTABLE_DISTANCE, TURNTABLE_FOV
from ouroboros3d.cameras import Cameras, orbit, turn_about_x
from ouroboros3d.files import OutputError, atomic_path
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Renderer

# ---------------------------------------------------------------- images


def to_uint8(images: Tensor) -> np.ndarray:
    """[..., 3, H, W] in [0, 1] (clamped) to uint8 [..., H, W, 3]."""
    values = (images.detach().float().clamp(0, 1) * 255).round()
    return values.movedim(-3, -1).to("cpu", torch.uint8).numpy()


def view_grid(images: Tensor, columns: int = 4) -> Image.Image:
    """[V, 3, H, W] in [0, 1], row by row without gaps; a last row that is not full ends in white."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"a grid wants at least one view, [V, 3, H, W], got {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"a grid wants at least one column, got {columns}")
    views, _, height, width = images.shape
    columns = min(columns, views)
    grid = Image.new("RGB", (columns * width, math.ceil(views / columns) * height), "white")
    for i, view in enumerate(to_uint8(images)):
        grid.paste(Image.fromarray(view), (i % columns * width, i // columns * height))
    return grid


def save_image(path: str | Path, image: Image.Image | Tensor) -> None:
    """Writes a PIL picture or a tensor [3, H, W] in [0, 1], atomically, in the format of the suffix.

    Raises OutputError if the system refuses, ValueError for a suffix PIL does not know.
    """
    if isinstance(image, Tensor):
        image = Image.fromarray(to_uint8(image))
    with atomic_path(path) as temporary:
        image.save(temporary)


# ---------------------------------------------------------------- turntable


def turntable_cameras(
    step: float = 2.0,
    radius: float = TURNTABLE_DISTANCE,
    fov: float = TURNTABLE_FOV,
    elevation: float = 0.0,
    tilt: float = 0.0,
) -> Cameras:
    """[1, 360 / step, ...] cameras on a circle around the object's up axis, starting at the input's azimuth.

    In the canonical world (cameras.py) the first camera is level, so an object photographed from an elevation
    of e degrees leans towards it: its up axis is (0, cos e, sin e). `tilt` = e turns the circle with it;
    `elevation` is the circle's own height above the object. With both equal the first camera is the input's.
    """
    if not 0 < step <= 360:
        raise ValueError(f"the turntable's step must be in (0, 360] degrees, got {step}")
    azimuths = step * torch.arange(math.ceil(360 / step - 1e-6), dtype=torch.float64)  # 360 / n is rarely exact
    cameras = orbit(azimuths, elevation, radius, fov, relative=False)
    return Cameras(turn_about_x(tilt, cameras.c2w) @ cameras.c2w, cameras.K)


def turntable(
    gaussians: Gaussians,
    renderer: Renderer,
    size: int = 512,
    step: float = 2.0,
    radius: float = TURNTABLE_DISTANCE,
    fov: float = TURNTABLE_FOV,
    tilt: float = 0.0,
    chunk: int = 8,
) -> Iterator[np.ndarray]:
    """Frames, uint8 [size, size, 3], of one scene (B = 1) turning once; angles in degrees.

    At the default step of 2 degrees and 30 frames a second that is the release's video of 6 seconds. The
    frames are rendered `chunk` views at a time, to bound the memory. For `tilt` see `turntable_cameras`.
    """
    if gaussians.means.shape[0] != 1:
        raise ValueError(f"a turntable shows one scene, got a batch of {gaussians.means.shape[0]}")
    cameras = turntable_cameras(step, radius, fov, tilt=tilt).to(gaussians.means.device)
    for start in range(0, cameras.num_views, chunk):
        with torch.no_grad():
            frames = to_uint8(renderer(gaussians, cameras.views(slice(start, start + chunk)), size).rgb[0])
        yield from frames


# The file's suffix -> ffmpeg's options. All browsers play h264 of pixel format yuv420p. A palette per frame keeps the
# colours of a .gif and the memory of one frame; .webp and .gif repeat for ever.
VIDEO_ENCODERS = {
    ".mp4": ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "18", "-movflags", "+faststart"],
    ".webp": ["-c:v", "libwebp_anim", "-quality", "85", "-loop", "0"],
    ".gif": ["-vf", "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1", "-loop", "0"],
}


def save_video(path: str | Path, frames: Iterable[np.ndarray], fps: int = 30) -> None:
    """Writes uint8 frames [H, W, 3] of one size as .mp4 (h264), .webp or .gif, atomically and one at a time.

    h264's yuv420p halves the colour resolution, so an odd side is padded by repeating its last row or column. Raises
    ValueError for another suffix, no frames or frames that differ, OutputError, with ffmpeg's own words, if it cannot
    write.
    """
    encoder = VIDEO_ENCODERS.get(Path(path).suffix.lower())
    if encoder is None:
        raise ValueError(f"{path}: a video ends in {', '.join(VIDEO_ENCODERS)}")
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError("a video wants at least one frame")
    height, width = first.shape[:2]
    odd = (height % 2, width % 2) if "yuv420p" in encoder else (0, 0)
    padding = ((0, odd[0]), (0, odd[1]), (0, 0))
    size = f"{width + odd[1]}x{height + odd[0]}"
    with atomic_path(path) as temporary, tempfile.TemporaryFile() as messages:
        options = f"-loglevel error -y -f rawvideo -pix_fmt rgb24 -s {size} -r {fps} -i -"
        # Not through imageio: it never looks at ffmpeg's exit status; a full disk would leave half a video.
        command = [imageio_ffmpeg.get_ffmpeg_exe(), *options.split(), *encoder, temporary]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=messages, stderr=messages)
        complete = False
        try:
            with process.stdin as pipe:
                for frame in itertools.chain([first], frames):
                    if frame.shape != first.shape or frame.dtype != np.uint8:
                        raise ValueError(f"frames must be uint8 {first.shape}, got {frame.dtype} {frame.shape}")
                    pipe.write(np.pad(frame, padding, mode="edge").tobytes())
            complete = True
        except BrokenPipeError:
            pass  # ffmpeg has ended early; why is in its messages
        except BaseException:
            process.kill()
            raise
        finally:
            status = process.wait()
        if status != 0 or not complete:
            messages.seek(0)
            said = " ".join(messages.read().decode(errors="replace").split())
            raise OutputError(f"cannot write {path}: ffmpeg: {said[:300] or f'status {status}'}")


# ---------------------------------------------------------------- labelled pictures

LABEL_WIDTH, LABEL_HEIGHT, GAP = 96, 20, 4  # pixels


def labelled_grid(
    rows: Sequence[tuple[str, Sequence[Tensor | None]]], columns: Sequence[str], cell: int = 128
) -> Image.Image:
    """A table of pictures [3, H, W] in [0, 1] (None leaves a gap), each shrunk or enlarged to `cell` pixels.

    A row's label stands to its left (it may have several lines), the column labels above.
    """
    if not rows or any(len(cells) != len(columns) for _, cells in rows):
        raise ValueError(f"a table wants rows of {len(columns)} pictures each, got {[len(cells) for _, cells in rows]}")
    pitch = cell + GAP
    table = Image.new("RGB", (LABEL_WIDTH + len(columns) * pitch, LABEL_HEIGHT + len(rows) * pitch), "white")
    draw = ImageDraw.Draw(table)
    font = ImageFont.load_default(13)
    for x, label in enumerate(columns):
        middle = LABEL_WIDTH + x * pitch + cell // 2
        draw.text((middle, LABEL_HEIGHT // 2), label, fill="black", font=font, anchor="mm")
    for y, (label, cells) in enumerate(rows):
        top = LABEL_HEIGHT + y * pitch
        draw.multiline_text((GAP, top + cell // 2), label, fill="black", font=font, anchor="lm")
        for x, image in enumerate(cells):
            if image is not None:
                picture = Image.fromarray(to_uint8(image)).resize((cell, cell), Image.Resampling.BOX)
                table.paste(picture, (LABEL_WIDTH + x * pitch, top))
    return table


def views_table(rows: Sequence[tuple[str, Sequence[Tensor | None]]]) -> Image.Image:
    """`labelled_grid` of views [3, H, W] in their own size, at most 128 pixels."""
    size = next(image for _, images in rows for image in images if image is not None).shape[-1]
    return labelled_grid(rows, [f"view {v}" for v in range(len(rows[0][1]))], cell=min(size, 128))


def table_row(table: Image.Image, index: int, rows: int) -> Image.Image:
    """Row `index` of a `labelled_grid` of `rows` rows, its label with it."""
    pitch = (table.height - LABEL_HEIGHT) // rows
    top = LABEL_HEIGHT + index * pitch
    return table.crop((0, top, table.width, top + pitch))


def stack_with_headings(entries: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each under its heading."""
    line = 22
    width = max(picture.width for _, picture in entries)
    sheet = Image.new("RGB", (width, sum(picture.height + line for _, picture in entries)), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(14), 0
    for text, picture in entries:
        draw.text((4, top + line // 2), text, fill="black", font=font, anchor="lm")
        sheet.paste(picture, (0, top + line))
        top += picture.height + line
    return sheet


@dataclass(frozen=True)
class StepImages:
    """One step of the recursion, as `steps_picture` shows it. `small` before keeping many."""

    index: int  # from 0
    sigma: float  # noise level the step started from
    groups: dict[str, Tensor]  # what is shown, e.g. "views", "rgb", "ccm" -> [V, 3, H, W] in [0, 1]

    def small(self, cell: int = 128) -> StepImages:
        """The same on the CPU and at most `cell` pixels per side: 25 full steps would hold gigabytes."""
        return StepImages(self.index, self.sigma, {k: shrink(v, cell) for k, v in self.groups.items()})


def steps_picture(
    steps: Sequence[StepImages], rows: int = 6, views: Sequence[int] = (0, 2, 4), cell: int = 128
) -> Image.Image:
    """How the recursion converges: `rows` of its steps as rows, from the first to the last.

    The columns are the chosen `views` of every group, in the groups' order.
    """
    if not steps:
        raise ValueError("there are no steps to show")
    chosen = sorted({round(i * (len(steps) - 1) / max(1, rows - 1)) for i in range(rows)})
    columns = [f"{name} {view}" for name in steps[0].groups for view in views]
    table = []
    for step in (steps[i] for i in chosen):
        images = [images[view] for images in step.groups.values() for view in views]
        table.append((f"step {step.index}\nsigma {step.sigma:.3g}", images))
    return labelled_grid(table, columns, cell)


def shrink(images: Tensor, cell: int) -> Tensor:
    images = images.detach().float()
    if images.shape[-1] > cell:
        images = torch.nn.functional.interpolate(images, size=(cell, cell), mode="area")
    return images.cpu()
