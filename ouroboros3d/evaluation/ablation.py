"""Trains and evaluates the rows of an ablation, and makes its tables and pictures (the command: scripts/ablate.py)."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf
from PIL import Image

from ouroboros3d.config.loading import as_override, flatten_keys, load_config, parse_duration
from ouroboros3d.errors import ConfigError, UserError
from ouroboros3d.evaluation.ablation_rows import PAPER_STEPS, ROWS, TABLES
from ouroboros3d.evaluation.bootstrap import Interval
from ouroboros3d.evaluation.evaluator import make_batches
from ouroboros3d.evaluation.result_folder import PICTURES, extreme_rows, picture_path
from ouroboros3d.evaluation.score_tables import Row as Score
from ouroboros3d.evaluation.score_tables import align, check_settings, compare, key, read_rows, summarise
from ouroboros3d.files import PACKAGE, atomic_path, check_writable_dir, locate, write_csv, write_json, write_whole
from ouroboros3d.models.weights import find_weights
from ouroboros3d.visualize import save_image, stack_with_headings, table_row

METRICS = (("psnr", "PSNR", 3), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4), ("gradient_distance", "gradient d.", 4))
PAPER_COLUMNS = ("PSNR", "SSIM", "LPIPS", "d PSNR", "d SSIM", "d LPIPS")


Run = Callable[[str, list[str]], None]  # (command, arguments); raises UserError if it does not end well


def launcher(prefix: str) -> Run:
    """Runs a command of this package as a process: `prefix` (python without one) -m ouroboros3d command arguments."""
    start = shlex.split(prefix) or [sys.executable]
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))

    def run(name: str, arguments: list[str]) -> None:
        command = [*start, "-m", "ouroboros3d", name, *arguments]
        print(f"\n$ {shlex.join(command)}", flush=True)
        stopped: list[int] = []
        process: subprocess.Popen | None = None

        def stop(number: int, _frame: object) -> None:
            """The training saves and ends; Ctrl-C reaches it by itself."""
            stopped.append(number)
            if number == signal.SIGTERM and process is not None:
                process.send_signal(number)

        previous = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
            status = process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if stopped:
            raise UserError(f"stopped by {signal.Signals(stopped[0]).name}; the same command goes on from here")
        if status:
            raise UserError(
                f"{name} ended with status {status}: remove the cause named above and repeat the command, which "
                "continues; with other settings choose another --out"
            )

    return run


class Ablation:
    """One base, budget and start; rows, seeds and objects can be added later."""

    def __init__(self, options: argparse.Namespace, run: Run) -> None:
        self.options, self.overrides, self.run = options, options.overrides, run
        self.device = ["--device", options.device] if options.device else []
        self.out: Path = options.out
        self.steps = load_config(options.base, self.overrides).sampler.taken_steps
        check_writable_dir(self.out)
        settings = {
            "base": str(locate(options.base).resolve()),
            "overrides": self.overrides,
            "steps": options.steps,
            "budget": options.budget,
            "start": str(options.start) if options.start else None,
            "list": options.list,
            "dtype": options.dtype,
        }
        results = ("*/train_*/checkpoints/step_*", "*/scores_*/objects.csv")
        check_settings(self.out, settings, occupied=any(found for kind in results for found in self.out.glob(kind)))

    def config_file(self, name: str) -> Path:
        """The base with a row's changes, as a file that train.py and evaluate.py take."""
        layer = OmegaConf.load(locate(f"configs/ablations/{name}.yaml"))
        own = flatten_keys(OmegaConf.to_container(layer))
        for text in self.overrides:
            if (changed := text.partition("=")[0]) in own:
                raise ConfigError(
                    f"{text}: the row {name} is {changed} = {own[changed]!r}; leave out the one or the other"
                )
        step = OmegaConf.select(layer, "sampler.feedback_from")
        if step:
            # At the latest from the last step on: fewer steps than the paper's round up.
            layer.sampler.feedback_from = min(round(step * self.steps / PAPER_STEPS), max(self.steps - 1, 1))
        if self.options.start:
            layer = OmegaConf.merge(layer, {"model": {"pretrained": weights_from(self.options.start.resolve())}})
        path = check_writable_dir(self.out / name) / "row.yaml"
        base = {"base": str(locate(self.options.base).resolve())}
        write_whole(path, OmegaConf.to_yaml(OmegaConf.merge(base, layer)))
        make_batches(load_config(path, self.overrides), [0, 1], 1)  # what cannot be combined shows before any training
        return path

    def make(self, name: str, seed: int) -> list[Score]:
        """The scores of a row for one training seed, trained and evaluated as far as they are not yet."""
        folder = self.out / name / f"scores_{seed}"
        if not self.options.report:
            self._score(name, seed, folder)
        return [row for row in read_rows(folder / "objects.csv") if row["seed"] in self.options.seeds]

    def _score(self, name: str, seed: int, folder: Path) -> None:
        options, weights = self.options, ROWS[name].weights or name
        training = self.out / weights / f"train_{seed}"
        if not finished(training, options.steps, options.budget):
            self._train(weights, seed, training)
        arguments = ["--config", str(self.config_file(name)), "--list", options.list, "--out", str(folder)]
        arguments += ["--seeds", *map(str, options.seeds), "--objects", str(options.objects), "--no_baselines"]
        arguments += ["--batch", str(options.batch), "--dtype", options.dtype]
        trained = weights_from(training / "export").items()
        arguments += [*self.overrides, *(as_override(f"model.pretrained.{k}", v) for k, v in trained)]
        self.run("evaluate", [*arguments, *self.device])

    def _train(self, name: str, seed: int, folder: Path) -> None:
        options = self.options
        # The evaluation that follows is what scores; validation on the way would only cost time.
        changes = [as_override("train.output_dir", folder), f"train.seed={seed}", f"train.validate_every={10**9}"]
        if options.steps:
            changes += [f"train.steps={options.steps}", "train.time_budget=''"]
        else:
            changes += [f"train.steps={10**9}", f"train.time_budget={options.budget}"]
        self.run("train", ["--config", str(self.config_file(name)), *self.overrides, *changes, *self.device])
        if not finished(folder, options.steps, options.budget):
            raise UserError(f"{folder}: the training stopped before its end; the same command goes on from here")


def weights_from(folder: Path) -> dict[str, str | None]:
    """`model.pretrained` that takes every part a checkpoint folder has from there, whatever the base names."""
    own = [part for part in ("vae", "image_encoder") if find_weights(folder, part)]
    return {"checkpoint": str(folder), **dict.fromkeys([*own, "lgm", "unet"])}


def finished(folder: Path, steps: int | None, budget: str | None) -> bool:
    """Whether a training folder's newest checkpoint has used up its steps or its time, and weights are exported."""
    states = sorted((folder / "checkpoints").glob("step_*/trainer.json"))
    if not states or not (folder / "export").is_dir():
        return False
    state = json.loads(states[-1].read_text())
    return state["step"] >= steps if steps else state["seconds"] > parse_duration(budget or "")


@dataclass(frozen=True)
class Result:
    """A row's scores, of all its training seeds together."""

    scores: dict[str, Interval]
    minus_full: dict[str, Interval]  # paired by object; empty for `full` itself
    by_train_seed: dict[int, dict[str, float]]  # means over objects


def results(scores: dict[str, dict[int, list[Score]]]) -> dict[str, Result]:
    """Of the rows' scores by training seed."""
    made = {}
    full = [row for rows in scores.get("full", {}).values() for row in rows]
    for name, by_seed in scores.items():
        rows = [row for rows in by_seed.values() for row in rows]
        difference = compare(rows, full) if full and name != "full" else {}
        means = {seed: {c: v.mean for c, v in summarise(part).items()} for seed, part in by_seed.items()}
        made[name] = Result(summarise(rows), difference, means)
    return made


def table_lines(names: list[str], made: dict[str, Result]) -> list[list[str]]:
    """Heading and rows: ours (the rendered 3D at novel cameras, |views - 3D|, the difference from full), then the
    paper's."""
    have = [m for m in METRICS if any(f"render_novel_{m[0]}" in made[name].scores for name in names)]
    lines = [["row", *(h for _, h, _ in have), *(f"d {h}" for _, h, _ in have), "PSNR - full's [95 %]"]]
    lines[0] += [f"paper: {column}" for column in PAPER_COLUMNS]
    for name in names:
        scores, minus = made[name].scores, made[name].minus_full
        line = [ROWS[name].title]
        line += [f"{scores[f'render_novel_{m}'].mean:.{digits}f}" for m, _, digits in have]
        line += [f"{abs(scores[f'delta_{m}'].mean):.{digits}f}" for m, _, digits in have]
        line += [minus["render_novel_psnr"].text(2, sign=True) if minus else ""]
        paper = [f"{v:.{3 if i % 3 == 0 else 4}f}" for i, v in enumerate(ROWS[name].paper)]
        lines.append([*line, *paper, *[""] * (len(PAPER_COLUMNS) - len(paper))])
    return lines


def report(out: Path, made: dict[str, Result], protocol: str) -> str:
    """Writes table.md, table.csv, table.json and plot.png; returns the tables as text."""
    text, markdown = [], [f"{protocol}\n"]
    for title, rows in TABLES.values():
        names = [name for name in rows if name in made]
        if not [name for name in names if name != "full"] and title != TABLES["feedback"][0]:
            continue
        lines = table_lines(names, made)
        text += [f"{title}\n", align(lines), ""]
        body = [f"| {' | '.join(line)} |" for line in lines]
        markdown += [f"## {title}\n", body[0], "|---" * len(lines[0]) + "|", *body[1:], ""]
    write_whole(out / "table.md", "\n".join(markdown))
    values = {name: {"title": ROWS[name].title, "paper": ROWS[name].paper, **asdict(r)} for name, r in made.items()}
    write_json(out / "table.json", {"protocol": protocol, "rows": values})
    rows = []
    for name, result in made.items():
        for column, value in result.scores.items():
            d = result.minus_full.get(column)
            minus = {"minus_full": d.mean, "minus_low": d.low, "minus_high": d.high} if d else {}
            rows.append({"row": name, "column": column, **asdict(value), **minus})
    columns = ["row", "column", *Interval.__dataclass_fields__, "minus_full", "minus_low", "minus_high"]
    write_csv(out / "table.csv", columns, rows)
    plot(out / "plot.png", made)
    return "\n".join(text)


def comparison(out: Path, names: list[str], train_seed: int, seed: int) -> Image.Image | None:
    """Truth and every row's 3D below each other, for the objects on which `full` is best, median and worst."""

    def folder(name: str) -> Path:
        return out / name / f"scores_{train_seed}"

    scores = {name: {key(row): row for row in read_rows(folder(name) / "objects.csv")} for name in names}
    entries = []
    for kind, row in extreme_rows([row for row in scores["full"].values() if row["seed"] == seed], 2):
        paths = {name: picture_path(folder(name), row) for name in names}
        if not all(path.is_file() for path in paths.values()):
            continue
        count = len(PICTURES)
        truth = table_row(Image.open(paths["full"]), PICTURES.index("truth"), count)
        entries.append((f"{kind} of the full row: {row['object']}", truth))
        for name, path in paths.items():
            heading = f"{ROWS[name].title}: 3D {scores[name][key(row)]['render_novel_psnr']:.1f} dB"
            entries.append((heading, table_row(Image.open(path), PICTURES.index("3D"), count)))
    return stack_with_headings(entries) if entries else None


def plot(path: Path, made: dict[str, Result]) -> None:
    """Left the 3D's PSNR against the full row's, ours with its interval and the paper's; right the gap between views
    and 3D."""
    from matplotlib.figure import Figure

    names = [name for name in ROWS if name in made]
    figure = Figure(figsize=(11, 0.45 * len(names) + 1.6), layout="tight")
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(names), 0, -1)
    for y, name in zip(places, names, strict=True):
        paper = ROWS[name].paper
        gap = made[name].scores["delta_psnr"]
        difference = made[name].minus_full.get("render_novel_psnr", Interval(0.0, 0.0, 0.0, 0))
        for axis, value, sign in ((left, difference, 1), (right, gap, -1 if gap.mean < 0 else 1)):
            mean, ends = sign * value.mean, sorted((sign * value.low, sign * value.high))
            axis.plot(ends, [y, y], color="C0", linewidth=2)
            axis.plot(mean, y, "o", color="C0", label="here" if y == len(names) else None)
        if paper:
            left.plot(paper[0] - ROWS["full"].paper[0], y, "D", mfc="none", color="C1", label=_once(left, "paper, GSO"))
        if len(paper) > 3:
            right.plot(paper[3], y, "D", mfc="none", color="C1")
    left.set_yticks(list(places), [ROWS[name].title for name in names])
    left.set_xlabel("PSNR of the rendered 3D minus the full row's, dB")
    right.set_xlabel("|PSNR of the views - of the 3D|, dB")
    for axis in (left, right):
        axis.axvline(0, color="grey", linewidth=0.8)
    left.legend(loc="best", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _once(axis: object, label: str) -> str | None:
    return None if label in axis.get_legend_handles_labels()[1] else label


def ablate(options: argparse.Namespace, run: Run | None = None) -> None:
    """Makes the chosen rows and prints the tables. `run` stands in for processes of their own, in tests."""
    ablation = Ablation(options, run or launcher(options.launcher))
    for name in options.rows if not options.report else ():  # all of them before the first hour of training
        ablation.config_file(name)
    scores: dict[str, dict[int, list[Score]]] = {}
    for name in options.rows:
        scores[name] = {seed: ablation.make(name, seed) for seed in options.train_seeds}
        if not options.report:  # intermediate tables
            report(options.out, results(scores), protocol(options))
    text = report(options.out, results(scores), protocol(options))
    if "full" in scores:
        rows = [name for name in TABLES["feedback"][1] if name in scores]
        if (picture := comparison(options.out, rows, options.train_seeds[0], options.seeds[0])) is not None:
            save_image(options.out / "grid.png", picture)
    print(f"\n{protocol(options)}\n\n{text}\nin {options.out}: table.md, table.csv, table.json, plot.png, grid.png")


def protocol(options: argparse.Namespace) -> str:
    """What the two sides of a table are, in words."""

    def numbers(values: list[int]) -> str:
        return ", ".join(map(str, values))

    budget = f"{options.steps} steps" if options.steps else options.budget
    return (
        f"Here: {Path(options.base).stem}.yaml, {budget} of training a row from the same start, training seeds "
        f"{numbers(options.train_seeds)}, {options.objects or 'all'} objects of {options.list}, sampling seeds "
        f"{numbers(options.seeds)}; the rendered 3D at the generated cameras but the "
        "first, d = |views - 3D|. Paper: the full-size model on 100 objects of GSO. The two differ in data, size and "
        "resolution: compare the order of the rows, not the numbers."
    )
