"""Doubles the side of LGM's grid of Gaussians with one more level; pictures hardly change at first.

    python scripts/grow_lgm.py runs/small/lgm/export/recon_model.safetensors \\
      --out runs/small/lgm_grown/start/recon_model.safetensors

The result fits `model.lgm` with the last entry of `up_channels` repeated (`splat_size` doubles) and
`colours: residual`: every Gaussian becomes four, smaller and more transparent, with the colour of its own pixel.
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import Parser


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", type=Path, help="LGM's weights, with at least two up levels")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".safetensors file for the grown weights"
    )
    options = parser.parse_args(arguments)
    from ouroboros3d.models.lgm_growth import read_grown
    from ouroboros3d.models.weights import write_state

    write_state(read_grown(options.weights), options.out)
    print(f"wrote {options.out}")
