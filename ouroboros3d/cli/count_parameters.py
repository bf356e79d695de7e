"""Prints the parameters of every part of a configured model, in millions; builds them without memory.

python scripts/count_parameters.py configs/small.yaml configs/baseline.yaml
"""

from __future__ import annotations

import argparse

import torch

from ouroboros3d.config.loading import load_config
from ouroboros3d.config.schema import PretrainedConfig


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=["configs/small.yaml"], help="YAML files (default: %(default)s)")
    options = parser.parse_args(arguments)
    from ouroboros3d.build import build_models  # takes seconds, which --help should not

    for path in options.configs:
        config = load_config(path).model
        config.pretrained = PretrainedConfig()
        with torch.device("meta"):
            models = build_models(config)
        parts = {
            "diffusion U-Net": models.unet.unet,
            "feedback adapters": models.unet.cond_encoder,
            "ray encoders": torch.nn.ModuleList(
                [*models.unet.down_plucker, models.unet.mid_plucker, *models.unet.up_plucker]
            ),
            "reconstructor (LGM)": models.lgm,
            "VAE": models.svd.vae,
            "image encoder": models.svd.image_encoder,
        }
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        print(path)
        for name, count in (counts | {"all": sum(counts.values())}).items():
            print(f"  {name:22} {count / 1e6:10.2f} M")
