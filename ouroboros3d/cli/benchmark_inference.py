"""Times the parts of one sampling run, counts their arithmetic, and computes the cost of every option and preset.

    OMP_NUM_THREADS=1 python scripts/benchmark_inference.py --cpu_time     (waiting threads would count as work)
    python scripts/benchmark_inference.py --config configs/baseline.yaml --random --device cuda --json h100.json
    python scripts/benchmark_inference.py --config configs/baseline.yaml --device meta        (arithmetic alone)

A part's seconds are the mean of --repeats calls after one uncounted call, or four where it is compiled. --repeats 0
times the last of these, for parts that take minutes. `of limit` is the part's arithmetic rate over that of a large
matrix product timed in the same run. An option's cost is the sum of the parts that its steps need, for one object;
writing files is not included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ouroboros3d.cli.options import SMALL_CONFIG, Parser, say_loading, split_overrides
from ouroboros3d.config.loading import load_config
from ouroboros3d.config.schema import Config, PretrainedConfig
from ouroboros3d.files import write_json

if TYPE_CHECKING:
    import torch

    from ouroboros3d.build import Models

OPTIONS = {
    "exact": [],
    "fast": ["sampler.preset=fast"],
    "draft": ["sampler.preset=draft"],
    "dtype=half": ["sampler.dtype=half"],
    "feedback_every=2": ["sampler.feedback_every=2"],
    "feedback_sigma=[0.3,20]": ["sampler.feedback_sigma=[0.3,20.0]"],
    "guidance_sigma=[0.5,100]": ["sampler.guidance_sigma=[0.5,100.0]"],
    "last_sigma=0.2": ["sampler.last_sigma=0.2"],
    "step_share=0.8": ["sampler.step_share=0.8"],
    "loop_decoder=half": ["sampler.loop_decoder=half"],
    "loop_decoder=tiny": ["sampler.loop_decoder=tiny"],
    "compile": ["sampler.compile=true"],
}


@dataclass(frozen=True)
class Cost:
    """Of one call of a part, or of a whole run; what could not be measured is None."""

    seconds: float | None
    tflop: float
    kernels: int | None = None  # launched on CUDA
    peak_gib: float | None = None  # of CUDA memory


def part_calls(models: Models, config: Config, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each part of a run as a call without arguments, on inputs of the right shapes."""
    import torch

    from ouroboros3d.build import build_cameras, build_renderer
    from ouroboros3d.models.svd import time_ids

    unet, svd, lgm, model = models.unet, models.svd, models.lgm, config.model
    cameras, size, latent = build_cameras(config).to(device), model.image_size, model.image_size // svd.downscale
    views, dtype = cameras.num_views, unet.unet.dtype
    zeros = partial(torch.zeros, device=device)
    image, x0 = zeros(1, 3, size, size), zeros(1, views, model.vae.latent_channels, latent, latent)
    decoded, noise_level = zeros(1, views, 3, size, size), zeros(())
    maps = dict.fromkeys(unet.config.feedback, decoded)
    rays, lgm_rays = unet.encode_cameras(cameras, latent), lgm.encode_cameras(cameras)
    features = unet.encode_feedback(maps)

    def predict(halves: int) -> object:
        sample = torch.cat([x0, x0], dim=2).repeat(halves, 1, 1, 1, 1).to(dtype)
        context = zeros(halves, 1, model.image_encoder.projection_dim, dtype=dtype)
        ids = time_ids(unet.config.micro_conditions, zeros(halves))
        given = sample, noise_level, context, ids, rays.repeat(halves), features.repeat(halves)
        return unet(*given, conditional_half=halves == 1)

    calls = {
        "image embedding": lambda: svd.embed_image(image),
        "encode": lambda: svd.encode(image),
        "camera rays": lambda: (unet.encode_cameras(cameras, latent), lgm.encode_cameras(cameras)),
        "U-Net, one half": lambda: predict(1),
        "U-Net, two halves": lambda: predict(2),
        "adapters": lambda: unet.encode_feedback(maps),
        "decode": lambda: svd.decode(x0),
        "decode, half": lambda: svd.decode_in_loop(x0, "half"),
        "LGM": lambda: lgm(decoded, cameras, noise_level, lgm_rays),
    }
    if svd.tiny_decoder is not None:
        calls["decode, tiny"] = lambda: svd.decode_in_loop(x0, "tiny")
    if all(weight == 1.0 for weight in config.sampler.guidance):
        del calls["U-Net, two halves"]
    if device.type != "meta":
        gaussians, renderer = lgm(decoded, cameras, noise_level, lgm_rays), build_renderer(config)
        calls["render"] = lambda: renderer(gaussians, cameras, size)
    return calls


def measure(
    call: Callable[[], object], device: torch.device, timer: Callable[[], float], repeats: int, compiled: bool = False
) -> Cost:
    import torch

    from ouroboros3d.timing import COMPILED_WARM_UP, count_tflop, seconds_of

    cuda, tflop = device.type == "cuda", []
    seconds = seconds_of(lambda: tflop.append(count_tflop(call)), device, timer)
    if device.type == "meta":
        return Cost(None, tflop[0])
    for _ in range(COMPILED_WARM_UP if compiled else 0):
        seconds = seconds_of(call, device, timer)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    if repeats:
        seconds = sum(seconds_of(call, device, timer) for _ in range(repeats)) / repeats
    if not cuda:
        return Cost(seconds, tflop[0])
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds_of(call, device)
    kernels = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
    return Cost(seconds, tflop[0], kernels, peak)


def run_cost(config: Config, parts: dict[str, Cost]) -> Cost:
    """Of one object: every part as often as the plan of the steps calls it."""
    from ouroboros3d.diffusion import euler_schedule
    from ouroboros3d.sampler import plan_steps

    sampler = config.sampler
    sigmas = euler_schedule(sampler.scheduler, sampler.taken_steps).sigmas.tolist()
    plans = plan_steps(sampler, sigmas, every_step=False)
    guided, fed = sum(plan.guided for plan in plans), sum(plan.fed for plan in plans)
    made = sum(plan.made for plan in plans)
    in_loop = {"full": "decode", "half": "decode, half", "tiny": "decode, tiny"}[sampler.loop_decoder]
    counts = {
        **dict.fromkeys(("image embedding", "encode", "camera rays", "decode"), 1),
        "U-Net, one half": len(plans) - guided,
        "U-Net, two halves": guided,
        "adapters": fed + (fed < len(plans)),  # empty maps are encoded once
        "LGM": made,
        "render": made,
    }
    counts[in_loop] = counts.get(in_loop, 0) + made - 1
    used = [(parts[name], n) for name, n in counts.items() if n and (name in parts or name != "render")]
    timed = all(part.seconds is not None for part, _ in used)
    return Cost(sum(part.seconds * n for part, n in used) if timed else None, sum(part.tflop * n for part, n in used))


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--config", default=SMALL_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument(
        "--options",
        nargs="+",
        choices=OPTIONS,
        metavar="NAME",
        help=f"options to compute, of {', '.join(OPTIONS)} (default: all)",
    )
    parser.add_argument(
        "--random", action="store_true", help="random weights instead of the config's; times are the same"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed calls per part, at least 0 (default: %(default)s)"
    )
    parser.add_argument("--cpu_time", action="store_true", help="measure CPU seconds instead of wall time")
    parser.add_argument("--device", help="cpu, cuda or meta (default: cuda if available)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    overrides = [text for text in split_overrides(arguments)[1] if text not in OPTIONS]
    options = parser.parse_args([text for text in arguments if text not in overrides])
    names = options.options or [name for name in OPTIONS if name != "compile"]
    configs = {name: load_config(options.config, [*OPTIONS[name], *overrides]) for name in names}
    say_loading()
    report = benchmark(configs, options)
    print(table(report))
    if options.json:
        write_json(options.json, report)


def benchmark(configs: dict[str, Config], options: argparse.Namespace) -> dict:
    """The limit, the parts of every precision that an option needs, and the options."""
    import torch

    from ouroboros3d.devices import inference_dtype, pick_device
    from ouroboros3d.timing import matrix_rate

    device = torch.device("meta") if options.device == "meta" else pick_device(options.device)
    timer = time.process_time if options.cpu_time else time.perf_counter
    report: dict = {"device": _device_name(device), "threads": torch.get_num_threads(), "parts": {}, "options": {}}
    measured: dict[str, dict[str, Cost]] = {}
    for name, config in configs.items():
        dtype = inference_dtype(config.sampler.dtype, device)
        variant = str(dtype).removeprefix("torch.") + (", compiled" if config.sampler.compile else "")
        if variant not in measured:
            limit = None if device.type == "meta" else matrix_rate(device, dtype, timer)
            measured[variant] = _measure_parts(config, options, device, dtype, timer)
            rows = {part: {**asdict(c), "of_limit": _of_limit(c, limit)} for part, c in measured[variant].items()}
            report["parts"][variant] = {"limit_tflop_per_second": limit, **rows}
        try:
            report["options"][name] = asdict(run_cost(config, measured[variant]))
        except KeyError as part:  # no tiny decoder
            report["options"][name] = f"not measured: there is no part {part}"
    return report


def _measure_parts(
    config: Config, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, timer: Callable[[], float]
) -> dict[str, Cost]:
    import torch
    from tqdm.auto import tqdm

    from ouroboros3d.build import build_models, build_sampler
    from ouroboros3d.models.svd import make_tiny_decoder

    if options.random or device.type == "meta":
        config.model.pretrained = PretrainedConfig()
    with torch.device("meta" if device.type == "meta" else "cpu"), torch.no_grad():
        models = build_models(config.model)
        if models.svd.tiny_decoder is None and (options.random or device.type == "meta"):
            models.svd.tiny_decoder = make_tiny_decoder(config.model.tiny_decoder, config.model.vae.latent_channels)
    models.to(device, dtype)
    build_sampler(models, config)  # compiles
    with torch.no_grad():
        calls = part_calls(models, config, device)
        return {
            part: measure(call, device, timer, options.repeats, config.sampler.compile)
            for part, call in tqdm(calls.items(), desc=str(dtype), unit="part")
        }


def _of_limit(cost: Cost, limit: float | None) -> float | None:
    return None if not cost.seconds or limit is None else cost.tflop / cost.seconds / limit


def _device_name(device: torch.device) -> str:
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else "meta: arithmetic alone"


def table(report: dict) -> str:
    """The report as Markdown."""

    def cell(value: float | None, digits: str = ".3g") -> str:
        return "" if value is None else f"{value:{digits}}" if isinstance(value, float) else str(value)

    lines = [f"{report['device']}, {report['threads']} threads"]
    for variant, parts in report["parts"].items():
        limit = parts["limit_tflop_per_second"]
        lines += ["", f"{variant}" + (f": the limit is {limit:.3g} TFLOP/s" if limit else "")]
        lines += ["", "| part | seconds | TFLOP | of limit | kernels | peak GiB |", "|---" * 6 + "|"]
        for name, row in parts.items():
            if isinstance(row, dict):
                cells = [cell(row[key]) for key in ("seconds", "tflop", "of_limit", "kernels", "peak_gib")]
                lines.append(f"| {name} | {' | '.join(cells)} |")
    first = next(row for row in report["options"].values() if isinstance(row, dict))
    lines += ["", "| option | seconds per object | ratio | TFLOP per object | ratio |", "|---" * 5 + "|"]
    for name, row in report["options"].items():
        if not isinstance(row, dict):
            lines.append(f"| {name} | {row} | | | |")
            continue
        ratio = None if row["seconds"] is None else row["seconds"] / first["seconds"]
        cells = [cell(row["seconds"]), cell(ratio, ".2f"), cell(row["tflop"], ".4g")]
        cells.append(cell(row["tflop"] / first["tflop"], ".2f"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
