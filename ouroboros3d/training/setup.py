"""From built networks to an objective: which parts are trained, compiled, checkpointed."""

from __future__ import annotations

import torch

from ouroboros3d.build import Models, build_renderer
from ouroboros3d.config.schema import Config
from ouroboros3d.models.lpips import make_lpips
from ouroboros3d.models.one_key import freeze_unread
from ouroboros3d.objective import Objective


def prepare_training(models: Models, config: Config) -> None:
    """Leaves gradients to the parts that `objective` trains; gradient checkpointing if configured."""
    for name, part in models.parts.items():
        part.requires_grad_(name in config.objective.trained)
    if config.train.freeze_unread:
        freeze_unread(models.unet.unet)
    for network in (models.unet, models.lgm):
        network.train(any(p.requires_grad for p in network.parameters()))
    if config.train.gradient_checkpointing:
        models.unet.unet.enable_gradient_checkpointing()
        models.lgm.enable_gradient_checkpointing()


def build_objective(models: Models, config: Config) -> Objective:
    """The joint objective of the parts that are trained; the others are frozen. Raises ConfigError without LPIPS."""
    prepare_training(models, config)
    lpips = make_lpips(config.objective.lpips_network) if config.objective.uses_lpips else None
    return Objective(models.unet, models.svd, models.lgm, build_renderer(config), config, lpips)


def compile_networks(objective: Objective, accumulation: int, backend: str = "inductor") -> None:
    """torch.compile of what is trained, in place: names in checkpoints and exports stay as they are. Every batch must
    have the same shapes, as it does. On CUDA inductor records CUDA graphs, but not with accumulation of gradients:
    those of one batch would lie where the graphs of the next write."""
    mode = {"mode": "reduce-overhead"} if backend == "inductor" and accumulation == 1 else {}
    for network in objective.trained.values():
        network.compile(backend=backend, dynamic=False, **mode)
    if mode:  # both passes of a step belong together; the next step may reuse their memory
        objective.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
