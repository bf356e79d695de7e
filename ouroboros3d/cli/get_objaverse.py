"""Fetches Objaverse's LVIS subset, about 46,000 everyday objects, for training.

    python scripts/get_objaverse.py --out data/objaverse --processes 16 [--limit 1000] [--categories chair mug]

Needs the package (pip install objaverse) and the internet: it downloads from huggingface.co. The download has not been
run: tests/test_get_objaverse.py uses a stand-in for the package's functions, and the package's own functions (0.1.7)
were tried on files that were already on disk. Writes below --out:

    hf-objaverse-v1/...     the package's own folder: annotations and glb files
    assets.csv              id, split, path of every object that is there: the input of render_orbits.py
    attribution.csv         id, name, creator, licence, its address, address of the object, LVIS categories
    failures.txt            what could not be downloaded, and why (only if anything)

Downloaded objects are skipped, so the command can be stopped and repeated. --limit takes objects in hash order, so a
larger limit adds to a smaller one. Splits are by creator, again by hash: creators in the test split have no object in
training, so variants are never in both, and a new download moves none.

Exit status: 0 all objects are there, 1 some objects could not be downloaded, 2 nothing could be done.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from ouroboros3d.cli.options import Parser
from ouroboros3d.datagen.assets import hash_position
from ouroboros3d.errors import UserError, one_line
from ouroboros3d.files import check_writable_dir, write_csv, write_lines

# What Objaverse calls a licence: its name and address.
LICENCES = {
    "cc0": ("CC0", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "by": ("CC-BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "by-sa": ("CC-BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/"),
    "by-nc": ("CC-BY-NC 4.0", "https://creativecommons.org/licenses/by-nc/4.0/"),
    "by-nc-sa": ("CC-BY-NC-SA 4.0", "https://creativecommons.org/licenses/by-nc-sa/4.0/"),
}
TEST_SHARE, VALIDATION_SHARE = 0.01, 0.005  # of the creators
ATTRIBUTION_COLUMNS = ["id", "name", "creator", "licence", "licence_url", "source", "categories"]
CHUNK = 25  # objects a process at a time, between two steps of the progress bar


def split_of(creator: str) -> str:
    """ "train", "val" or "test", by the creator's name."""
    place = hash_position(f"creator {creator}")
    return "test" if place < TEST_SHARE else "val" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def import_objaverse(folder: Path) -> ModuleType:
    """The package, told to keep its files in `folder`; raises UserError if it is not installed."""
    try:
        import objaverse
    except ImportError as error:
        raise UserError("the package objaverse is not here; install it with: pip install objaverse") from error
    objaverse.BASE_PATH = str(folder)
    objaverse._VERSIONED_PATH = str(folder / "hf-objaverse-v1")  # what its functions read; there is no public way
    return objaverse


def read_annotations(
    objaverse: ModuleType, categories: Iterable[str] | None, licences: Iterable[str], limit: int | None
) -> list[dict[str, str]]:
    """One row per object, by its id: id, split, and ATTRIBUTION_COLUMNS. Raises UserError."""
    try:
        lvis = objaverse.load_lvis_annotations()
        of_object: dict[str, list[str]] = defaultdict(list)
        for category in categories or sorted(lvis):
            if category not in lvis:
                near = ", ".join(difflib.get_close_matches(category, lvis)) or "see the package's LVIS annotations"
                raise UserError(f"LVIS has no category '{category}'; near: {near}")
            for uid in lvis[category]:
                of_object[uid].append(category)
        order = sorted(of_object, key=hash_position)
        annotations = objaverse.load_annotations(order)
    except (OSError, EOFError) as error:  # the network's, or a file of which an earlier run left a half
        reason = one_line(error)
        raise UserError(f"annotations: {reason}; is there internet? if so, delete {objaverse.BASE_PATH}") from error
    wanted = set(licences)
    uids = [uid for uid in order if annotations.get(uid, {}).get("license") in wanted][:limit]
    if not uids:
        raise UserError(f"none of {len(order)} objects has a licence of {', '.join(sorted(wanted))}")
    return [_row(uid, annotations[uid], of_object[uid]) for uid in sorted(uids)]


def _row(uid: str, annotation: dict[str, Any], categories: list[str]) -> dict[str, str]:
    user = annotation.get("user") or {}
    licence, address = LICENCES[annotation["license"]]
    return {
        "id": uid,
        "split": split_of(user.get("username") or uid),
        "name": " ".join((annotation.get("name") or "").split()),
        "creator": user.get("displayName") or user.get("username") or "unknown",
        "licence": licence,
        "licence_url": address,
        "source": annotation.get("viewerUrl") or f"https://sketchfab.com/3d-models/{uid}",
        "categories": " ".join(categories),
    }


def download(objaverse: ModuleType, uids: list[str], processes: int) -> tuple[dict[str, str], dict[str, str]]:
    """Paths of the objects that are there at last, and reasons why others are not, by id.

    Raises UserError when all of many in a row fail: that is the connection, not the objects.
    """
    paths, failures = {}, {}
    step = CHUNK * processes
    with tqdm(total=len(uids), desc="downloading", unit="object") as progress:
        for start in range(0, len(uids), step):
            chunk = uids[start : start + step]
            found = _load(objaverse, chunk, processes)
            if isinstance(found, Exception):  # one object ends the whole call: find out which
                for uid in chunk:
                    one = _load(objaverse, [uid], 1)
                    if isinstance(one, Exception):
                        failures[uid] = one_line(one)
                    else:
                        paths.update(one)
                if not any(uid in paths for uid in chunk):
                    raise UserError(f"none of {len(chunk)} objects in a row came: {found}; run again with internet")
            else:
                paths.update(found)
            progress.update(len(chunk))
    failures |= {uid: "the package does not know it" for uid in uids if uid not in paths and uid not in failures}
    return paths, failures


def _load(objaverse: ModuleType, uids: list[str], processes: int) -> dict[str, str] | Exception:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per object
        try:
            return objaverse.load_objects(uids=uids, download_processes=processes)
        except (OSError, EOFError) as error:  # urllib's errors are OSErrors
            return error


def main(arguments: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the models and lists")
    add("--categories", nargs="+", metavar="NAME", help="LVIS categories (default: all 1,156)")
    add("--licences", nargs="+", choices=LICENCES, default=list(LICENCES), help="licences to keep (default: all)")
    add("--limit", type=int, metavar="N", help="fetch at most N objects (default: all)")
    add("--processes", type=int, default=os.cpu_count() or 1, help="parallel downloads (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.processes < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--processes and --limit must be at least 1")
    out = check_writable_dir(options.out).resolve()
    objaverse = import_objaverse(out)
    rows = read_annotations(objaverse, options.categories, options.licences, options.limit)
    paths, failures = download(objaverse, [row["id"] for row in rows], options.processes)
    rows = [row | {"path": os.path.relpath(paths[row["id"]], out)} for row in rows if row["id"] in paths]
    if not rows:
        raise UserError(f"none of {len(failures)} objects came: {next(iter(failures.values()))}")
    write_csv(out / "assets.csv", ["id", "split", "path"], rows)
    write_csv(out / "attribution.csv", ATTRIBUTION_COLUMNS, rows)
    (out / "failures.txt").unlink(missing_ok=True)
    if failures:
        write_lines(out / "failures.txt", (f"{uid}\t{reason}" for uid, reason in failures.items()))
    counts = {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")}
    print(f"{len(rows)} objects {counts}: {out / 'assets.csv'}; credits: {out / 'attribution.csv'}")
    if failures:
        print(f"{len(failures)} could not be downloaded: {out / 'failures.txt'}; run again to try them again")
    return 1 if failures else 0
