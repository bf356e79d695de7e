"""Grids, turntables and videos: what they show, where the cameras stand; no half file stays behind."""

import math
from functools import partial

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from ouroboros3d.cameras import orbit
from ouroboros3d.files import OutputError
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering import render
from ouroboros3d.visualize import (
    GAP,
    LABEL_HEIGHT,
    LABEL_WIDTH,
    StepImages,
    labelled_grid,
    save_image,
    save_video,
    steps_picture,
    to_uint8,
    turntable,
    turntable_cameras,
    view_grid,
)


def flat(*values: float, size: int = 8) -> torch.Tensor:
    """[V, 3, size, size]: view i is all values[i]."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, size, size)


def frames(count: int, height: int = 16, width: int = 16) -> list[np.ndarray]:
    return [np.full((height, width, 3), 10 * i, dtype=np.uint8) for i in range(count)]


def decoded(path) -> tuple[dict, list[np.ndarray]]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]


@pytest.fixture
def gaussians() -> Gaussians:
    return Gaussians.from_tensor(torch.rand(1, 3, 14, generator=torch.Generator().manual_seed(0)))


# ---------------------------------------------------------------- images


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-1.0, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 2.0])
    assert to_uint8(values[:, None, None, None].expand(-1, 3, 1, 1))[:, 0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(torch.rand(2, 5, 3, 4, 6)).shape == (2, 5, 4, 6, 3)


def test_view_grid_layout():
    grid = np.array(view_grid(flat(0.0, 0.2, 0.4, 0.6, 0.8)))
    assert grid.shape == (16, 32, 3)
    blocks = grid.reshape(2, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(8, -1)
    assert np.all(blocks == blocks[:, :1])
    assert blocks[:, 0].tolist() == [0, 51, 102, 153, 204, 255, 255, 255]
    assert view_grid(flat(0.5, 0.5), columns=4).size == (16, 8)


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8), (2, 4, 8, 8)])
def test_view_grid_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="a grid wants"):
        view_grid(torch.zeros(shape))


def test_save_image_takes_both_and_keeps_the_suffix(tmp_path):
    image = torch.rand(3, 8, 8)
    save_image(tmp_path / "a.png", image)
    save_image(tmp_path / "b.webp", Image.fromarray(to_uint8(image)))
    assert np.array_equal(Image.open(tmp_path / "a.png"), to_uint8(image))
    assert Image.open(tmp_path / "b.webp").format == "WEBP"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.webp"]


def test_a_failed_image_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="extension"):
        save_image(tmp_path / "a.unknown", torch.rand(3, 8, 8))
    with pytest.raises(OutputError, match="none"):
        save_image(tmp_path / "none" / "a.png", torch.rand(3, 8, 8))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- turntable


@pytest.mark.parametrize("elevation, tilt", [(0.0, 0.0), (20.0, 0.0), (0.0, 30.0), (-10.0, 25.0), (30.0, 30.0)])
def test_the_turntable_circles_the_objects_up_axis(elevation, tilt):
    cameras = turntable_cameras(elevation=elevation, tilt=tilt)
    centers, c2w = cameras.centers[0], cameras.c2w[0]
    assert cameras.c2w.shape == (1, 180, 4, 4)
    assert torch.allclose(cameras.fov, torch.tensor(49.1))
    assert torch.allclose(centers.norm(dim=-1), torch.tensor(1.5))
    assert torch.allclose(c2w[:, :3, 2], -centers / 1.5, atol=1e-6)  # looking at the origin
    up = torch.tensor([0, math.cos(math.radians(tilt)), math.sin(math.radians(tilt))])
    assert torch.allclose(centers @ up, torch.tensor(1.5 * math.sin(math.radians(elevation))), atol=1e-5)
    assert torch.allclose(c2w[:, :3, 0] @ up, torch.zeros(180), atol=1e-6)  # no roll against the object
    steps = (centers.roll(-1, 0) - centers).norm(dim=-1)  # evenly spaced and closed
    assert torch.allclose(steps, steps.mean(), rtol=1e-4)


def test_the_first_camera_is_the_inputs():
    level = turntable_cameras()
    expected = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    expected[2, 3] = 1.5
    assert torch.allclose(level.c2w[0, 0], expected, atol=1e-7)
    # Circling at the input's own elevation is the orbit that the networks use.
    tilted = turntable_cameras(step=45, elevation=25, tilt=25)
    canonical = orbit([45.0 * i for i in range(8)], elevation=25, distance=1.5, fov=49.1, relative=True)
    assert torch.allclose(tilted.c2w, canonical.c2w, atol=1e-6)


def test_turntable_renders_every_view_once_in_bounded_chunks(gaussians):
    calls = []

    def renderer(scene, cameras, size):
        assert scene is gaussians and not torch.is_grad_enabled()
        calls.append(cameras)
        shade = cameras.centers[..., 0, None, None, None] / 3 + 0.5
        rgb = shade.expand(-1, -1, 3, size, size)
        return Rendering(rgb, rgb[:, :, :1], rgb[:, :, :1])

    made = list(turntable(gaussians, renderer, size=4, step=30, chunk=5))
    assert [c.num_views for c in calls] == [5, 5, 2]
    assert all(frame.shape == (4, 4, 3) and frame.dtype == np.uint8 for frame in made)
    expected = [round(255 * (0.5 * math.sin(math.radians(30 * i)) + 0.5)) for i in range(12)]
    assert np.abs(np.subtract([int(frame[0, 0, 0]) for frame in made], expected)).max() <= 1


def test_turntable_with_the_real_renderer(gaussians):
    renderer = partial(render, backend="dense")  # nothing to compile
    made = list(turntable(gaussians, renderer, size=16, step=90))
    assert len(made) == 4 and made[0].min() < 255


def test_turntable_refuses(gaussians):
    two = Gaussians.from_tensor(gaussians.to_tensor().repeat(2, 1, 1))
    with pytest.raises(ValueError, match="one scene"):
        next(turntable(two, render))
    with pytest.raises(ValueError, match="step"):
        turntable_cameras(step=0)


# ---------------------------------------------------------------- video


@pytest.mark.parametrize("height, width", [(16, 16), (17, 31)])
def test_the_video_decodes_to_its_frames(tmp_path, height, width):
    path = tmp_path / "with space.mp4"
    save_video(path, iter(frames(7, height, width)))
    meta, back = decoded(path)
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 30
    assert meta["size"] == (width + width % 2, height + height % 2)
    assert len(back) == 7
    for i, frame in enumerate(back):
        assert np.abs(frame.astype(int) - 10 * i).max() <= 6
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_video_that_fails_midway_leaves_nothing(tmp_path):
    def broken():
        yield from frames(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_video(tmp_path / "a.mp4", broken())
    with pytest.raises(ValueError, match="must be uint8"):
        save_video(tmp_path / "a.mp4", [*frames(1), *frames(1, 8, 8)])
    with pytest.raises(ValueError, match="at least one frame"):
        save_video(tmp_path / "a.mp4", [])
    assert not list(tmp_path.iterdir())


def test_ffmpegs_failure_is_an_error_with_its_words(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a\.avi: a video ends in \.mp4, \.webp, \.gif"):
        save_video(tmp_path / "a.avi", frames(2))
    with pytest.raises(OutputError, match="none"):
        save_video(tmp_path / "none" / "a.mp4", frames(2))
    script = tmp_path / "ffmpeg"
    script.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(script))
    with pytest.raises(OutputError, match=r"a\.mp4: ffmpeg: no space left") as caught:
        save_video(tmp_path / "a.mp4", frames(20, 256, 256))  # more than a pipe holds
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ffmpeg"]


# ---------------------------------------------------------------- labelled pictures


def corner(picture: Image.Image, row: int, column: int, cell: int) -> int:
    """Red in the middle of one cell of a labelled grid."""
    x = LABEL_WIDTH + column * (cell + GAP) + cell // 2
    y = LABEL_HEIGHT + row * (cell + GAP) + cell // 2
    return picture.getpixel((x, y))[0]


def test_labelled_grid_puts_each_picture_in_its_cell():
    a, b, c = flat(0.2, 0.4, 0.6)
    picture = labelled_grid([("first", [a, b]), ("second", [None, c])], ["left", "right"], cell=32)
    assert [corner(picture, y, x, 32) for y in (0, 1) for x in (0, 1)] == [51, 102, 255, 153]
    labels = np.array(picture)
    assert labels[:LABEL_HEIGHT, LABEL_WIDTH:].min() < 128  # something is written above
    assert labels[LABEL_HEIGHT:, :LABEL_WIDTH].min() < 128  # and to the left
    with pytest.raises(ValueError, match="rows of 2 pictures"):
        labelled_grid([("first", [a])], ["left", "right"])


def test_steps_picture_samples_from_first_to_last():
    steps = [
        StepImages(i, 700.0 / (i + 1), {"views": flat(*[i / 25] * 8), "rgb": flat(*[j / 8 for j in range(8)])})
        for i in range(25)
    ]
    picture = steps_picture([step.small(4) for step in steps], rows=4, views=(0, 4), cell=16)
    assert picture.size == (LABEL_WIDTH + 4 * (16 + GAP), LABEL_HEIGHT + 4 * (16 + GAP))
    assert [corner(picture, y, 0, 16) for y in range(4)] == [round(255 * i / 25) for i in (0, 8, 16, 24)]
    assert [corner(picture, 1, x, 16) for x in (2, 3)] == [0, 128]
    assert steps_picture(steps[:1], rows=6, cell=16).size[1] == LABEL_HEIGHT + 16 + GAP
    assert steps[0].small(4).groups["rgb"].shape == (8, 3, 4, 4)
    with pytest.raises(ValueError, match="no steps"):
        steps_picture([])
