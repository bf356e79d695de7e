"""A configuration whose networks have a few thousand parameters, for tests of whole programs."""

from __future__ import annotations

import copy
from typing import Any

CROSS, PLAIN = "CrossAttn{}BlockSpatioTemporal", "{}BlockSpatioTemporal"
TINY = {
    "model": {
        "image_size": 32,
        "multiview": {
            "unet": {
                "sample_size": 8,
                "down_block_types": [CROSS.format("Down"), PLAIN.format("Down")],
                "up_block_types": [PLAIN.format("Up"), CROSS.format("Up")],
                "block_out_channels": [32, 32],
                "num_attention_heads": [2, 2],
                "layers_per_block": 1,
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 24,
                "cross_attention_dim": 16,
            },
            "adapter": {"res_blocks": 1, "downscale": 4},
        },
        "vae": {"block_out_channels": [32, 32, 32], "layers_per_block": 1, "scaling_factor": 0.5},
        "image_encoder": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 16,
        },
        "lgm": {
            "input_size": 32,
            "splat_size": 16,
            "down_channels": [32, 32],
            "down_attention": [False, True],
            "up_channels": [32],
            "up_attention": [False],
            "layers_per_block": 1,
            "heads": 2,
            "time_channels": 8,
            "time_embed_dim": 16,
        },
    },
    "sampler": {"steps": 2},
    "turntable": {"size": 16, "step": 90},
    "data": {"workers": 0},
}


def tiny(**model: Any) -> dict[str, Any]:
    """A copy to change, with `model` merged into its model."""
    values = copy.deepcopy(TINY)
    values["model"] |= model
    return values
