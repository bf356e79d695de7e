"""Makes the pictures of the model's results on testset/, for README and docs.

    python scripts/make_gallery.py [--out docs/images] [key=value ...]

Writes testset.png, with one row per image: the input, four of the generated views and three renders of the Gaussians;
and steps.png, the recursion on one of the images.
"""

from __future__ import annotations

from pathlib import Path

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("armchair", "car", "child_chair", "cup", "lamp", "plant", "sofa", "tricycle")
STEPS_OF = "sofa"
TURN = 30  # degrees between turntable cameras; every fourth is shown


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__)
    looks = "degrees the camera looks down; testset/ has 8 to 20 (default: %(default)s)"
    parser.add_argument("--elevation", dest="cameras.elevation", type=float, default=12.0, metavar="ANGLE", help=looks)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder (default: docs/images)")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    say_loading()
    from ouroboros3d.inference.photo import load_condition_image
    from ouroboros3d.pipeline import Ouroboros3DPipeline
    from ouroboros3d.sampler import last_step
    from ouroboros3d.visualize import StepImages, labelled_grid, save_image, steps_picture, turntable_cameras

    pipeline = Ouroboros3DPipeline.from_config(config)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in IMAGES:
        picture = load_condition_image(ROOT / "testset" / f"{name}.webp", config.model.image_size)
        history = []
        step = last_step(
            pipeline.steps(picture.tensor[None], [config.sampler.seed]),
            lambda s, h=history: h.append(StepImages(s.index, s.sigma, s.pictures(0)).small()),
        )
        cameras = turntable_cameras(TURN, config.turntable.radius, config.turntable.fov, tilt=config.cameras.elevation)
        turned = pipeline.sampler.renderer(step.gaussians, cameras.views([1, 5, 9]), config.turntable.size).rgb[0]
        views = step.pictures(0)["views"][1::2]
        rows.append((name, [picture.tensor * 0.5 + 0.5, *views, *turned.clamp(0, 1)]))
        if name == STEPS_OF:
            save_image(options.out / "steps.png", steps_picture(history, views=(0, 2, 4)))
        print(name, pipeline.sampler.clock.summary())
    columns = ["input", *[f"view {v}" for v in range(1, 8, 2)], *[f"3D, {TURN * i} degrees" for i in (1, 5, 9)]]
    save_image(options.out / "testset.png", labelled_grid(rows, columns, cell=112))
    print(f"wrote {options.out / 'testset.png'} and steps.png")
