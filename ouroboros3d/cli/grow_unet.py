"""Adds a layer to every block of the multi-view U-Net; what it computes stays the same at first.

    python scripts/grow_unet.py checkpoints/small/mv_model_unet.safetensors --out runs/grown/mv_model_unet.safetensors

The result fits `model.multiview.unet.layers_per_block` + 1. All blocks must have the same number of channels.
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import Parser


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", type=Path, help="the U-Net's weights (mv_model_unet)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".safetensors file for the grown weights"
    )
    options = parser.parse_args(arguments)
    from ouroboros3d.models.unet_growth import read_deepened
    from ouroboros3d.models.weights import write_state

    write_state(read_deepened(options.weights), options.out)
    print(f"wrote {options.out}")
