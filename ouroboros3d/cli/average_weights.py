"""Writes the mean of the weights of one network before and after a training, or of several trainings from one start.

    python scripts/average_weights.py checkpoints/small/mv_model_unet.safetensors \
      runs/small/feedback/export/mv_model_unet.safetensors --out runs/mean/mv_model_unet.safetensors

Of weights with one origin the mean may be better or worse than each: score it by scripts/evaluate.py before you keep it
(docs/results.md has a case of both).
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import Parser


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("weights", type=Path, nargs="+", metavar="FILE", help="two or more files of one network")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".safetensors file for the mean")
    options = parser.parse_args(arguments)
    if len(options.weights) < 2:
        parser.error(f"{options.weights[0]} alone has no mean; name two or more files of one network")
    from ouroboros3d.models.weight_average import read_mean
    from ouroboros3d.models.weights import write_state

    write_state(read_mean(options.weights), options.out)
    print(f"wrote {options.out}")
