"""Writes a model as a folder that diffusers and transformers read part by part, and this code as a checkpoint.

    python scripts/export_diffusers.py --config configs/small.yaml --out outputs/small
    python scripts/export_diffusers.py --config configs/baseline.yaml --ckpt runs/x/export --out x --dtype float16

`UNetSpatioTemporalConditionModel.from_pretrained("x", subfolder="unet")`, likewise vae, image_encoder and
scheduler; `model.pretrained.checkpoint=x` here. Adapters and ray encoders are in conditioning/, LGM in lgm/.
"""

from __future__ import annotations

import argparse
import sys

import torch

from ouroboros3d.build import build_models
from ouroboros3d.checkpoint import save_diffusers
from ouroboros3d.config import load_config
from ouroboros3d.diffusion import euler_schedule
from ouroboros3d.errors import UserError
from ouroboros3d.files import check_writable_dir


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/small.yaml", help="(default: %(default)s)")
    parser.add_argument("--ckpt", metavar="FOLDER", help="weights (default: the config's)")
    parser.add_argument("--out", metavar="FOLDER", required=True)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    options, overrides = parser.parse_known_args(arguments)
    if options.ckpt is not None:
        overrides.append(f"model.pretrained.checkpoint={options.ckpt}")
    config = load_config(options.config, overrides)
    check_writable_dir(options.out)
    models = build_models(config.model)
    scheduler = euler_schedule(config.sampler.scheduler, config.sampler.steps)
    save_diffusers(options.out, models, scheduler, getattr(torch, options.dtype))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
