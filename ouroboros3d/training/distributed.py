"""Settings that accelerate's plugins (configs/accelerate/) need, and combinations that are refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from accelerate import Accelerator
from accelerate.utils import DistributedType

from ouroboros3d.config.schema import TrainConfig
from ouroboros3d.errors import ConfigError

PATIENCE = timedelta(hours=2)  # with another process, which may be exporting or writing pictures; NCCL's is 10 minutes


def set_up_plugins(accelerator: Accelerator, config: TrainConfig) -> bool:
    """Gives DeepSpeed the run's batch, accumulation and clipping; before `prepare`. Whether weights are sharded, so
    that no process has a whole model to validate or export. Raises ConfigError for what would go wrong later."""
    if config.optimizer == "muon" and accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        raise ConfigError("train.optimizer = 'muon': its updates need whole matrices, not shards; choose adamw_fused")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        stage = settings.get("zero_optimization", {}).get("stage", 0)
        if stage not in (0, 1, 2):
            raise ConfigError(f"DeepSpeed's zero_stage = {stage}: weights are not whole; use 2, or FSDP2")
        settings |= {
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation,
            "gradient_clipping": config.clip_norm,
        }
        return False
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ConfigError("fsdp_version = 1: optimiser and clipping expect 2, see configs/accelerate/fsdp2.yaml")
    if config.ema_decay:
        raise ConfigError(
            f"train.ema_decay = {config.ema_decay}: each FSDP2 process would keep and save its shard alone; "
            "set train.ema_decay=0, or use DDP or DeepSpeed"
        )
    if config.optimizer == "adamw_8bit":
        raise ConfigError("train.optimizer = 'adamw_8bit': bitsandbytes knows no sharded weights; choose adamw_fused")
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:  # accelerate's rounds what the model returns, the losses
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
    if accelerator.is_main_process:
        print("FSDP2: no validation or export during the run; scripts/export.py --trained makes one of a checkpoint")
    return True
