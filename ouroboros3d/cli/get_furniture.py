"""Fetches about 500 free furniture models for training the small model.

    python scripts/get_furniture.py --out data/furniture [--deb sweethome3d-furniture_1.8-1_all.deb]

They come from Debian's package sweethome3d-furniture (CC0 and CC-BY 3.0): downloaded with `apt-get download` (no root
needed) or given with --deb, unpacked, and filtered. Writes below --out:

    models/<catalogue>/...      the unpacked catalogues
    assets.csv                  id, split, path of every selected model: the input of render_orbits.py
    attribution.csv             id, name, creator, licence, its address and the catalogue of every selected model;
                                CC-BY requires it to go with anything made from the models

It keeps upright everyday objects that an orbit of side views can show (`excluded_by_catalogue`, `excluded_by_shape`).
The committed furniture_split.csv lists the kept objects with their splits; --choose makes that file again. Variants of
one object are always in the same split (`variant_group`).
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from ouroboros3d.cli.options import Parser
from ouroboros3d.datagen import assets
from ouroboros3d.datagen.assets import safe_unzip
from ouroboros3d.errors import UserError
from ouroboros3d.files import check_writable_dir, read_table, write_csv
from ouroboros3d.processes import end_with_parent

PACKAGE = "sweethome3d-furniture"
SPLIT_FILE = Path(assets.__file__).with_name("furniture_split.csv")
SPLIT_COLUMNS = ["id", "split", "name", "creator", "licence", "catalogue", "model"]
LICENCES = {
    "BlendSwap-CC-0": "CC0",
    "BlendSwap-CC-BY": "CC-BY 3.0",
    "KatorLegaz": "CC-BY 3.0",
    "Reallusion": "CC-BY 3.0",
    "Scopia": "CC-BY 3.0",
}
LICENCE_URLS = {
    "CC0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY 3.0": "https://creativecommons.org/licenses/by/3.0/",
}
ATTRIBUTION_COLUMNS = ["id", "name", "creator", "licence", "licence_url", "catalogue"]
PROPERTIES = "PluginFurnitureCatalog.properties"
_IDENTITY = "1 0 0 0 1 0 0 0 1"
TEST_OBJECTS, VALIDATION_OBJECTS = 46, 10

EXCLUDED_CATEGORIES = {"Doors and windows", "Staircases"}
# Pieces of a name: things that are flat, lie down, hang on a wall, are mostly air or show nothing sideways.
# fmt: off
EXCLUDED_NAMES = (
    "white board", "calendar", "ruler", "scissors", "pencil", "text marker", "socket", "plug", "switch",
    "bill ", "arrow", "parking", "crossing", "rail", "carpet", "rug", "tatami", "doormat", "bathmat",
    "blind", "curtain", "frame", "glass table", "pool", "sandpit", "wall", "sign", "thermometer", "wire",
    "key", "smoke", "hanging", "fence", "puzzle", "card game", "window", "sheet", "screen", "sidewalk",
    "fork", "knife", "spoon", "steak", "tool", "comb", "goal", "hedge", "shutter", "sushi", "folded",
    "sunglasses", "glasses", "tablet", "cutlery", "plate", "cooktop", "induction", "skirt", "short",
    "hammock", "emergency", "newspaper", "ring", "coathanger", "lying",
)
# fmt: on
KEPT_NAMES = {"fork lift"}
# Within a catalogue all objects with one of these in their names count as variants of one another.
FAMILIES = ("cabinet", "radiator", "female", "male", "person", "column", "concept sedan")


@dataclass(frozen=True)
class Entry:
    """One model of a catalogue.

    model: path inside the catalogue; size: width, depth, height in cm; upright: whether the file's y axis
    points up (a few models are laid down and the catalogue turns them).
    """

    id: str
    name: str
    category: str
    creator: str
    catalogue: str
    model: str
    size: tuple[float, float, float]
    upright: bool


def excluded_by_catalogue(entry: Entry) -> str | None:
    """The first half of the selection rule: why an object is left out, judged by its entry, or None.

    Kept are upright everyday objects that an orbit of side views can show. Out go doors, windows and stairs
    (category), things that are flat, hang on a wall or lie about (name), flat ones (shortest side below 12 %
    of the longest), rods (second side below 20 %) and models that the catalogue has to set upright.
    """
    name = entry.name.lower()
    if entry.category in EXCLUDED_CATEGORIES:
        return "category"
    if name not in KEPT_NAMES and any(piece in name for piece in EXCLUDED_NAMES):
        return "name"
    short, middle, long = sorted(entry.size)
    if short < 0.12 * long:
        return "flat"
    if middle < 0.20 * long:
        return "thin"
    if not entry.upright:
        return "laid down"
    return None


def excluded_by_shape(path: Path) -> str | None:
    """The second half of the rule, judged by the model itself.

    Out go models that do not load, have more than 150,000 faces, are glass for more than 15 % of their
    surface, or cover less than 2 % of some view or 6 % of the views' mean.
    """
    from ouroboros3d.datagen.assets import AssetError
    from ouroboros3d.datagen.meshes import load_surface
    from ouroboros3d.datagen.raycast import Raycaster, orbit_pose

    try:
        surface = load_surface(path, max_texture=64)
    except AssetError:
        return "unreadable"
    if len(surface.faces) > 150_000:
        return "big"
    if surface.glass_fraction() > 0.15:
        return "glass"
    caster = Raycaster(surface)
    cover = [(caster.depth(orbit_pose(a, 10.0), 32) > 0).mean() for a in range(0, 360, 45)]
    if min(cover) < 0.02 or sum(cover) / len(cover) < 0.06:
        return "small"
    return None


def variant_group(entry: Entry) -> str:
    """Objects of one group may be near-duplicates and go into the same split.

    Same catalogue and creator, and the same name up to numbers, or one of FAMILIES in the name.
    """
    name = re.sub(r"[\W\d_]+", " ", entry.name.lower()).strip()
    name = next((family for family in FAMILIES if f" {family} " in f" {name} "), name)
    return f"{entry.catalogue}/{entry.creator}/{name}"


def choose_splits(entries: list[Entry]) -> dict[str, str]:
    """Split by object: id -> "train", "val" or "test", the same on every machine.

    Whole groups of at most 8 variants, in the order of a hash of their name, until test and then validation
    are full; the rest is for training.
    """
    groups = defaultdict(list)
    for entry in entries:
        groups[variant_group(entry)].append(entry.id)
    splits = {}
    room = {"test": TEST_OBJECTS, "val": VALIDATION_OBJECTS, "train": len(entries)}
    for group in sorted(groups, key=lambda g: hashlib.sha256(g.encode()).hexdigest()):
        count = len(groups[group])
        split = next(s for s in room if count <= room[s] and (count <= 8 or s == "train"))
        room[split] -= count
        splits |= dict.fromkeys(groups[group], split)
    return splits


def fetch_package(folder: Path) -> Path:
    """Download the Debian package into `folder` with apt-get; raises OSError when that fails."""
    if shutil.which("apt-get") is None:
        raise OSError(f"apt-get is not here: download {PACKAGE} from packages.debian.org and give --deb FILE")
    done = subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise OSError(f"apt-get download {PACKAGE} failed: {reason}")
    return found[-1]


def unpack_package(deb: Path, models: Path) -> None:
    """Unpack the catalogues of the package to models/<catalogue>/; raises OSError or zipfile.BadZipFile."""
    if not deb.is_file():
        raise OSError(f"{deb}: no such file")
    if shutil.which("dpkg-deb") is None:
        raise OSError(f"dpkg-deb is not here: unpack {deb} elsewhere, each .sh3f (a zip) to {models}/<its name>/")
    with tempfile.TemporaryDirectory(dir=models.parent) as temporary:
        done = subprocess.run(["dpkg-deb", "-x", str(deb), temporary], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{deb}: dpkg-deb cannot unpack it: {done.stderr.strip().partition(chr(10))[0]}")
        for catalogue in LICENCES:
            found = list(Path(temporary).rglob(f"{catalogue}.sh3f"))
            if not found:
                raise OSError(f"{deb}: holds no {catalogue}.sh3f; is it {PACKAGE}?")
            # Whole or not at all: the next run goes by what is there.
            staged = Path(temporary) / catalogue
            safe_unzip(found[0], staged)
            models.mkdir(exist_ok=True)
            shutil.rmtree(models / catalogue, ignore_errors=True)
            staged.rename(models / catalogue)


def read_catalogue(folder: Path) -> list[Entry]:
    """The entries of an unpacked catalogue, in its own order."""
    text = (folder / PROPERTIES).read_text("latin-1")
    records: dict[int, dict[str, str]] = defaultdict(dict)
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
        records[int(number)][key] = value.strip()
    entries = []
    for _, r in sorted(records.items()):
        stem = re.sub(r"[^A-Za-z0-9]+", "-", r["id"].split("#")[-1]).strip("-").lower()
        name, model = f"{folder.name.lower()}_{stem}", r["model"].lstrip("/")
        size = (float(r["width"]), float(r["depth"]), float(r["height"]))
        upright = float(r.get("modelRotation", _IDENTITY).split()[4]) > 0.99
        entries.append(Entry(name, r["name"], r["category"], r["creator"], folder.name, model, size, upright))
    return entries


def choose(models: Path, workers: int) -> list[dict[str, str]]:
    """Apply the rule to all catalogues; rows for SPLIT_FILE, sorted by id. Prints the counts per reason."""
    entries = [e for c in LICENCES for e in read_catalogue(models / c)]
    reasons = {e: excluded_by_catalogue(e) for e in entries}
    shown = [e for e in entries if not reasons[e]]
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        found = pool.map(excluded_by_shape, [models / e.catalogue / e.model for e in shown], chunksize=8)
    reasons |= zip(shown, found, strict=True)
    kept = sorted((e for e in shown if not reasons[e]), key=lambda e: e.id)
    splits = choose_splits(kept)
    print(f"{len(entries)} models, {len(kept)} kept; left out: {dict(Counter(filter(None, reasons.values())))}")
    return [vars(e) | {"split": splits[e.id], "licence": LICENCES[e.catalogue]} for e in kept]


def select(out: Path) -> tuple[list[dict[str, str]], int]:
    """The rows of SPLIT_FILE with their paths in `out` and licences, and the number of models in the catalogues."""
    rows = read_table(SPLIT_FILE, SPLIT_COLUMNS)
    for row in rows:
        row["path"] = str(Path("models") / row["catalogue"] / row["model"])
        row["licence_url"] = LICENCE_URLS[row["licence"]]
        if not (out / row["path"]).is_file():
            raise OSError(f"{out / row['path']} is missing; delete {out / 'models'} and run again")
    return rows, sum(len(read_catalogue(out / "models" / c)) for c in LICENCES)


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the models and lists")
    parser.add_argument("--deb", type=Path, help=f"a downloaded {PACKAGE} package (default: apt-get download)")
    parser.add_argument("--choose", action="store_true", help="make furniture_split.csv again (minutes)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes for --choose (default: %(default)s)")
    args = parser.parse_args(arguments)
    models = args.out / "models"
    try:
        check_writable_dir(args.out)
        if not all((models / c / PROPERTIES).is_file() for c in LICENCES):
            unpack_package(args.deb or fetch_package(args.out), models)
        if args.choose:
            write_csv(SPLIT_FILE, SPLIT_COLUMNS, choose(models, args.workers))
        rows, available = select(args.out)
        write_csv(args.out / "assets.csv", ["id", "split", "path"], rows)
        write_csv(args.out / "attribution.csv", ATTRIBUTION_COLUMNS, rows)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, BrokenProcessPool) as error:
        raise UserError(str(error)) from error
    counts = {s: sum(r["split"] == s for r in rows) for s in ("train", "val", "test")}
    share = f"{len(rows)} of the catalogues' {available} models ({len(rows) / available:.0%})"
    print(f"{share}, {counts}: {args.out / 'assets.csv'}; credits: {args.out / 'attribution.csv'}")
