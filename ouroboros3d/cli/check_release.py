"""Checks this code against the paper, for someone with the released weights and Google Scanned Objects.

    python scripts/render_eval.py --assets GSO_FOLDER --up z --objects 100 --out data/eval_gso
    python scripts/check_release.py --ckpt huanngzh/Ouroboros3D-SVD-LGM --orbits data/eval_gso --out runs/release

1. Loads the weights strictly (a hub id, a folder or the Lightning file; SVD's VAE and image encoder come from the hub,
   or from model.pretrained.svd=FOLDER).
2. Makes one object and checks that its renders show something.
3. Scores the list and prints the paper's table (Ouroboros3D at 512 pixels) beside it. `agrees` means that the paper's
   number lies in the 95 % interval over objects, widened by a tolerance, because the paper does not name its 100
   objects, its renders or its views.

Not run with the released weights: they were unavailable.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import as_override, load_config
from ouroboros3d.errors import UserError
from ouroboros3d.files import check_writable_dir, write_json

if TYPE_CHECKING:
    from ouroboros3d.evaluation.bootstrap import Interval

HUB_ID = "huanngzh/Ouroboros3D-SVD-LGM"
PAPER = {  # of the views and of the rendered 3D, 100 objects (Sec. 4)
    "views_all": {"psnr": 21.770, "ssim": 0.8866, "lpips": 0.1093},
    "render_all": {"psnr": 21.761, "ssim": 0.8894, "lpips": 0.1091},
}
TOLERANCE = {"psnr": 0.5, "ssim": 0.01, "lpips": 0.01}  # for what the paper leaves open: objects, renders, views
COVERED = 0.02  # share of the pictures that an object must cover at least


@dataclass(frozen=True)
class Line:
    """One number of the paper and ours."""

    name: str
    paper: float
    here: float | None  # None: it could not be computed
    agrees: bool

    def __str__(self) -> str:
        here = "absent" if self.here is None else f"{self.here:.4f}"
        return f"{self.name:18} paper {self.paper:8.4f}   here {here:>8}   {'agrees' if self.agrees else 'DIFFERS'}"


def main(arguments: list[str]) -> int:
    parser = ConfigParser(__doc__, "configs/baseline.yaml")
    parser.add_checkpoint(HUB_ID, own_config=False)
    parser.add_argument("--orbits", required=True, metavar="FOLDER", help="output folder of scripts/render_eval.py")
    parser.add_argument("--list", default="test.txt", help="list of ids in the --orbits folder (default: %(default)s)")
    parser.add_argument(
        "--objects", type=int, default=0, help="number of objects, spread evenly over the list (default: all)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/release"), help="folder for the results (default: %(default)s)"
    )
    parser.add_device()
    options = parser.parse_args(arguments)
    paths = [as_override("data.root", options.orbits), as_override("data.val", options.list)]
    config = load_config(options.config, [*paths, *options.overrides])
    if not os.path.isfile(os.path.join(options.orbits, options.list)):
        raise UserError(f"{options.orbits}: has no {options.list}; make the orbits with scripts/render_eval.py")
    check_writable_dir(options.out)
    say_loading()
    from ouroboros3d.data.splits import build_dataset
    from ouroboros3d.evaluation.evaluator import Options, evaluate
    from ouroboros3d.evaluation.score_tables import summarise
    from ouroboros3d.pipeline import Ouroboros3DPipeline

    pipeline = Ouroboros3DPipeline.from_config(config, options.device, options.dtype)
    counts = [len(network.state_dict()) for network in (pipeline.models.unet, pipeline.models.lgm)]
    print(f"1. weights: all {counts[0]} tensors of the diffusion model and {counts[1]} of the reconstructor fit")

    quiet = replace(config, data=replace(config.data, cache="none"))
    picture = build_dataset(quiet, "val")[0]["images"][0]
    made = pipeline(picture, seed=42)
    made[0].save(options.out / "object.ply")
    covered = (made[0].renders < 0.98).any(1).float().mean().item()
    whole = covered >= COVERED
    print(f"2. one object: covers {covered:.1%} of its pictures, {'fine' if whole else 'NOTHING TO SEE'}")

    scoring = Options(objects=options.objects, baselines=False, out=options.out)
    rows, notes = evaluate(pipeline.models, config, pipeline.device, scoring)
    lines = compare_to_paper(summarise(rows))
    print(f"3. the paper's table, {len(rows)} objects\n", *lines, *notes, sep="\n")
    report = {"tensors": counts, "covered": covered, "table": [vars(line) for line in lines], "notes": notes}
    write_json(options.out / "release.json", report)
    return 0 if whole and all(line.agrees for line in lines) else 1


def compare_to_paper(summary: dict[str, Interval]) -> list[Line]:
    """Every number of the paper's table beside the scores' means."""
    lines = []
    for kind, metrics in PAPER.items():
        for metric, paper in metrics.items():
            name, here = f"{kind.removesuffix('_all')} {metric}", summary.get(f"{kind}_{metric}")
            if here is None:
                lines.append(Line(name, paper, None, False))
                continue
            low, high = (here.low, here.high) if here.count > 1 else (here.mean, here.mean)
            agrees = low - TOLERANCE[metric] <= paper <= high + TOLERANCE[metric]
            lines.append(Line(name, paper, here.mean, agrees))
    return lines
