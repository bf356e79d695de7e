"""Turns pictures into 3D Gaussians: one image, eight views, one .ply, one turntable video.

    python inference.py --input_img testset/armchair.webp
    python inference.py --config configs/baseline.yaml --ckpt path/to/checkpoint --input_img photo.png \\
        --output_dir outputs --elevation 30 --seed 0 --device cuda [key=value ...]

Any key of the configuration may follow as key=value, e.g. sampler.guidance=[1,2.5] sampler.feedback=[ccm].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from ouroboros3d.config.checks import check_config
from ouroboros3d.config.loading import load_config, split_overrides
from ouroboros3d.config.schema import Config

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "small.yaml"


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows what there is\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, and in `overrides` the key=value arguments wherever they stand. Exits with status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--input_img", nargs="+", required=True, metavar="FILE", help="one or more pictures")
    add("--config", default=str(DEFAULT_CONFIG), help="YAML file (default: configs/small.yaml)")
    add("--ckpt", metavar="FOLDER", help="holds mv_model_unet and recon_model (default: the config's)")
    add("--output_dir", default="outputs", help="default: %(default)s")
    add(
        "--elevation",
        type=float,
        help="degrees the picture's camera looks down (default: the config's)",
    )
    add("--seed", type=int, help="of the noise (default: the config's)")
    add("--steps", type=int, help="of the loop (default: the config's)")
    add("--device", help="cpu, cuda or cuda:<number> (default: what the machine has)")
    add("--preset", choices=("exact", "fast", "draft"), help="the same as sampler.preset=, docs/performance.md")
    add("--dtype", choices=("float32", "bf16", "fp16"), help="default: float32 on a CPU, fp16 on CUDA")
    add("--no_remove_bg", action="store_true", help="take opaque pictures as they are")
    add("--border", type=border, default=0.2, help="left empty around the object (default: %(default)s)")
    add("--save_steps", action="store_true", help="also write what every step of the loop made")
    # Taken out first, or `--input_img a.png sampler.steps=5` would name two pictures.
    arguments, overrides = split_overrides(arguments)
    options = parser.parse_args(arguments)
    options.overrides = overrides + ([f"sampler.preset={options.preset}"] if options.preset else [])
    return options


def border(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0 .. 1")
    return value


def configure(options: argparse.Namespace) -> Config:
    """The configuration with what the flags say on top. Raises ConfigError."""
    config = load_config(options.config, options.overrides)
    if options.ckpt is not None:
        config.model.pretrained.checkpoint = options.ckpt
    if options.elevation is not None:
        config.cameras.elevation = options.elevation
    if options.seed is not None:
        config.sampler.seed = options.seed
    if options.steps is not None:
        config.sampler.steps = options.steps
    check_config(config)
    return config


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    config = configure(options)
    from ouroboros3d.inference.results import Request, run  # takes seconds, which a wrong argument should not
    from ouroboros3d.pipeline import Ouroboros3DPipeline

    run(
        Request(
            images=options.input_img,
            output_dir=options.output_dir,
            device=options.device,
            dtype=options.dtype,
            remove_bg=not options.no_remove_bg,
            border=options.border,
            save_steps=options.save_steps,
        ),
        config,
        Ouroboros3DPipeline.from_config,
    )
