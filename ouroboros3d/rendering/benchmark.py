"""Times of the renderers on random scenes (the command: scripts/benchmark_renderer.py)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ouroboros3d.cameras import orbit
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.rendering import render
from ouroboros3d.timing import seconds_of

VIEWS = 8
DENSE_LIMIT = 512 * 64 * 64  # Gaussians x pixels


def ball(count: int) -> torch.Tensor:
    """[1, N, 14] Gaussians of scales 0.005 to 0.03 in a ball of radius 0.7, about as an object has them."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=-1)
    means = 0.7 * direction * torch.rand(count, 1, generator=generator) ** (1 / 3)
    opacities = 0.1 + 0.8 * torch.rand(count, 1, generator=generator)
    scales = 0.005 + 0.025 * torch.rand(count, 3, generator=generator)
    quats = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=-1)
    rgb = torch.rand(count, 3, generator=generator)
    return torch.cat([means, opacities, scales, quats, rgb], dim=-1)[None]


def best_time(work: Callable[[], None], device: torch.device, seconds: float) -> float:
    """The shortest of the repetitions that fit in `seconds`, at least two, after one that warms up."""
    times: list[float] = []
    work()
    while len(times) < 2 or sum(times) < seconds:
        times.append(seconds_of(work, device))
    return min(times)


def measure(backend: str, count: int, size: int, seconds: float) -> tuple[float, float]:
    """Milliseconds a view: forward, forward and backward."""
    device = torch.device("cuda" if backend == "gsplat" else "cpu")
    cameras = orbit([360 / VIEWS * i for i in range(VIEWS)], elevation=10, relative=False).to(device)
    rows = ball(count).to(device).requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            render(Gaussians.from_tensor(rows), cameras, size, backend=backend)

    def both() -> None:
        rendering = render(Gaussians.from_tensor(rows), cameras, size, backend=backend)
        loss = rendering.rgb.square().mean() + rendering.depth.mean() + rendering.alpha.mean()
        torch.autograd.grad(loss, rows)

    return tuple(1e3 / VIEWS * best_time(work, device, seconds) for work in (forward, both))


def compare(scenes: list[tuple[int, int]], backends: list[str] | None, seconds: float) -> None:
    """Prints a row for each (Gaussians, pixels) and backend, by default all that this machine has."""
    backends = backends or ["dense", "cpu", *(["gsplat"] if torch.cuda.is_available() else [])]
    print(f"{torch.get_num_threads()} threads, {VIEWS} views; ms per view\n")
    print(f"{'Gaussians@pixels':18}{'backend':10}{'forward':>10}{'with backward':>16}{'times dense':>14}")
    for count, size in scenes:
        reference = None
        for backend in backends:
            if backend == "dense" and count * size * size > DENSE_LIMIT:
                continue
            forward, both = measure(backend, count, size, seconds)
            reference = both if backend == "dense" else reference
            ratio = f"{reference / both:.0f}x faster" if reference and backend != "dense" else ""
            print(f"{f'{count}@{size}':18}{backend:10}{forward:10.2f}{both:16.2f}{ratio:>14}", flush=True)
