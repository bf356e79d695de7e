"""What the benchmark adds up: how often a run calls each of its parts, and their arithmetic."""

import itertools

import pytest
import torch

from ouroboros3d.cli import benchmark_inference
from ouroboros3d.cli.benchmark_inference import OPTIONS, Cost, measure, run_cost, table
from ouroboros3d.config.loading import load_config
from ouroboros3d.timing import COMPILED_WARM_UP, count_tflop, matrix_rate

PARTS = ("image embedding", "encode", "camera rays", "adapters", "LGM", "render", "U-Net, one half",
         "U-Net, two halves", "decode", "decode, half", "decode, tiny")  # fmt: skip


def calls(config, part: str) -> float:
    """How often a run calls a part: its seconds when nothing else takes any."""
    return run_cost(config, {name: Cost(float(name == part), 1.0) for name in PARTS}).seconds


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"U-Net, two halves": 25, "decode": 25, "LGM": 25, "adapters": 25, "encode": 1}),
        (["sampler.feedback_every=2"], {"decode": 13, "LGM": 13, "adapters": 13, "render": 13}),
        (["sampler.loop_decoder=tiny"], {"decode": 1, "decode, tiny": 24, "decode, half": 0}),
        (OPTIONS["guidance_sigma=[0.5,100]"], {"U-Net, two halves": 12, "U-Net, one half": 13}),
        (OPTIONS["last_sigma=0.2"], {"U-Net, two halves": 21, "decode": 21}),
        (OPTIONS["fast"], {"U-Net, two halves": 12, "U-Net, one half": 9, "decode": 1, "decode, half": 4}),
        (OPTIONS["fast"], {"adapters": 5, "LGM": 5}),
        (OPTIONS["draft"], {"U-Net, two halves": 9, "U-Net, one half": 7, "decode": 1, "decode, tiny": 3}),
    ],
)
def test_a_run_calls_its_parts_as_often_as_its_plan_says(options, expected):
    config = load_config(None, options)
    assert {part: calls(config, part) for part in expected} == expected


def test_the_table_compares_with_its_first_row():
    part = {"seconds": 2.0, "tflop": 1.0, "kernels": None, "peak_gib": None, "of_limit": 0.5}
    report = {
        "device": "none",
        "threads": 1,
        "parts": {"float32": {"limit_tflop_per_second": 1.0, "U-Net": part}},
        "options": {"exact": {"seconds": 4.0, "tflop": 2.0}, "fast": {"seconds": 1.0, "tflop": 1.0}, "x": "no part"},
    }
    text = table(report)
    assert "| U-Net | 2 | 1 | 0.5 |  |  |" in text
    assert "| fast | 1 | 0.25 | 1 | 0.50 |" in text and "| x | no part |" in text


def test_options_are_chosen_by_name(monkeypatch):
    seen = {}
    monkeypatch.setattr(benchmark_inference, "benchmark", lambda configs, _options: seen.update(configs))
    monkeypatch.setattr(benchmark_inference, "table", lambda _report: "")
    benchmark_inference.main(["--options", "exact", "step_share=0.8", "--device", "meta", "sampler.steps=10"])
    assert list(seen) == ["exact", "step_share=0.8"]
    assert [config.sampler.taken_steps for config in seen.values()] == [10, 8]


def test_arithmetic_is_counted_and_the_limit_timed():
    assert count_tflop(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == pytest.approx(2 * 2 * 3 * 4 / 1e12)
    ticks = iter(range(100))
    assert matrix_rate(torch.device("cpu"), torch.float32, lambda: next(ticks)) == 4 * 2 * 1024**3 / 1e12


class Halving(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) / 2


def test_what_is_compiled_is_timed_compiled():
    """A dispatch mode, as the counter is one, makes dynamo leave what it meets uncompiled."""
    events = []

    def backend(graph, _inputs):
        events.append("compiled")
        return lambda *inputs: events.append("ran") or graph(*inputs)

    network = Halving()
    network.compile(backend=backend)
    cost = measure(lambda: network(torch.ones(3, 4)), torch.device("cpu"), itertools.count().__next__, 2, compiled=True)
    assert events == ["compiled"] + ["ran"] * (COMPILED_WARM_UP + 2)
    assert cost == Cost(1.0, pytest.approx(2 * 3 * 4 * 2 / 1e12))
