"""Run by test_distributed.py under torchrun: the objective sharded as configs/accelerate/fsdp2.yaml says, and whole.

Prints both losses and the largest difference of a gradient, over the largest gradient.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from conftest import LEAN, SMALL
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ouroboros3d.build import build_models
from ouroboros3d.config.loading import config_from_dict
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.objective import Objective
from ouroboros3d.training.dry_run import _flat_renderer, blank_batch
from ouroboros3d.training.setup import prepare_training


def make(config: Config) -> Objective:
    torch.manual_seed(0)
    models = build_models(config.model)
    prepare_training(models, config)
    return Objective(models.unet, models.svd, models.lgm, _flat_renderer, config)


def step(objective: Objective, batch: OrbitBatch) -> float:
    """Two passes of the U-Net, losses of both: every block is gathered twice before its gradients are reduced."""
    draws = replace(objective.draw(0, 5, [3], batch), feedback=torch.tensor(1.0))
    loss = objective(batch, draws)["total"]
    loss.backward()
    return loss.item()


def main(wrapped: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    changes = {
        "train": {"batch_size": 1, "gradient_checkpointing": True},
        "objective": {"second_loss": "add", "decode_gradient": True},
    }
    config = config_from_dict(OmegaConf.to_container(OmegaConf.merge(SMALL, LEAN, changes)))
    batch = blank_batch(config)
    images = torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = replace(batch, images=images)
    whole, sharded = make(config), make(config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in reversed(list(sharded.modules())):
        if type(module).__name__ in wrapped:
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = step(whole, batch), step(sharded, batch)
    pairs = [(a.grad, b.grad.full_tensor()) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True)]
    largest = max(a.abs().max() for a, _ in pairs)
    difference = max((a - b).abs().max() for a, b in pairs) / largest
    if dist.get_rank() == 0:
        print("RESULT", *losses, difference.item())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1].split(","))
