"""Prints the memory that a process needs for training with DDP, DeepSpeed ZeRO-2 and FSDP2, as a Markdown table.

    python scripts/memory_table.py --config configs/mv/svd_lgm_rgb_ccm_lvis.yaml --processes 8
    python scripts/memory_table.py --inference    # memory of the loop, per option
    python scripts/memory_table.py --measure      # on a GPU: a real joint step next to its estimate

Nothing is allocated: one joint step of the whole model is traced on tensors without values. docs/training.md says how
each column is counted.
"""

from __future__ import annotations

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import load_config


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__, "configs/mv/svd_lgm_rgb_ccm_lvis.yaml")
    parser.add_argument("--processes", type=int, default=8, help="number of processes (default: %(default)s)")
    parser.add_argument("--inference", action="store_true", help="memory of the inference loop instead of training")
    parser.add_argument(
        "--measure", action="store_true", help="run a real step on the GPU and compare it with the estimate"
    )
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    say_loading()
    from ouroboros3d.training.memory_tables import inference_table, measure, table

    if options.inference:
        print(inference_table(config))
    elif options.measure:
        measure(config)
    else:
        print(table(config, options.processes))
