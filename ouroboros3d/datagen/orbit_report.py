"""Checks a set of orbits and writes what is wrong with it (the command: scripts/validate_orbits.py)."""

from __future__ import annotations

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ouroboros3d.data.orbit_files import DataError, read_meta
from ouroboros3d.datagen.orbit_checks import (
    OrbitReport,
    check_orbit,
    check_set,
    find_orbits,
    good_lists,
    read_list,
    read_picture,
)
from ouroboros3d.files import check_writable_dir, write_csv, write_json, write_lines
from ouroboros3d.processes import end_with_parent
from ouroboros3d.visualize import save_image

LISTS = ("train.txt", "val.txt", "test.txt")  # held-out ones last
VIEW, GAP, LABEL = 64, 4, 13  # pixels of the contact sheet
MAX_SHEET = 864  # orbits, in rows of 8: webp has no more than 16,383 pixels
BAD, DEGENERATE, PAPER, CANVAS = (210, 30, 30), (235, 140, 0), (255, 255, 255), (222, 222, 222)


def contact_sheet(root: Path, reports: list[OrbitReport], frames: int, columns: int = 8) -> Image.Image:
    """Four views of every orbit, a quarter turn apart, with its name; framed where something is the matter."""
    width, height = 2 * VIEW + 2 * GAP, 2 * VIEW + 2 * GAP + LABEL
    columns = min(columns, len(reports))
    sheet = Image.new("RGB", (columns * width, -(-len(reports) // columns) * height), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, report in enumerate(reports):
        left, top = number % columns * width, number // columns * height
        colour = BAD if report.problems else DEGENERATE if report.degenerate else PAPER
        draw.rectangle((left, top, left + width - 1, top + 2 * VIEW + 2 * GAP - 1), colour)
        for k, view in enumerate(_views(root / report.id, frames)):
            sheet.paste(view, (left + GAP + k % 2 * VIEW, top + GAP + k // 2 * VIEW))
        label = report.id
        while font.getlength(label) > width - GAP:
            label = label[1:]  # the ends of names tell more
        draw.text((left + GAP, top + height - LABEL - 1), label, fill="black", font=font)
    return sheet


def _views(folder: Path, frames: int) -> list[Image.Image]:
    """Four views on grey; what cannot be read stays empty."""
    try:
        names = read_meta(folder / "meta.json", frames).names
    except DataError:
        names = [path.name for path in sorted(folder.glob("*.webp"))]
    views = []
    for k in range(4):
        view = Image.new("RGB", (VIEW, VIEW), CANVAS)
        try:
            picture = Image.fromarray(read_picture(folder / names[k * len(names) // 4])).resize((VIEW, VIEW))
            view.paste(picture, mask=picture.getchannel("A"))
        except (DataError, IndexError):
            pass
        views.append(view)
    return views


def chosen_for_sheet(reports: list[OrbitReport], count: int) -> list[OrbitReport]:
    """At most `count` orbits: problems, degenerate ones and others, each evenly from its kind."""
    kinds = [
        [r for r in reports if not r.good],
        [r for r in reports if r.good and r.degenerate],
        [r for r in reports if r.good and not r.degenerate],
    ]
    chosen: list[OrbitReport] = []
    for kind, most in zip(kinds, (count // 2, count * 3 // 4, count), strict=True):
        room = min(len(kind), most - len(chosen))
        chosen += [kind[i * len(kind) // room] for i in range(room)]
    return chosen


def write_report(path: Path, reports: list[OrbitReport], lists: dict[str, list[str]]) -> None:
    """One row per orbit; several problems are separated by " | "."""
    of_lists = {name: set(ids) for name, ids in lists.items()}
    rows = []
    for report in reports:
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(report).items()}
        row |= {key: " | ".join(row[key]) for key in ("problems", "degenerate")}
        rows.append(row | {"lists": " ".join(name for name, ids in of_lists.items() if report.id in ids)})
    write_csv(path, ["id", "lists", *list(asdict(OrbitReport("")))[1:]], rows)


def kinds_of(texts: list[str]) -> dict[str, int]:
    """How many there are of every kind, the most frequent first."""
    return dict(Counter(text.split(":")[0] for text in texts).most_common())


def validate(options: argparse.Namespace) -> bool:
    """Checks everything, writes the results and prints a summary. Returns whether all is good; raises UserError."""
    root = options.root
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; render orbits with scripts/render_orbits.py")
    names = options.lists or [name for name in LISTS if (root / name).exists()]
    lists, list_problems = {}, {}
    for name in names:
        lists[name], list_problems[name] = read_list(root / name)
    found = find_orbits(root)
    ids = list(dict.fromkeys([*found, *(i for of_list in lists.values() for i in of_list)]))
    if not ids:
        raise DataError(f"{root}: holds no orbits and no list names one; render some with scripts/render_orbits.py")
    out = check_writable_dir(options.out or root / "validation")

    check = partial(check_orbit, root, frames=options.frames, strict=options.strict)
    with ProcessPoolExecutor(min(options.workers, len(ids)), initializer=end_with_parent) as pool:
        found_out = tqdm(pool.map(check, ids, chunksize=8), total=len(ids), desc=f"checking {root}", unit="orbit")
        try:
            reports = {report.id: report for report in found_out}
        except BrokenProcessPool as error:
            raise DataError(f"{root}: a process died, perhaps out of memory; give fewer --workers") from error
    for name, problems in check_set(reports, lists, options.size).items():
        list_problems[name] += problems
    list_problems["set"] = []
    if not any(lists.values()):
        list_problems["set"].append(f"empty: no id in {', '.join(lists) or ' or '.join(LISTS)}")
    elif unlisted := sorted(set(found) - {i for of_list in lists.values() for i in of_list}):
        list_problems["set"].append(f"unlisted: {len(unlisted)} folders in no list, the first {unlisted[0]}")
    list_problems = {name: problems for name, problems in list_problems.items() if problems}

    everything = list(reports.values())
    if options.drop_degenerate:
        for report in everything:
            report.problems += [f"degenerate {text}" for text in report.degenerate]
    bad = [r for r in everything if not r.good]
    good = good_lists(reports, lists)
    for name, of_list in good.items():
        write_lines(out / f"good_{Path(name).name}", of_list)
    write_lines(out / "good.txt", [r.id for r in everything if r.good])
    write_report(out / "report.csv", everything, lists)
    summary = {
        "orbits": len(everything),
        "good": len(everything) - len(bad),
        "problems": kinds_of([text for r in everything for text in r.problems]),
        "degenerate": kinds_of([text for r in everything for text in r.degenerate]),
        "lists": {name: {"ids": len(of_list), "good": len(good[name])} for name, of_list in lists.items()},
        "list_problems": list_problems,
        "ranges": ranges(everything),
    }
    write_json(out / "report.json", summary)
    if chosen := chosen_for_sheet(everything, min(options.sheet, MAX_SHEET)):
        save_image(out / "contact_sheet.webp", contact_sheet(root, chosen, options.frames))
    for report in bad[: options.show]:
        print(f"{report.id}: {' | '.join(report.problems)}")
    if len(bad) > options.show:
        print(f"... and {len(bad) - options.show} more in {out / 'report.csv'}")
    for name, problems in list_problems.items():
        print("\n".join(f"{name}: {problem}" for problem in problems))
    print(f"{summary['good']} of {len(everything)} orbits are good")
    for name in ("problems", "degenerate", "ranges"):
        print(f"{name}: {', '.join(f'{kind} {value}' for kind, value in summary[name].items()) or 'none'}")
    print(f"wrote {out}")
    return not bad and not list_problems


def ranges(reports: list[OrbitReport]) -> dict[str, str]:
    """Smallest and largest of every number, as text."""
    out = {}
    for name in ("size", "fov", "distance", "elevation", "cover", "extent"):
        values = [v for r in reports if (v := getattr(r, name)) is not None]
        if values:
            low, high = f"{min(values):.4g}", f"{max(values):.4g}"
            out[name] = low if low == high else f"{low} to {high}"
    return out
