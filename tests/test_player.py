"""The recursion player: packing, the page, and in Chromium its canvas against the CPU renderer."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ouroboros3d.app.browser import wait_until
from ouroboros3d.camera_defaults import DISTANCE, FOV
from ouroboros3d.cameras import Cameras, orbit
from ouroboros3d.cli import call
from ouroboros3d.cli.view import load_upright
from ouroboros3d.cli.view import main as view
from ouroboros3d.export.frames import ExportError, turn_degrees, upright, visible
from ouroboros3d.export.object3d import Object3D, Step3D
from ouroboros3d.export.packing import AXIS, least_turn, pack, unpack
from ouroboros3d.export.player import framing, object_data, player_data, player_page
from ouroboros3d.export.splats import write_ply
from ouroboros3d.export.views import psnr
from ouroboros3d.gaussians import TURN_COMMENT, Gaussians, load_ply, save_ply
from ouroboros3d.rendering import render
from ouroboros3d.visualize import turntable_cameras

ELEVATION = 15.0
CAMERAS = ((0.0, ELEVATION), (70.0, 35.0), (200.0, -10.0))  # azimuth and elevation, degrees


def blob(seed: int, count: int = 600, norm: float = 1.0) -> Gaussians:
    """Anisotropic Gaussians around the origin; `norm` is that of their quaternions."""
    g = torch.Generator().manual_seed(seed)
    quats = norm * torch.nn.functional.normalize(torch.randn(1, count, 4, generator=g), dim=-1)
    means = 0.15 * torch.randn(1, count, 3, generator=g)
    scales = (0.02 * torch.randn(1, count, 3, generator=g).exp()).clamp(0.003, 0.08)
    opacities, rgb = torch.rand(1, count, generator=g), torch.rand(1, count, 3, generator=g)
    return Gaussians(means, quats, scales, opacities, rgb)


def cameras(azimuth: float, elevation: float, tilt: float = ELEVATION) -> Cameras:
    """The player's camera for an object that leans by `tilt`, written with the turntable's equations."""
    level = orbit([azimuth], elevation, DISTANCE, FOV, relative=False)
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    turn = torch.tensor([[1, 0, 0, 0], [0, cos, -sin, 0], [0, sin, cos, 0], [0, 0, 0, 1]])
    return Cameras(turn @ level.c2w, level.K)


@pytest.fixture(scope="module")
def toy() -> Object3D:
    """Two steps of an object, with pictures of four views."""
    g = torch.Generator().manual_seed(9)
    pictures = [torch.rand(4, 3, 16, 16, generator=g) for _ in range(3)]
    maps = {"rgb": pictures[1], "ccm": pictures[2]}
    steps = tuple(Step3D(i, 2, 50.0 / (1 + i), blob(i), pictures[0], maps) for i in range(2))
    orbit_of_views = orbit([0, 90, 180, 270], ELEVATION, DISTANCE, FOV)
    return Object3D(
        gaussians=steps[-1].gaussians,
        elevation=ELEVATION,
        cameras=orbit_of_views,
        views=pictures[0],
        image=torch.rand(3, 16, 16, generator=g),
        history=steps,
    )


@pytest.fixture(scope="module")
def page(toy, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("player") / "toy.html"
    toy.save(path)
    return path


# ---------------------------------------------------------------- packing


@pytest.mark.parametrize("norm", [1.0, 0.7], ids=["unit quaternions", "the release's"])
def test_packed_gaussians_look_the_same(norm):
    original = blob(0, norm=norm)
    views = turntable_cameras(120, DISTANCE, FOV)
    assert psnr(render(unpack(pack(original)), views, 128).rgb, render(original, views, 128).rgb) > 53


def test_the_least_turn_keeps_the_ellipsoids():
    g = blob(3, count=2000).to(torch.float64)
    quats, scales = (torch.from_numpy(x)[None] for x in least_turn(g.quats[0].numpy(), g.scales[0].numpy()))
    assert quats[..., 0].min() > math.cos(math.radians(62.8 / 2)) - 1e-9 and quats[..., 1:].abs().max() < AXIS
    again = Gaussians(g.means, quats, scales, g.opacities, g.rgb)
    assert torch.allclose(again.covariances(), g.covariances(), atol=1e-8)


def test_sixteen_bytes_each_and_the_faint_are_dropped():
    original = blob(0, count=50)
    faint = Gaussians.from_tensor(original.to_tensor())
    faint.opacities[0, :20] = 0.004
    faint.opacities[0, 20:] = 0.5
    packed = pack(faint)
    assert packed.words.shape == (30, 4) and packed.words.dtype.itemsize == 4
    assert np.allclose(unpack(packed).means[0], original.means[0, 20:], atol=2e-5)


def test_an_empty_object_packs():
    assert pack(blob(0, count=0)).words.shape == (0, 4)


def test_nan_is_refused():
    broken = blob(0, count=3)
    broken.means[0, 1, 2] = float("nan")
    with pytest.raises(ExportError, match="NaN"):
        pack(broken)


# ---------------------------------------------------------------- page


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.search(r"https?://", text), "an address in the page"
    assert not re.search(r"(src|href)=\"(?!data:)", text), "a file beside the page"
    assert "{{" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


def test_a_title_cannot_end_the_script():
    page = player_page(player_data("</script><script>alert(1)</script>"))
    assert page.count("<script") == 2 and "alert(1)</title>" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["title"] == "</script><script>alert(1)</script>"


def test_the_views_lie_where_the_cameras_stood(toy):
    data = object_data(toy, "toy")
    assert data["azimuths"] == pytest.approx([0, 90, 180, 270], abs=0.01)
    assert data["distance"] == pytest.approx(DISTANCE, abs=1e-4) and data["fov"] == pytest.approx(FOV, abs=1e-3)
    assert [step["sigma"] for step in data["steps"]] == [50.0, 25.0]
    assert set(data["steps"][0]["pictures"]) == {"views", "rgb", "ccm"}


def test_an_unknown_object_fills_the_picture():
    small = blob(0)
    far = Gaussians(100 * small.means + 40, small.quats, 100 * small.scales, small.opacities, small.rgb)
    near_frame, far_frame = framing(small), framing(far)
    assert far_frame["distance"] == pytest.approx(100 * near_frame["distance"], rel=1e-3)
    assert far_frame["target"] == pytest.approx([40 + 100 * x for x in near_frame["target"]], abs=0.01)


# ---------------------------------------------------------------- ouroboros3d view


def test_view_writes_a_page_of_any_ply(tmp_path, capsys):
    save_ply(tmp_path / "scene.ply", blob(0))
    assert call(view, [str(tmp_path / "scene.ply"), "--no_open"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "scene.html")
    assert '"title":"scene"' in (tmp_path / "scene.html").read_text()


def test_view_takes_our_files_as_they_lean_and_others_with_y_down(toy, tmp_path):
    turned = upright(toy, "-y")
    comment = TURN_COMMENT.format(turn=turn_degrees("-y", ELEVATION), elevation=ELEVATION)
    save_ply(tmp_path / "ours.ply", turned, comments=[comment])
    save_ply(tmp_path / "theirs.ply", toy.gaussians)
    ours, elevation = load_upright(tmp_path / "ours.ply", None)
    theirs, level = load_upright(tmp_path / "theirs.ply", None)
    kept = toy.gaussians.means[0, toy.gaussians.opacities[0] >= 0.005]
    assert elevation == ELEVATION and torch.allclose(ours.means[0], kept, atol=1e-5)
    assert level == 0 and torch.allclose(theirs.means[0], kept * torch.tensor([1.0, -1.0, -1.0]), atol=1e-5)


def test_view_sees_that_a_file_with_y_up_is_ours(tmp_path):
    level = Object3D(blob(0))
    write_ply(level, tmp_path / "level.ply", up="y")
    gaussians, _ = load_upright(tmp_path / "level.ply", None)
    assert torch.allclose(gaussians.means, visible(level.gaussians).means, atol=1e-5)


@pytest.mark.parametrize("content", [b"", b"ply\nformat ascii 1.0\nelement vertex 1\n", b"no ply"])
def test_view_refuses_what_is_no_ply_of_gaussians(tmp_path, capsys, content):
    (tmp_path / "bad.ply").write_bytes(content)
    assert call(view, [str(tmp_path / "bad.ply"), "--no_open"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "bad.ply" in error
    assert not (tmp_path / "bad.html").exists()


# ---------------------------------------------------------------- in a browser


def picture(url: str) -> torch.Tensor:
    """[3, H, W] in [0, 1] of a data: URI."""
    decoded = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")
    return torch.from_numpy(np.array(decoded)).permute(2, 0, 1) / 255


@pytest.fixture
def open_page(browser):
    """open_page(path): the player in a new tab that has collected its requests and errors."""
    tabs = []

    def open_(path: Path, script: str = "", **options):
        tab = browser.new_page(**options)
        tabs.append(tab)
        tab.seen, tab.errors = [], []
        tab.on("request", lambda request: tab.seen.append(request.url))
        tab.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.add_init_script(script)
        tab.goto(path.as_uri())
        wait_until(tab, "window.player")
        return tab

    yield open_
    for tab in tabs:
        tab.close()


@pytest.mark.slow
def test_the_canvas_agrees_with_the_cpu_renderer(open_page, page, toy):
    tab = open_page(page)
    for step in (0, 1):
        tab.evaluate(f"player.show({step})")
        for azimuth, elevation in CAMERAS:
            drawn = tab.evaluate(f"player.snapshot({{azimuth: {azimuth}, elevation: {elevation}}}, 192)")
            rendered = render(toy.history[step].gaussians, cameras(azimuth, elevation), 192).rgb[0, 0]
            assert psnr(picture(drawn), rendered.clamp(0, 1)) > 50, (step, azimuth, elevation)
    assert not tab.errors
    assert [url for url in tab.seen if not url.startswith(("data:", "blob:"))] == [page.as_uri()]


@pytest.mark.slow
def test_keys_buttons_and_clicks(open_page, page):
    tab = open_page(page, viewport={"width": 1180, "height": 900})
    step = lambda: tab.locator("output").inner_text()  # noqa: E731
    assert step().startswith("step 2 of 2 · σ 25 · ")
    tab.keyboard.press("ArrowLeft")
    assert step().startswith("step 1 of 2 · σ 50 · ")
    tab.keyboard.press("d")
    assert tab.evaluate("[player.view.azimuth, player.view.elevation]") == [5, ELEVATION]
    tab.keyboard.press("3")
    assert tab.evaluate("player.view.azimuth") == pytest.approx(180, abs=0.01)
    tab.locator("figure.views img").click(position={"x": 150, "y": 20})
    assert tab.evaluate("player.view.azimuth") == pytest.approx(90, abs=0.01)
    tab.locator(".reset").click()
    assert tab.evaluate("player.view.azimuth") == 0
    box = tab.locator("canvas").bounding_box()
    tab.mouse.move(box["x"] + 200, box["y"] + 200)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 160, box["y"] + 200)
    tab.mouse.up()
    assert tab.evaluate("player.view.azimuth") == 20
    tab.locator(".spin").click()
    wait_until(tab, "player.view.azimuth > 21")
    tab.locator(".play").click()
    wait_until(tab, "document.querySelector('.step').value == '1'")
    assert not tab.errors


@pytest.mark.slow
def test_the_background_shows_where_nothing_is(open_page, page):
    tab = open_page(page)
    tab.evaluate("player.setBackground('#204080')")
    corner = picture(tab.evaluate("player.snapshot({}, 64)"))[:, 0, 0]
    assert (255 * corner).round().tolist() == [0x20, 0x40, 0x80]


@pytest.mark.slow
def test_the_ply_of_a_step_is_the_object_upright(open_page, page, toy, tmp_path):
    tab = open_page(page)
    tab.keyboard.press("Home")
    with tab.expect_download() as download:
        tab.locator(".ply").click()
    assert download.value.suggested_filename == "toy_step_00.ply"
    download.value.save_as(tmp_path / "step.ply")
    assert b"comment ouroboros3d" in (tmp_path / "step.ply").read_bytes()[:200]
    view_from = cameras(30, 10)
    original, again = toy.history[0].gaussians, load_ply(tmp_path / "step.ply")
    assert psnr(render(again, view_from, 128).rgb, render(original, view_from, 128).rgb) > 50


@pytest.mark.slow
def test_without_webgl2_the_page_says_so_and_shows_the_pictures(open_page, page):
    tab = open_page(page, "HTMLCanvasElement.prototype.getContext = () => null")
    assert "no WebGL2" in tab.locator(".notice").inner_text()
    assert tab.locator("canvas").is_hidden()
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("output").inner_text().startswith("step 1 of 2")
    assert tab.evaluate("document.querySelector('figure.views img').naturalWidth") == 64
    assert not tab.errors


@pytest.mark.slow
def test_a_phone_reads_it_and_turns_it_by_touch(open_page, page):
    tab = open_page(page, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.locator("canvas").bounding_box()["width"] > 340
    box = tab.locator("canvas").bounding_box()
    client = tab.context.new_cdp_session(tab)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        places = [{"x": box["x"] + x, "y": box["y"] + y, "id": i} for i, (x, y) in enumerate(points)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

    touch("touchStart", (100, 100))
    touch("touchMove", (60, 100))
    touch("touchEnd")
    assert tab.evaluate("player.view.azimuth") == pytest.approx(20, abs=1)
    before = tab.evaluate("player.view.distance")
    touch("touchStart", (100, 100), (200, 100))
    touch("touchMove", (50, 100), (250, 100))
    touch("touchEnd")
    assert tab.evaluate("player.view.distance") == pytest.approx(before / 2, rel=0.05)
