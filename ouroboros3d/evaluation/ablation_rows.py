"""The rows of the paper's ablation tables, and three controls of ours. Needs nothing heavy: --help names them."""

from __future__ import annotations

from dataclasses import dataclass

PAPER_STEPS = 25  # of the sampler, which the schedule table counts in


@dataclass(frozen=True)
class Row:
    """A line of a table. `paper` is the rendered 3D's PSNR, SSIM, LPIPS and its distance from the views, on GSO."""

    title: str
    paper: tuple[float, ...] = ()
    weights: str | None = None  # the row whose training it samples from; None: its own


ROWS = {
    "separate": Row("separate training", (20.012, 0.8465, 0.1287, 1.067, 0.0125, 0.0189)),
    "joint": Row("joint", (20.549, 0.8651, 0.1183, 0.511, 0.0094, 0.0070)),
    "ccm": Row("joint + ccm", (21.325, 0.8937, 0.1092, 0.304, 0.0036, 0.0018)),
    "rgb": Row("joint + rgb", (21.542, 0.8871, 0.1103, 0.100, 0.0101, 0.0036)),
    "full": Row("joint + ccm + rgb", (21.761, 0.9094, 0.0991, 0.009, 0.0028, 0.0002)),
    "from_10": Row("feedback from step 10 of 25 on", (21.633,), weights="full"),
    "from_20": Row("feedback from step 20 of 25 on", (20.805,), weights="full"),
    "zero": Row("no feedback in sampling", weights="full"),
    "shuffled": Row("another object's feedback", weights="full"),
    "truth": Row("the true views' feedback", weights="full"),
}
TABLES = {
    "feedback": ("Feedback", ["separate", "joint", "ccm", "rgb", "full"]),
    "schedule": ("Feedback schedule", ["full", "from_10", "from_20"]),
    "controls": ("Controls (not in the paper)", ["full", "zero", "shuffled", "truth"]),
}
