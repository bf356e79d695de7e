"""Scores a model on held-out orbits: the loop from one view, and the reconstructor alone on true views.

    python scripts/evaluate.py --list test.txt --objects 16 [--config configs/small.yaml] [key=value ...]

PSNR in dB, full pictures and foreground (alpha > 0.5), means over objects; novel views are all but the first. Beside
the model stands "repeat", which shows the input view for every other. --out writes the pictures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ouroboros3d.build import build_dataset, build_models
from ouroboros3d.config import load_config
from ouroboros3d.errors import UserError
from ouroboros3d.evaluation import Validation
from ouroboros3d.visualize import save_image

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "small.yaml"))
    parser.add_argument("--list", default="test.txt", help="in data.root (default: %(default)s)")
    parser.add_argument("--objects", type=int, default=16, help="spread evenly over the list (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder for pictures")
    options, overrides = parser.parse_known_args(arguments)
    config = load_config(options.config, [*overrides, "data.cache=none", f"data.val={options.list}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = build_models(config.model).to(device)
    dataset = build_dataset(config, "val")
    count = min(options.objects, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    totals: dict[str, float] = {}
    for start in tqdm(range(0, count, options.batch), unit="batch"):
        indices = chosen[start : start + options.batch]
        validation = Validation(models, config, [dataset[i] for i in indices], device, objects=len(indices))
        values, pictures = validation()
        for name, value in (values | validation.repeat_baseline()).items():
            totals[name] = totals.get(name, 0.0) + value * len(indices) / count
        for name, picture in pictures.items() if options.out else ():
            save_image(options.out / f"{start:04d}_{name}.png", picture)
    print(f"{count} of {len(dataset)} orbits in {options.list}")
    for name, value in totals.items():
        print(f"  {name:28} {value:6.2f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
