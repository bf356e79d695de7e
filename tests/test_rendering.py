"""The renderers against each other, against finite differences and against what the release's kernel drew."""

from __future__ import annotations

import multiprocessing
import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ouroboros3d.cameras import Cameras, intrinsics_from_fov, orbit
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Rendering
from ouroboros3d.rendering import RULES, gsplat_backend, render
from ouroboros3d.rendering.rules import Rules

PARITY = Path(os.environ.get("OUROBOROS3D_PARITY", Path(__file__).parents[2] / "shared" / "parity"))
SIZE = 40  # no multiple of a tile or of a block
PARAMETERS = ("means", "quats", "scales", "opacities", "rgb")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat needs a CUDA device")
needs_parity = pytest.mark.skipif(
    not (PARITY / "render.safetensors").is_file(),
    reason=f"no recorded renderings in {PARITY}; OUROBOROS3D_PARITY names their folder",
)


def random_scene(kind: str = "plain", batch: int = 2, count: int = 60, seed: int = 0) -> Gaussians:
    """Gaussians in the unit ball, float32. Quaternions are not normalised."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, count, *shape, generator=generator)

    opacities, scales = uniform(0.1, 0.9), uniform(0.02, 0.15, 3)
    if kind == "tiny":
        scales = uniform(1e-6, 1e-3, 3)
    elif kind == "huge":
        scales = uniform(0.5, 2.0, 3)
    elif kind == "thin":
        scales = uniform(0.001, 0.5, 3) * torch.tensor([1.0, 0.02, 0.02])
    elif kind == "opaque":
        opacities, scales = uniform(0.95, 1.0), uniform(0.1, 0.4, 3)
    elif kind == "faint":  # around the 1/255 below which nothing is drawn
        opacities = uniform(0.001, 0.02)
    quats = torch.randn(batch, count, 4, generator=generator) * 0.4
    return Gaussians(uniform(-0.6, 0.6, 3), quats, scales, opacities, uniform(0, 1, 3))


def random_cameras(kind: str = "plain", batch: int = 2) -> Cameras:
    """Two views of every scene, each with focal lengths and a principal point of its own."""
    distance = 0.3 if kind == "inside" else 1.7  # inside: Gaussians behind, before and beside the near plane
    views = orbit([20.0, 165.0], elevation=15.0, distance=distance, relative=False)
    K = intrinsics_from_fov(torch.linspace(30, 70, 2 * batch).reshape(batch, 2))
    K[..., 1, 1] *= 1.1
    K[..., 0, 2] += torch.linspace(-0.1, 0.1, 2 * batch).reshape(batch, 2)
    return Cameras(views.c2w.repeat(batch, 1, 1, 1), K)


def parameters(gaussians: Gaussians, dtype: torch.dtype = torch.float32) -> Gaussians:
    """A copy whose five tensors are leaves that want a gradient."""
    return Gaussians(*(getattr(gaussians, name).to(dtype, copy=True).requires_grad_() for name in PARAMETERS))


def random_loss(rendering: Rendering) -> Tensor:
    """A loss in which every pixel of every output has a weight of its own."""
    loss = 0
    for i, output in enumerate((rendering.rgb, rendering.depth, rendering.alpha)):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        loss = loss + (output * weights.to(output)).sum()
    return loss


def gradients(gaussians: Gaussians, cameras: Cameras, dtype: torch.dtype = torch.float32, **options):
    leaves = parameters(gaussians, dtype)
    random_loss(render(leaves, cameras, **options)).backward()
    return {name: getattr(leaves, name).grad for name in PARAMETERS}


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """1e-4 for 99.9 % of the values and 5e-3 for all: an alpha next to 1/255 may be drawn or not."""
    error = (actual.double() - expected.double()).abs()
    assert error.max() <= 5e-3, f"{name}: {error.max():.2e}"
    assert (error > 1e-4).double().mean() <= 1e-3, f"{name}: {(error > 1e-4).double().mean():.2%} over 1e-4"


def assert_same_rendering(actual: Rendering, expected: Rendering) -> None:
    for name in ("rgb", "depth", "alpha"):
        assert_close(getattr(actual, name), getattr(expected, name), name)


# ---------------------------------------------------------------------------- the CPU renderer and the oracle


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kind", ["plain", "tiny", "huge", "thin", "opaque", "faint", "inside"])
def test_cpu_equals_the_dense_oracle(kind: str, rules: str) -> None:
    gaussians, cameras = random_scene(kind), random_cameras(kind)
    options = dict(size=SIZE, rules=rules, background=(0.2, 0.0, 0.7))
    cpu = render(gaussians, cameras, backend="cpu", **options)
    dense = render(gaussians, cameras, backend="dense", **options)
    assert cpu.rgb.shape == (2, 2, 3, SIZE, SIZE) and cpu.rgb.dtype == torch.float32
    assert cpu.depth.shape == cpu.alpha.shape == (2, 2, 1, SIZE, SIZE)
    assert dense.alpha.max() > 0.003, "the scene is to be seen"
    assert_same_rendering(cpu, dense)

    actual = gradients(gaussians, cameras, backend="cpu", **options)
    expected = gradients(gaussians, cameras, torch.float64, backend="dense", **options)
    for name in PARAMETERS:
        error = (actual[name] - expected[name]).norm() / expected[name].norm()
        assert error < 5e-4, f"gradient of {name}: {error:.1e}"


def test_the_dense_oracle_by_finite_differences() -> None:
    """In float64 the steps are too small to cross a threshold; in the CPU renderer they could not be."""
    gaussians = parameters(random_scene(count=4, batch=1), torch.float64)
    cameras = random_cameras(batch=1).views([0]).to(torch.float64)

    def loss(*tensors: Tensor) -> Tensor:
        return random_loss(render(Gaussians(*tensors), cameras, 6, backend="dense"))

    assert torch.autograd.gradcheck(loss, [getattr(gaussians, name) for name in PARAMETERS])


def test_rules_differ_where_they_say() -> None:
    """One opaque Gaussian: its peak shows the clamp; the square of three sigmas cuts its tail."""
    gaussians = Gaussians.from_tensor(torch.tensor([[[0, 0, 0, 1.0, 0.1, 0.1, 0.1, 1, 0, 0, 0, 1, 1, 1]]]))
    alpha = {name: render(gaussians, orbit([0.0]), 128, rules=name).alpha for name in RULES}
    assert alpha["exact"].max() == pytest.approx(0.99) and alpha["gsplat"].max() > 0.995
    cut = alpha["exact"] - alpha["release"]
    assert 1 / 255 < cut.max() < 0.0112
    assert (alpha["exact"] - alpha["gsplat"].clamp_max(0.99)).abs().max() < 1e-4


def test_a_batch_equals_its_scenes_and_views_bit_for_bit() -> None:
    gaussians, cameras = random_scene(), random_cameras()
    together = render(gaussians, cameras, SIZE, backend="cpu")
    for scene in range(2):
        for view in range(2):
            alone = render(gaussians.scene(scene), cameras.scenes([scene]).views([view]), SIZE, backend="cpu")
            for name in ("rgb", "depth", "alpha"):
                assert torch.equal(getattr(alone, name)[0, 0], getattr(together, name)[scene, view])


def test_runs_and_thread_counts_agree_bit_for_bit() -> None:
    gaussians, cameras = random_scene(count=1500), random_cameras()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            results.append(gradients(gaussians, cameras, size=SIZE, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for name in PARAMETERS:
        assert torch.equal(results[0][name], results[1][name])
        assert torch.equal(results[0][name], results[2][name])


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_nothing_to_see_is_the_background(backend: str) -> None:
    background = torch.tensor([0.1, 0.5, 0.9])
    empty = random_scene(count=0)
    behind = random_scene(count=5)
    behind = replace(behind, means=behind.means + torch.tensor([0.0, 0.0, 50.0]))
    for gaussians, cameras in ((empty, random_cameras()), (behind, orbit([0.0]).scenes([0, 0]))):
        leaves = parameters(gaussians)
        rendering = render(leaves, cameras, SIZE, background, backend)
        assert torch.equal(rendering.rgb, background.to(rendering.rgb)[:, None, None].expand(rendering.rgb.shape))
        assert rendering.depth.abs().max() == rendering.alpha.abs().max() == 0
        random_loss(rendering).backward()
        assert all((getattr(leaves, name).grad == 0).all() for name in PARAMETERS)


def test_double_precision_and_strided_gaussians_are_taken() -> None:
    rows = random_scene().to_tensor().double().transpose(0, 1).contiguous().transpose(0, 1)
    double = render(Gaussians.from_tensor(rows), random_cameras().to(torch.float64), SIZE, backend="cpu")
    single = render(random_scene(), random_cameras(), SIZE, backend="cpu")
    assert double.rgb.dtype == torch.float32
    assert_same_rendering(double, single)


def test_cpu_tensors_are_rendered_on_the_cpu_and_in_single_precision() -> None:
    expected = render(random_scene(), random_cameras(), SIZE, backend="cpu")
    assert torch.equal(render(random_scene(), random_cameras(), SIZE).rgb, expected.rgb)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = render(random_scene(), random_cameras(), SIZE)
    assert torch.equal(actual.rgb, expected.rgb)


def test_near_and_far_planes() -> None:
    gaussians = random_scene(batch=1)
    z = (gaussians.means @ orbit([0.0]).w2c[0, 0, :3, :3].T)[..., 2] + orbit([0.0]).w2c[0, 0, 2, 3]
    near, far = 1.5, 1.9
    kept = ((z > near) & (z < far))[0]
    assert 0 < kept.sum() < len(kept)
    few = Gaussians(*(getattr(gaussians, name)[:, kept] for name in PARAMETERS))
    for backend in ("cpu", "dense"):
        planes = render(gaussians, orbit([0.0]), SIZE, backend=backend, near=near, far=far)
        assert torch.equal(planes.rgb, render(few, orbit([0.0]), SIZE, backend=backend).rgb)


# --------------------------------------------------------------------------------------- the release's kernel


def recorded_cameras(world_to_camera: Tensor, fov: Tensor) -> Cameras:
    """The recording's row-vector matrices [V, 4, 4] and fields of view (degrees) as Cameras."""
    c2w = torch.linalg.inv(world_to_camera.double().transpose(-1, -2))
    return Cameras(c2w.float()[None], intrinsics_from_fov(fov)[None])


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(PARITY / "render.safetensors")


@pytest.fixture(scope="module")
def recorded_orbit(recorded: dict[str, Tensor]) -> Cameras:
    return recorded_cameras(recorded["cameras.world_to_camera"], torch.rad2deg(recorded["cameras.fov_x"].double()))


@needs_parity
class TestRecordedRenderings:
    """parity/README.md, render.safetensors. Images were recorded clamped, except those of `raw_view3`."""

    @pytest.mark.parametrize("backend", ["cpu", "dense"])
    def test_unclamped_colour(self, recorded, recorded_orbit, backend: str) -> None:
        gaussians = Gaussians.from_tensor(recorded["unit_quaternions.gaussians"])
        rendering = render(gaussians, recorded_orbit.views([3]), 64, backend=backend, rules="release")
        expected = Rendering(*(recorded[f"raw_view3.{n}"] for n in ("color", "depth", "alpha")))
        assert_same_rendering(Rendering(rendering.rgb[0, 0], rendering.depth[0, 0], rendering.alpha[0, 0]), expected)

    @pytest.mark.parametrize("backend", ["cpu", "dense"])
    def test_gradient(self, recorded, recorded_orbit, backend: str) -> None:
        rows = recorded["gradient.gaussians"].clone().requires_grad_()
        camera = recorded_orbit.views([int(recorded["gradient.view_id"])])
        rendering = render(Gaussians.from_tensor(rows), camera, 64, backend=backend, rules="release")
        loss = (rendering.rgb.clamp(0, 1) * recorded["gradient.weight_image"]).sum()
        loss = loss + (rendering.alpha * recorded["gradient.weight_alpha"]).sum()
        loss = loss + (rendering.depth * recorded["gradient.weight_depth"]).sum()
        loss.backward()
        assert loss.item() == pytest.approx(recorded["gradient.loss"].item(), rel=1e-4)
        expected = recorded["gradient.d_gaussians"]
        for name, columns in dict(means=[0, 1, 2], opacity=[3], scales=[4, 5, 6], quats=[7, 8, 9, 10]).items():
            error = (rows.grad - expected)[..., columns].norm() / expected[..., columns].norm()
            assert error < 1e-4, f"{name}: {error:.1e}"


# ----------------------------------------------------------------------------------------- errors and choices


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(backend="cuda"), "backend must be one of"),
        (dict(rules="3dgs"), "rules must be one of"),
        (dict(size=0), "size must be"),
        (dict(near=1.0, far=0.5), "near < far"),
        (dict(background=(1.0, 1.0)), "background must be"),
        (dict(backend="gsplat"), "gsplat renders CUDA tensors only"),
        (dict(cameras=random_cameras(batch=3)), "2 scenes of Gaussians but cameras for 3"),
        (dict(gaussians=replace(random_scene(), opacities=torch.ones(2, 60, 1))), "opacities must be"),
        (dict(gaussians=replace(random_scene(), means=torch.full((2, 60, 3), torch.nan))), "means has values"),
        (dict(gaussians=replace(random_scene(), means=torch.zeros(60, 3))), "means .B, N, 3."),
        (dict(gaussians=random_scene(batch=0), cameras=random_cameras().scenes([])), "nothing to render"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    arguments = dict(gaussians=random_scene(), cameras=random_cameras(), size=SIZE) | change
    with pytest.raises(ValueError, match=message):
        render(**arguments)


def _render_in_fork(queue) -> None:
    try:
        render(random_scene(), random_cameras(), SIZE, backend="cpu")
        queue.put("rendered")
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_is_told_why_it_cannot_render() -> None:
    render(random_scene(), random_cameras(), SIZE, backend="cpu")  # starts the threads
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=_render_in_fork, args=(queue,))
    worker.start()
    try:
        assert "spawn" in queue.get(timeout=30)
    finally:
        worker.join(timeout=10)
        worker.kill()


# ----------------------------------------------------------------------------------------------------- gsplat


def test_missing_gsplat_says_how_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(ImportError, match="pip install gsplat"):
        gsplat_backend.rasterize(random_scene(), random_cameras(), SIZE, torch.ones(3), RULES["exact"], 0.2, 100.0)
    with pytest.raises(ValueError, match="release"):
        gsplat_backend.rasterize(random_scene(), random_cameras(), SIZE, torch.ones(3), RULES["release"], 0.2, 100.0)


def test_gsplat_is_called_as_its_signature_wants(monkeypatch) -> None:
    """A stand-in with gsplat's conventions, drawing with the CPU renderer."""

    def rasterization(
        means, quats, scales, opacities, colors, viewmats, Ks, width, height, *, near_plane, far_plane, eps2d,
        radius_clip, packed, tile_size, render_mode, rasterize_mode, covars,
    ):  # fmt: skip
        assert quats is None and scales is None and not packed and width == height == SIZE
        assert (render_mode, rasterize_mode, eps2d, radius_clip, tile_size) == ("RGB+D", "classic", 0.3, 0.0, 16)
        assert viewmats.shape == (2, 2, 4, 4) and Ks.shape == (2, 2, 3, 3) and colors.shape == (2, 60, 3)
        assert far_plane < float("inf")
        K = Ks.clone()
        K[..., :2, :] /= width

        class WithCovariances(Gaussians):
            def covariances(self):
                return covars

            def to(self, *args, **kwargs):
                return self

        gaussians = WithCovariances(means, torch.zeros(2, 60, 4), torch.zeros(2, 60, 3), opacities, colors)
        cameras = Cameras(torch.linalg.inv(viewmats), K)
        drawn = render(gaussians, cameras, width, (0.0, 0.0, 0.0), "cpu", "gsplat", near_plane, far_plane)
        return torch.cat([drawn.rgb, drawn.depth], 2).movedim(2, -1), drawn.alpha.movedim(2, -1), {}

    monkeypatch.setitem(sys.modules, "gsplat", types.SimpleNamespace(rasterization=rasterization))
    background = torch.tensor([0.2, 0.0, 0.7])
    actual = gsplat_backend.rasterize(
        random_scene(), random_cameras(), SIZE, background, RULES["gsplat"], 0.2, float("inf")
    )
    expected = render(random_scene(), random_cameras(), SIZE, background, "cpu", "gsplat")
    assert_same_rendering(actual, expected)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", ["plain", "tiny", "huge", "opaque", "faint", "inside"])
def test_gsplat_equals_the_dense_oracle(kind: str) -> None:
    pytest.importorskip("gsplat")
    gaussians, cameras = random_scene(kind), random_cameras(kind)
    options = dict(size=SIZE, rules="gsplat", background=(0.2, 0.0, 0.7))
    actual = render(gaussians.to("cuda"), cameras.to("cuda"), **options)
    on_cpu = Rendering(actual.rgb.cpu(), actual.depth.cpu(), actual.alpha.cpu())
    assert_same_rendering(on_cpu, render(gaussians, cameras, backend="dense", **options))
    on_gpu = gradients(gaussians.to("cuda"), cameras.to("cuda"), **options)
    expected = gradients(gaussians, cameras, torch.float64, backend="dense", **options)
    for name in PARAMETERS:
        error = (on_gpu[name].cpu() - expected[name]).norm() / expected[name].norm()
        assert error < 1e-2, f"gradient of {name}: {error:.1e}"


@pytest.mark.gpu
@needs_cuda
def test_cpu_renderer_refuses_cuda_tensors() -> None:
    with pytest.raises(ValueError, match="wants CPU tensors"):
        render(random_scene().to("cuda"), random_cameras().to("cuda"), SIZE, backend="cpu")


def test_rules_are_what_the_kernels_have_compiled_in() -> None:
    assert RULES["release"] == Rules(0.99, square_sigmas=3.0)
    assert RULES["gsplat"] == Rules(0.999, axis_sigmas=3.33)
