"""The accelerate configs are valid, and what plugins cannot do is refused. No trainer under DeepSpeed or FSDP2 here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers.models.adapter
import diffusers.models.resnet
import diffusers.models.transformers.transformer_temporal
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from ouroboros3d.config.schema import TrainConfig
from ouroboros3d.errors import ConfigError
from ouroboros3d.models import lgm_unet
from ouroboros3d.training.distributed import set_up_plugins

CONFIGS = Path(__file__).parents[1] / "configs" / "accelerate"


def accelerator(kind: DistributedType, zero_stage: int = 2, fsdp2: bool = True) -> SimpleNamespace:
    """What `set_up_plugins` looks at."""
    settings = {"zero_optimization": {"stage": zero_stage}, "train_micro_batch_size_per_gpu": "auto"}
    plugins = {"deepspeed_plugin": SimpleNamespace(deepspeed_config=settings)}
    state = SimpleNamespace(**plugins, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    return SimpleNamespace(distributed_type=kind, state=state, is_fsdp2=fsdp2, is_main_process=True)


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("deepspeed_zero2", "DEEPSPEED"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_configs(name, kind):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == kind and config.num_processes == 8
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_the_classes_that_fsdp2_wraps_are_there():
    names = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    homes = (
        diffusers.models.adapter,
        diffusers.models.resnet,
        diffusers.models.transformers.transformer_temporal,
        lgm_unet,
    )
    for name in names.split(","):
        assert any(hasattr(home, name) for home in homes), name


@pytest.mark.slow
def test_sharded_over_two_processes_the_objective_has_the_same_loss_and_gradients():
    """torch's FSDP2 on CPUs, the blocks being those of the config; the trainer around it needs GPUs."""
    root = CONFIGS.parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    wrapped = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(root / "tests" / "fsdp2_objective.py"), wrapped]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    numbers = next(line for line in result.stdout.splitlines() if line.startswith("RESULT")).split()[1:]
    whole, sharded, difference = map(float, numbers)
    assert sharded == pytest.approx(whole, rel=1e-5) and difference < 1e-4


def test_deepspeed_is_told_the_runs_batch():
    given = accelerator(DistributedType.DEEPSPEED)
    config = TrainConfig(batch_size=3, gradient_accumulation=2, clip_norm=0.5)
    assert set_up_plugins(given, config) is False
    settings = given.state.deepspeed_plugin.deepspeed_config
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 2 and settings["gradient_clipping"] == 0.5


def test_fsdp2_says_what_it_leaves_out(capsys):
    assert set_up_plugins(accelerator(DistributedType.FSDP), TrainConfig()) is True
    assert "no validation or export" in capsys.readouterr().out
    assert set_up_plugins(accelerator(DistributedType.MULTI_GPU), TrainConfig(ema_decay=0.9)) is False


def test_fsdp2_leaves_losses_in_float32():
    given = accelerator(DistributedType.FSDP)
    plugin = given.state.fsdp_plugin
    plugin.set_mixed_precision("bf16")
    computed = plugin.mixed_precision_policy.param_dtype
    set_up_plugins(given, TrainConfig(mixed_precision="bf16"))
    assert plugin.mixed_precision_policy.output_dtype is None
    assert plugin.mixed_precision_policy.param_dtype == computed == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "config", "words"),
    [
        (accelerator(DistributedType.DEEPSPEED, zero_stage=3), TrainConfig(), "zero_stage = 3"),
        (accelerator(DistributedType.FSDP, fsdp2=False), TrainConfig(), "fsdp_version = 1"),
        (accelerator(DistributedType.FSDP), TrainConfig(ema_decay=0.9), "train.ema_decay = 0.9"),
        (accelerator(DistributedType.FSDP), TrainConfig(optimizer="adamw_8bit"), "train.optimizer = 'adamw_8bit'"),
        (accelerator(DistributedType.FSDP), TrainConfig(optimizer="muon"), "train.optimizer = 'muon'"),
        (accelerator(DistributedType.DEEPSPEED), TrainConfig(optimizer="muon"), "train.optimizer = 'muon'"),
    ],
)
def test_what_does_not_go_together_is_refused(given, config, words):
    with pytest.raises(ConfigError, match=words):
        set_up_plugins(given, config)
