"""The web app: its work with a tiny random model, and in Chromium the page with the small model."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import photos
import pytest
import torch
from PIL import Image
from test_player import picture

from ouroboros3d.app.jobs import Framing, Settings, Worker
from ouroboros3d.app.port import AppError, check_port
from ouroboros3d.cli import call
from ouroboros3d.cli.app import main as app
from ouroboros3d.config.loading import load_config
from ouroboros3d.errors import ConfigError
from ouroboros3d.export import FORMATS
from ouroboros3d.export.object3d import Object3D
from ouroboros3d.export.views import psnr
from ouroboros3d.gaussians import load_ply
from ouroboros3d.inference.photo import ImageError
from ouroboros3d.pipeline import Ouroboros3DPipeline
from ouroboros3d.rendering import render

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def worker(make_config, make_models, tmp_path_factory) -> Worker:
    config = make_config({"sampler": {"steps": 3}, "turntable": {"size": 16, "step": 90}})
    return Worker(Ouroboros3DPipeline(make_models(), config), tmp_path_factory.mktemp("app"))


@pytest.fixture
def toy(tmp_path) -> str:
    """A picture whose object is opaque, with a faint haze to its left."""
    cut = photos.toy()
    cut.paste((200, 60, 40, 60), (0, 10, 8, 20))
    return str(photos.saved(cut, tmp_path / "toy.png"))


# ---------------------------------------------------------------- cut-out and framing


def test_the_border_and_the_threshold_move_the_object(worker, toy):
    def left(framing: Framing) -> float:
        """Of the object in what the networks see, as a share of the width."""
        seen = worker.prepare(toy, framing).image
        return np.flatnonzero((seen.amin(0) < 0.9).any(0).numpy())[0] / seen.shape[-1]

    assert left(Framing(border=0.5)) == pytest.approx(0.25, abs=0.04)
    assert left(Framing(border=0.0)) == pytest.approx(0.0, abs=0.04)
    assert worker.prepare(toy, Framing(threshold=100)).cut.getpixel((2, 15))[3] == 0
    assert worker.prepare(toy, Framing(threshold=12)).cut.getpixel((2, 15))[3] == 60


def test_the_background_can_be_kept(worker, tmp_path):
    Image.new("RGB", (32, 32), (10, 200, 30)).save(tmp_path / "green.png")
    seen = worker.prepare(str(tmp_path / "green.png"), Framing("keep")).image
    assert torch.allclose(seen[:, 0, 0] * 127.5 + 127.5, torch.tensor([10.0, 200, 30]), atol=1)


@pytest.mark.parametrize("kind", ["text", "200 megapixels", "zero alpha", "all below the threshold"])
def test_uploads_that_cannot_be_used(worker, toy, tmp_path, kind):
    path, framing = tmp_path / "bad.png", Framing()
    if kind == "text":
        path.write_text("no picture")
    elif kind == "200 megapixels":
        photos.huge(path)
    elif kind == "zero alpha":
        Image.new("RGBA", (20, 20)).save(path)
    else:
        Image.new("RGBA", (20, 20), (9, 9, 9, 80)).save(path)
        framing = Framing(threshold=200)
    words = {"text": "not a picture", "200 megapixels": "million pixels"}.get(kind, "is fully transparent")
    with pytest.raises(ImageError, match=words) as error:
        worker.prepare(str(path), framing)
    assert "\n" not in str(error.value)
    assert worker.prepare(toy, Framing()).image.shape[0] == 3


# ---------------------------------------------------------------- the loop


def test_the_app_makes_what_the_pipeline_makes(worker, toy):
    prepared = worker.prepare(toy, Framing())
    *steps, made = worker.run(prepared, Settings(seed=4, steps=3, elevation=10.0), threading.Event())
    assert [step.index for step in steps] == [0, 1, 2] and isinstance(made, Object3D)
    output = worker.pipeline(prepared.image, seed=4, num_inference_steps=3, elevation=10.0)
    assert torch.allclose(made.gaussians.to_tensor(), output[0].gaussians.to_tensor(), atol=1e-5)
    assert len(made.history) == 3 and made.elevation == 10.0


def test_a_preset_may_end_the_loop_earlier(worker, toy, monkeypatch):
    sampler = dataclasses.replace(worker.pipeline.config.sampler, step_share=0.7, last_sigma=1.0, loop_decoder="half")
    monkeypatch.setattr(worker.pipeline, "config", dataclasses.replace(worker.pipeline.config, sampler=sampler))
    settings = Settings(steps=5, candidates=2)  # 4 steps, of which the last is at 0.002
    *steps, made = worker.run(worker.prepare(toy, Framing()), settings, threading.Event())
    assert [step.total for step in steps] == [3, 3, 3] and len(made.history) == 3


def test_the_best_of_several_seeds_is_finished(worker, toy):
    prepared = worker.prepare(toy, Framing())
    settings = Settings(seed=4, steps=2, candidates=3)
    best = worker.pipeline.choose(prepared.image, 4, 0.0, 3, worker.configure(settings))
    *_, made = worker.run(prepared, settings, threading.Event())
    assert made.seed == best.seed and best.seed in (4, 5, 6)


def test_cancelling_ends_the_loop_after_its_step(worker, toy, monkeypatch):
    ran = []
    unet = worker.pipeline.sampler.unet
    forward = type(unet).forward
    monkeypatch.setattr(type(unet), "forward", lambda *a, **k: (ran.append(1), forward(*a, **k))[1])
    cancelled = threading.Event()
    results = worker.run(worker.prepare(toy, Framing()), Settings(steps=3), cancelled)
    next(results)
    cancelled.set()
    assert list(results) == [] and len(ran) == 1
    assert worker.thread.submit(int).result(timeout=10) == 0  # the next user's turn


def test_cancelling_ends_the_choice_among_candidates_after_a_step(worker, toy, monkeypatch):
    cancelled, ran = threading.Event(), []
    unet = type(worker.pipeline.sampler.unet)
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *a, **k: (ran.append(1), cancelled.set(), forward(*a, **k))[2])
    assert list(worker.run(worker.prepare(toy, Framing()), Settings(steps=3, candidates=2), cancelled)) == []
    assert len(ran) == 1 and worker.thread.submit(int).result(timeout=10) == 0


def test_closing_ends_every_loop_after_its_step(worker, toy, monkeypatch):
    unet, ran = type(worker.pipeline.sampler.unet), []
    forward = unet.forward
    own = Worker(worker.pipeline, worker.folder)
    monkeypatch.setattr(unet, "forward", lambda *a, **k: (ran.append(1), own.closed.set(), forward(*a, **k))[2])
    picture = own.prepare(toy, Framing())
    assert list(own.run(picture, Settings(steps=3, candidates=2), threading.Event())) == [] and len(ran) == 1
    own.close()
    assert list(own.run(picture, Settings(steps=3), threading.Event())) == [] and len(ran) == 1


def test_all_users_share_one_thread(worker, toy, monkeypatch):
    """CUDA graphs belong to the thread that recorded them, and Gradio calls from many."""
    seen = set()
    unet = type(worker.pipeline.sampler.unet)
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *a, **k: (seen.add(threading.get_ident()), forward(*a, **k))[1])
    picture = worker.prepare(toy, Framing())

    def use(candidates: int) -> None:
        *_, made = worker.run(picture, Settings(steps=1, candidates=candidates), threading.Event())
        monkeypatch.setattr(type(made), "save", lambda _made, path: seen.add(threading.get_ident()) or path)
        list(worker.save(made, "toy", ["ply"]))

    for candidates in (1, 2):
        user = threading.Thread(target=use, args=[candidates])
        user.start()
        user.join()
    assert len(seen) == 1 and threading.get_ident() not in seen


def test_settings_that_cannot_be_are_refused(worker):
    with pytest.raises(ConfigError, match="steps"):
        worker.configure(Settings(steps=0))


def test_files_are_written_to_the_apps_folder(worker, toy):
    *_, made = worker.run(worker.prepare(toy, Framing()), Settings(steps=1), threading.Event())
    paths = list(worker.save(made, "toy", ["ply", "html", "transforms"]))
    assert [path.name for path in paths] == ["toy.ply", "toy.html", "toy_transforms.zip"]
    assert all(worker.folder in path.parents and path.stat().st_size > 100 for path in paths)


# ---------------------------------------------------------------- the command


def test_a_port_in_use_is_one_line(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert call(app, ["--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"port {port}" in error and "--port" in error


def test_an_address_of_another_machine_is_one_line():
    with pytest.raises(AppError, match=r"port 7860 of 192\.0\.2\.1"):
        check_port("192.0.2.1", 7860)


def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr("ouroboros3d.app.port.find_spec", lambda name: None)
    assert call(app, ["--port", str(free_port())]) == 2
    assert 'pip install ".[app]"' in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--limit_mb", "0"], ["sampler.stps=3"]])
def test_wrong_arguments(arguments, capsys):
    try:
        status = call(app, arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and capsys.readouterr().err.count("\n") == 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---------------------------------------------------------------- in a browser, with the small model


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of an app that serves the small model, started as a user does in an empty folder with an empty home."""
    pytest.importorskip("gradio", reason="Gradio, the extra `app`, is not installed")
    port, home = free_port(), tmp_path_factory.mktemp("home")
    log = open(tmp_path_factory.mktemp("log") / "log", "w+")  # noqa: SIM115
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "app.py"), "--port", str(port), "--limit_mb", "5"]
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if process.poll() is not None or f":{port}" in Path(log.name).read_text():
                break
            threading.Event().wait(0.2)
        assert process.poll() is None, Path(log.name).read_text()
        written = lambda: {p.parts[len(home.parts)] for p in home.rglob("*")}  # noqa: E731
        yield f"http://127.0.0.1:{port}", written
        assert "Traceback" not in Path(log.name).read_text(), Path(log.name).read_text()
    finally:
        process.terminate()
        process.wait(60)
        log.close()
    left = [path for path in home.rglob("ouroboros3d-app-*")]
    assert not left, left


@pytest.fixture
def open_app(browser, address):
    """open_app(): a user of the app, with requests to other hosts collected in `outside`."""
    users = []

    def open_():
        context = browser.new_context(viewport={"width": 1300, "height": 1000}, accept_downloads=True)
        context.set_default_timeout(180_000)  # of waiting, on a machine that does much else
        tab = context.new_page()
        tab.outside = []
        tab.on("request", lambda request: tab.outside.append(request.url))
        tab.goto(address[0])
        tab.wait_for_selector("#generate")
        users.append(context)
        return tab

    yield open_
    for context in users:
        context.close()


def upload(tab, path: Path) -> None:
    tab.set_input_files("input[type=file] >> nth=0", str(path))


def generate(tab, steps: int | None = None) -> None:
    tab.wait_for_selector("button#generate:not([disabled])")
    if steps is not None:
        tab.get_by_text("Settings of the loop").click()
        field = tab.locator("#steps input[type=number]")
        field.fill(str(steps))
        field.press("Tab")
    tab.click("button#generate")


def status(tab, words: str) -> None:
    tab.wait_for_function("words => document.querySelector('#status').innerText.includes(words)", arg=words)


@pytest.mark.slow
def test_upload_watch_turn_and_download(open_app, address, tmp_path):
    tab = open_app()
    upload(tab, ROOT / "testset" / "armchair.webp")
    tab.wait_for_selector("#cut img")
    tab.wait_for_selector("#seen img")
    generate(tab)
    steps = load_config("configs/small.yaml").sampler.steps
    status(tab, f"Done: {steps} steps")
    tab.wait_for_function(f"window.player?.count() === {steps}")
    drawn = tab.evaluate("player.snapshot({azimuth: 40, elevation: 10}, 192)")

    for name in FORMATS:
        box = tab.locator(f"#formats input[name='{name}']")
        box.check() if box.count() else tab.locator("#formats label", has_text=name).first.click()
    tab.click("button#make")
    tab.wait_for_function("n => document.querySelectorAll('#downloads a[download]').length === n", arg=len(FORMATS))
    links = tab.locator("#downloads a[download]")
    with tab.expect_download() as download:
        links.first.click()
    assert download.value.suggested_filename == links.first.get_attribute("download")
    files = {}
    for link in links.all():  # not by clicking: Chromium asks before a page's eleventh download
        name = link.get_attribute("download")
        (tmp_path / name).write_bytes(tab.request.get(link.get_attribute("href")).body())
        files[name.partition(".")[2]] = tmp_path / name
    assert Path(download.value.path()).read_bytes() == next(iter(files.values())).read_bytes()
    assert set(files) == set(FORMATS) - {"transforms"} | {"zip"}

    from test_player import cameras

    rendered = render(load_ply(files["ply"]), cameras(40, 10, tilt=0), 192).rgb[0, 0].clamp(0, 1)
    assert psnr(picture(drawn), rendered) > 50
    assert Image.open(files["png"]).width == 4 * 64
    assert files["mp4"].read_bytes()[4:8] == b"ftyp"
    assert "createPlayer" in files["html"].read_text()
    assert not [url for url in tab.outside if not url.startswith((address[0], "data:", "blob:"))]
    assert {name.rsplit("-", 1)[0] for name in address[1]() if not name.startswith(".")} <= {"ouroboros3d-app"}


@pytest.mark.slow
def test_bad_uploads_are_named_and_the_app_keeps_serving(open_app, tmp_path):
    tab = open_app()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGBA", (20, 20)).save(tmp_path / "clear.png")
    for path, words in (
        (tmp_path / "text.png", "text.png: not a picture"),
        (photos.huge(tmp_path / "huge.png"), "million pixels"),
        (tmp_path / "clear.png", "is fully transparent"),
    ):
        upload(tab, path)
        status(tab, words)
        assert tab.locator("button#generate").is_disabled()
        tab.reload()
        tab.wait_for_selector("#generate")
    upload(tab, ROOT / "testset" / "cup.webp")
    tab.wait_for_selector("button#generate:not([disabled])")


@pytest.mark.slow
def test_an_upload_above_the_limit_is_refused(open_app, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png", compress_level=0)
    tab = open_app()
    upload(tab, tmp_path / "large.png")
    tab.get_by_text("exceed").first.wait_for()


@pytest.mark.slow
def test_cancel_stops_the_loop(open_app):
    tab = open_app()
    upload(tab, ROOT / "testset" / "lamp.webp")
    generate(tab, steps=50)
    tab.wait_for_function("window.player?.count?.() >= 2")
    tab.click("button#cancel")
    status(tab, "Cancelled")
    steps = tab.evaluate("player.count()")
    tab.wait_for_timeout(3000)
    assert tab.evaluate("player.count()") <= steps + 1 < 50


@pytest.mark.slow
def test_two_users_at_once_get_their_own_objects(open_app):
    first, second = open_app(), open_app()
    for tab, name in ((first, "armchair"), (second, "cup")):
        upload(tab, ROOT / "testset" / f"{name}.webp")
        generate(tab, steps=3)
    for tab, name in ((first, "armchair"), (second, "cup")):
        status(tab, "Done: 3 steps")
        tab.wait_for_function("window.player?.count() === 3")
        assert tab.locator("#recursion h1").inner_text() == name
    drawn = [picture(tab.evaluate("player.snapshot({}, 64)")) for tab in (first, second)]
    assert psnr(*drawn) < 30
