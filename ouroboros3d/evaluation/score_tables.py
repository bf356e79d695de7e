"""Tables of scores: one row per orbit and sampling seed, as CSV; their means over objects; comparisons of two.

A row holds `object`, `id`, `seed` (strings and an int) and numbers by column name, NaN where there is nothing to
measure (written as an empty cell; a column that is empty everywhere is left out). docs/evaluation.md says what each
column is.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ouroboros3d.config.loading import flatten_keys
from ouroboros3d.errors import UserError
from ouroboros3d.evaluation.bootstrap import Interval, bootstrap_mean, group_means, paired_difference
from ouroboros3d.files import write_csv, write_json

Row = dict[str, str | int | float]
KEYS = ("object", "id", "seed")
# Metrics of pictures: column's end, heading, digits.
METRICS = (
    ("psnr", "PSNR", 2),
    ("psnr_foreground", "foreground", 2),
    ("ssim", "SSIM", 4),
    ("lpips", "LPIPS", 4),
    ("gradient_distance", "gradient distance", 4),
    ("iou", "IoU", 3),
)
# What is scored: column's start, name in the table.
SUBJECTS = (
    ("views_all", "views, all"),
    ("views_novel", "views, novel"),
    ("render_all", "3D, all"),
    ("render_novel", "3D, novel"),
    ("render_between", "3D, between"),
    ("render_other", "3D, other orbit"),
    ("delta", "views - 3D, novel"),
    ("clean_novel", "3D of true views, novel"),
    ("clean_between", "3D of true views, between"),
    ("clean_other", "3D of true views, other orbit"),
    ("repeat", "repeat the input"),
    ("nearest", "nearest training object"),
    ("mean", "mean training image"),
    ("background", "background alone"),
)
SINGLES = (
    ("agreement_psnr", "PSNR of the 3D against the views", 2),
    ("cast_green", "|G - (R + B) / 2| of what is grey", 4),
    ("cast_red_blue", "|R - B| of what is grey", 4),
    ("chamfer", "Chamfer distance", 4),
    ("fscore_0.02", "F-score at 0.02", 3),
    ("fscore_0.05", "F-score at 0.05", 3),
)


def object_name(orbit: str) -> str:
    """The object of an orbit's id: "../orbits64/chair_1" -> "chair"; a name that ends in no number is an object."""
    name = orbit.rstrip("/").split("/")[-1]
    return re.sub(r"_\d+$", "", name)


def rounded(value: float) -> float:
    """As the CSV has it, so that a resumed evaluation equals an uninterrupted one."""
    return float(f"{value:.6g}")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Atomically, sorted by seed and id."""
    ordered = sorted(rows, key=lambda row: (row["seed"], row["id"]))
    write_csv(path, [*KEYS, *number_columns(rows)], ({c: _cell(v) for c, v in row.items()} for row in ordered))


def read_rows(path: str | Path) -> list[Row]:
    """What `write_rows` wrote. Raises UserError."""
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        if lines and not set(KEYS) <= set(lines[0]):
            raise ValueError(f"needs the columns {', '.join(KEYS)}")
        return [{c: _value(c, text) for c, text in line.items()} for line in lines]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path}: not a table of scores ({reason}); name an objects.csv of scripts/evaluate.py"
        ) from None


def key(row: Row) -> tuple[str, int]:
    return row["id"], row["seed"]


def by_object(rows: Iterable[Row], column: str) -> dict[str, float]:
    """Each object's mean of a column over its orbits and seeds."""
    return group_means((row["object"], row.get(column, math.nan)) for row in rows)


def number_columns(rows: Sequence[Row]) -> list[str]:
    """The columns with at least one number, in order."""
    return list(dict.fromkeys(c for row in rows for c, v in row.items() if c not in KEYS and not _empty(v)))


def summarise(rows: Sequence[Row]) -> dict[str, Interval]:
    """Mean over objects and 95 % bootstrap interval of every column."""
    return {column: bootstrap_mean(by_object(rows, column).values()) for column in number_columns(rows)}


def compare(rows: Sequence[Row], others: Sequence[Row]) -> dict[str, Interval]:
    """Paired differences rows - others per column, over the orbits and seeds that both have. Raises UserError if
    there are none."""
    shared = {key(row) for row in rows} & {key(row) for row in others}
    if not shared:
        raise UserError("the two tables have no orbit and seed in common: nothing can be paired")
    ours, theirs = ([row for row in table if key(row) in shared] for table in (rows, others))
    columns = [c for c in number_columns(ours) if c in number_columns(theirs)]
    return {c: paired_difference(by_object(ours, c), by_object(theirs, c)) for c in columns}


def above_repeat(rows: Sequence[Row]) -> dict[str, Interval]:
    """PSNR at novel cameras minus that of repeating the input view, paired by object: of the views and of the 3D.
    Empty where the baselines are absent."""
    if "repeat_psnr" not in number_columns(rows):
        return {}
    repeat = by_object(rows, "repeat_psnr")
    names = {"views": "views_novel_psnr", "3D": "render_novel_psnr"}
    return {name: paired_difference(by_object(rows, column), repeat) for name, column in names.items()}


def table_text(summary: dict[str, Interval], sign: bool = False) -> str:
    """The summary as a table of subjects by metrics, mean [low, high]; what was not measured has no row or column."""
    metrics = [m for m in METRICS if any(f"{subject}_{m[0]}" in summary for subject, _ in SUBJECTS)]
    lines = [["", *(heading for _, heading, _ in metrics)]]
    for subject, name in SUBJECTS:
        cells = [
            summary[f"{subject}_{metric}"].text(digits, sign or subject == "delta")
            if f"{subject}_{metric}" in summary
            else ""
            for metric, _, digits in metrics
        ]
        if any(cells):
            lines.append([name, *cells])
    lines += [[name, summary[column].text(digits, sign)] for column, name, digits in SINGLES if column in summary]
    return align(lines)


def check_settings(folder: Path, settings: dict, occupied: bool) -> None:
    """Writes settings.json into a folder of results; where it is `occupied` already, refuses other settings.
    Raises UserError with what differs."""
    path = folder / "settings.json"
    own = json.loads(json.dumps(settings))
    if occupied and path.is_file():
        try:
            there = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: is damaged ({error}); choose another --out or remove {folder}") from None
        one, other = flatten_keys(own), flatten_keys(there)
        keys = [k for k in dict.fromkeys([*one, *other]) if one.get(k) != other.get(k)]
        differences = [f"{k} is {other.get(k)} there, {one.get(k)} here" for k in keys]
        if differences:
            raise UserError(
                f"{folder}: holds results of other settings ({'; '.join(differences[:3])}); choose another --out or "
                "remove that folder"
            )
    write_json(path, own)


def align(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, all of them left, two blanks apart."""
    count = max(map(len, lines))
    filled = [[*line, *[""] * (count - len(line))] for line in lines]
    widths = [max(len(line[i]) for line in filled) for i in range(count)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in filled)


def _empty(value: str | int | float) -> bool:
    return value == "" or (isinstance(value, float) and math.isnan(value))


def _cell(value: str | int | float) -> str:
    return "" if _empty(value) else f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(column: str, text: str) -> str | int | float:
    if column in ("object", "id"):
        return text
    return int(text) if column == "seed" else float(text or "nan")
