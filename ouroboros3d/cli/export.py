"""Writes a model in the layout of diffusers or of the release (two files).

    python scripts/export.py --config configs/small.yaml --out outputs/small
    python scripts/export.py --config configs/baseline.yaml --ckpt runs/x/export --out x --dtype fp16
    python scripts/export.py --config runs/x/config.yaml --out x \\
      --trained runs/x/checkpoints/step_00001000/pytorch_model_fsdp.bin

diffusers loads the result with `UNetSpatioTemporalConditionModel.from_pretrained("x", subfolder="unet")`, likewise vae,
image_encoder and scheduler; this code with `model.pretrained.checkpoint=x`. Adapters and ray encoders are in
conditioning/, LGM in lgm/. --trained takes the networks from a training checkpoint (folder or file, of DDP, DeepSpeed,
FSDP2 or Lightning), but not its EMA weights.
"""

from __future__ import annotations

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import load_config
from ouroboros3d.devices import inference_dtype
from ouroboros3d.files import check_writable_dir


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__)
    parser.add_checkpoint()
    add = parser.add_argument
    add("--out", metavar="FOLDER", required=True, help="output folder")
    add("--layout", choices=("diffusers", "release"), default="diffusers", help="(default: %(default)s)")
    add("--trained", metavar="PATH", help="training checkpoint: its folder or its file of weights")
    parser.add_dtype("of the files (default: %(default)s)", "float32")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    check_writable_dir(options.out)
    say_loading()
    import torch

    from ouroboros3d.build import build_models, save_models
    from ouroboros3d.models.weights import load_trained

    models = build_models(config.model)
    if options.trained is not None:
        load_trained(options.trained, models)
    own_parts = config.model.pretrained.svd is None
    save_models(
        options.out, models, config, options.layout, own_parts, inference_dtype(options.dtype, torch.device("cpu"))
    )
    print(f"wrote {options.out}")
