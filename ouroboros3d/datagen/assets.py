"""Lists of 3D assets: a folder, a list, a csv file or a zip catalogue; and what is found in them."""

from __future__ import annotations

import csv
import hashlib
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ouroboros3d.errors import UserError

SPLITS = ("train", "val", "test")
MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".fbx")
ZIP_SUFFIXES = (".zip", ".sh3f")


class AssetError(Exception):
    """An asset cannot be loaded, or holds nothing that could be rendered."""


class Unsupported(AssetError):
    """An asset needs a feature of its format that is not supported."""

    def __init__(self, feature: str, reason: str):
        super().__init__(f"{feature} {reason}")
        self.feature = feature


OUTCOMES = ("rendered", "approximated", "refused")  # of a feature, the worst last


@dataclass
class Findings:
    """What the reader of a file met: warnings, and one of OUTCOMES for every feature beyond the plain."""

    warnings: dict[str, str] = field(default_factory=dict)  # text: feature
    features: dict[str, str] = field(default_factory=dict)

    def met(self, feature: str, outcome: str = "rendered") -> None:
        self.features[feature] = max(self.features.get(feature, outcome), outcome, key=OUTCOMES.index)

    def warn(self, text: str, feature: str) -> None:
        """Something of the file is not in the pictures."""
        self.met(feature, "approximated")
        self.warnings[text] = feature


@dataclass(frozen=True)
class Asset:
    """Something to render.

    id: names its folders; split: one of SPLITS, or empty if its list says none; path: a mesh file, or None for the
    procedural object number `number`; source: how the list calls the file, free of the machine's folders.
    """

    id: str
    split: str
    path: Path | None
    number: int = 0
    source: str = ""


@contextmanager
def open_assets(path: Path, split: str = "") -> Iterator[list[Asset]]:
    """Yields the assets of `path`, sorted as it lists them; their files are there until the block ends.

    path: a folder of meshes, searched with its subfolders; a zip file of such a folder (also .sh3f), unpacked to a
    temporary place; a .csv file with the columns id, path and maybe split; or any other text file with one path a
    line (# starts a comment). Paths are relative to their list. split: of what the list gives none (see `hold_out`).

    An id is the path below the folder with _ between its parts, or the file's name in a list; for
    <name>/meshes/model.obj, the layout of Google Scanned Objects, it is <name>.
    Raises UserError when there is nothing, an id comes twice or is no name, or a zip member leads out of its folder.
    """
    with ExitStack() as stack:
        try:
            if path.is_dir():
                assets = _in_folder(path)
            elif path.suffix.lower() in ZIP_SUFFIXES:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="assets-")))
                safe_unzip(path, folder)
                assets = _in_folder(folder)
            else:
                assets = _in_csv(path) if path.suffix.lower() == ".csv" else _in_list(path)
        except (OSError, UnicodeDecodeError, csv.Error, zipfile.BadZipFile, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"{path}: cannot be read ({reason}); give a folder, zip, list or csv file") from error
        yield _checked(path, [replace(asset, split=asset.split or split) for asset in assets])


def hash_position(text: str) -> float:
    """A number in [0, 1) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def hold_out(assets: list[Asset], share: float) -> list[Asset]:
    """The same assets, each with a split.

    If none has one, `share` of them (by hash_position, and one at least of several; 0: none) are for validation. All
    others without a split are for training.
    """
    held_out = set()
    if share and len(assets) > 1 and not any(asset.split for asset in assets):
        places = {asset.id: hash_position(asset.id) for asset in assets}
        held_out = {min(places, key=places.get), *(name for name, place in places.items() if place < share)}
    return [replace(a, split=a.split or ("val" if a.id in held_out else "train")) for a in assets]


def _in_folder(folder: Path) -> list[Asset]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in MESH_SUFFIXES and p.is_file())
    names = [p.relative_to(folder) for p in files]
    hidden = [any(part.startswith((".", "__MACOSX")) for part in name.parts) for name in names]
    return [
        Asset(_asset_id(name), "", path, source=name.as_posix())
        for path, name, skip in zip(files, names, hidden, strict=True)
        if not skip
    ]


def _in_csv(path: Path) -> list[Asset]:
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if not {"id", "path"} <= set(reader.fieldnames or ()):
        raise UserError(f"{path}: needs the columns id and path, and may have split")
    if any(row["path"] is None for row in rows):
        raise UserError(f"{path}: a row is shorter than the header")
    return [
        Asset(r["id"], r.get("split") or "", path.parent / r["path"], source=_source(Path(r["path"]))) for r in rows
    ]


def _in_list(path: Path) -> list[Asset]:
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [Path(line) for line in lines if line]
    parts = [Path(*name.parts[-3:]) if _is_scanned(name) else Path(name.name) for name in names]
    return [
        Asset(_asset_id(part), "", path.parent / name, source=_source(name))
        for name, part in zip(names, parts, strict=True)
    ]


def _source(name: Path) -> str:
    return name.name if name.is_absolute() else name.as_posix()


def _is_scanned(name: Path) -> bool:
    return len(name.parts) >= 3 and name.parts[-2:] == ("meshes", "model.obj")


def _asset_id(name: Path) -> str:
    name = name.parent.parent if _is_scanned(name) else name.with_suffix("")
    return re.sub(r"[^\w.+-]+", "-", "_".join(name.parts)).lstrip(".")


def _checked(path: Path, assets: list[Asset]) -> list[Asset]:
    if not assets:
        raise UserError(f"{path}: no assets; it needs files like {', '.join(MESH_SUFFIXES)} or rows that name some")
    seen = {}
    for asset in assets:
        if asset.split not in ("", *SPLITS):
            raise UserError(f"{path}: '{asset.id}' has split '{asset.split}', not {', '.join(SPLITS)}")
        if not re.fullmatch(r"[^\s./\\][^\s/\\]*", asset.id or ""):
            raise UserError(f"{path}: '{asset.id}' is no name for a folder; use letters, digits, . _ + -")
        if asset.id in seen:
            both = f"{seen[asset.id]} and {asset.source}"
            raise UserError(f"{path}: the id '{asset.id}' occurs twice ({both}); give a csv file with ids of your own")
        seen[asset.id] = asset.source
    return assets


def safe_unzip(archive: Path, target: Path) -> None:
    """Unzip into `target`. Raises OSError, naming the member, before writing anything if one would land outside."""
    root = target.resolve()
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = (root / member.filename.lstrip("/")).resolve()
            if not path.is_relative_to(root) or "\\" in member.filename:
                raise OSError(f"{archive.name}: member '{member.filename}' leads out of the folder")
        for member in file.infolist():
            path = root / member.filename.lstrip("/")
            if not member.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read(member))
