"""Trains Ouroboros3D on orbits of objects.

    python train.py --config configs/small/joint.yaml [key=value ...]
    torchrun --nproc_per_node=8 train.py --config configs/mv/svd_lgm_rgb_ccm_lvis.yaml
    python train.py --config configs/small/joint.yaml --dry_run

Writes checkpoints/, validation/, metrics.jsonl, export/ and best/ (weights for inference.py) to `train.output_dir`.
The same command resumes. docs/training.md has launchers, memory and every switch.
"""

from __future__ import annotations

import os

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import check_lists, load_config
from ouroboros3d.config.schema import Config
from ouroboros3d.errors import TrainingError, UserError
from ouroboros3d.files import check_writable_dir


def main(arguments: list[str]) -> int:
    parser = ConfigParser(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cpu or cuda (default: cuda if available)")
    parser.add_argument("--dry_run", action="store_true", help="print the plan of the run; train and write nothing")
    resume = (
        "auto: continue from the newest checkpoint in train.output_dir; never: start over; a folder: continue from "
        "that checkpoint (default: the config's, auto)"
    )
    parser.add_argument("--resume", dest="train.resume", metavar="auto|never|FOLDER", help=resume)
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    if not options.dry_run:
        check_writable_dir(config.train.output_dir)
        check_lists(config, config.data.train, config.data.val)
    say_loading()
    if options.dry_run:
        plan(config, options.device)
        return 0
    return train(config, options.device)


def plan(config: Config, device_name: str | None = None) -> None:
    """Prints what a run would do. Raises UserError if it would not start."""
    from ouroboros3d.training.dry_run import describe

    text, problems = describe(config, device_name)
    print(text)
    if problems:
        raise UserError(f"this run would not start: {'; '.join(problems)}")


def train(config: Config, device_name: str | None = None) -> int:
    """Trains to the end and says where the weights are and how to use them. Returns 0, or 130 and 143 after a Ctrl-C
    or SIGTERM, for scripts of several stages to stop too. Raises UserError."""
    import torch
    from accelerate.utils import set_seed

    from ouroboros3d.build import build_models, check_renderer
    from ouroboros3d.data.splits import build_dataset, check_split, worker_bytes
    from ouroboros3d.devices import check_shared_memory, pick_device
    from ouroboros3d.evaluation.validation import Validation
    from ouroboros3d.models.weights import save_checkpoint
    from ouroboros3d.training.setup import build_objective, compile_networks
    from ouroboros3d.training.trainer import Trainer

    set_seed(config.train.seed)  # of Python, numpy and torch, all of which checkpoints hold
    device = pick_device(device_name)
    check_renderer(config, device)  # compiles at the first use: before anything waits
    check_shared_memory(worker_bytes(config) * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    dataset, held_out = build_dataset(config, "train"), build_dataset(config, "val")
    check_split(dataset, held_out, config)
    models = build_models(config.model)
    objective = build_objective(models, config)
    if config.train.compile:
        compile_networks(objective, config.train.gradient_accumulation)
    own_parts = config.model.pretrained.svd is None  # a small model's VAE and encoder travel with it
    try:
        trainer = Trainer(
            objective,
            dataset,
            config.train,
            validate=Validation(models, config, held_out),
            export=lambda folder: save_checkpoint(folder, models, dtype=torch.float16, frozen=own_parts),
            cpu=device.type == "cpu",
            settings=config,
            workers=config.data.workers,
        )
        models.to(trainer.accelerator.device)
        trainer.run()
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU's memory is too small: lower train.batch_size (and raise train.gradient_accumulation), set "
            "train.gradient_checkpointing=true, or launch with configs/accelerate/deepspeed_zero2.yaml; --dry_run says "
            "what fits"
        ) from error
    if trainer.accelerator.is_main_process and (trainer.folder / "export").is_dir():
        print(f"weights: {trainer.folder / 'export'}; try them with")
        print(f"  python inference.py --ckpt {trainer.folder} --input_img FILE")
    return 0 if trainer.stopped_by is None else 128 + trainer.stopped_by
