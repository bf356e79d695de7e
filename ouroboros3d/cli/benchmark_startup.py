"""Prints what starting costs: CPU seconds and peak memory of --help, of the import, of the first step of inference.

    OMP_NUM_THREADS=1 python scripts/benchmark_startup.py [--repeats 3]

Every row is a process of its own, its children included; of several repeats the least is printed. Needs Linux or macOS.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile

from ouroboros3d.cli.options import Parser
from ouroboros3d.files import ROOT

ROWS = {
    "`python inference.py --help`": ["inference.py", "--help"],
    "`python train.py --help`": ["train.py", "--help"],
    "`python scripts/evaluate.py --help`": ["scripts/evaluate.py", "--help"],
    "`import ouroboros3d`": ["-c", "import ouroboros3d"],
    "`import torch, transformers, diffusers`": ["-c", "import torch, transformers, diffusers"],
    "`ouroboros3d.Ouroboros3DPipeline`, on demand": ["-c", "import ouroboros3d as o; o.Ouroboros3DPipeline"],
    "the same, and `from_pretrained(\"checkpoints/small\")`": [
        "-c", "import ouroboros3d as o; o.Ouroboros3DPipeline.from_pretrained('checkpoints/small')",
    ],
    "`python inference.py`, one picture, one step, `--formats png`": [
        "inference.py", "--input_img", "testset/cup.webp", "--steps", "1", "--formats", "png", "--output_dir", "OUT",
    ],
}  # fmt: skip


def cost(arguments: list[str]) -> tuple[float, float]:
    """CPU seconds (user and system) and peak MiB of a Python process."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, *(word.replace("OUT", out) for word in arguments)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, **quiet)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"error: {' '.join(command)} ended with status {process.returncode}", file=sys.stderr)
        return math.nan, math.nan
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return used.ru_utime + used.ru_stime, used.ru_maxrss / unit


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each row (default: %(default)s)")
    repeats = parser.parse_args(arguments).repeats
    print("| | CPU seconds | peak MiB |\n|---|---|---|")
    for name, arguments in ROWS.items():
        seconds, memory = map(min, zip(*(cost(arguments) for _ in range(max(1, repeats))), strict=True))
        print(f"| {name} | {seconds:.2f} | {memory:.0f} |", flush=True)
