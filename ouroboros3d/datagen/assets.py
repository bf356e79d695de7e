"""Finds 3D assets in a folder, a list, a csv file or a zip catalogue."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ouroboros3d.errors import UserError, one_line
from ouroboros3d.files import read_lines, read_table

SPLITS = ("train", "val", "test")
MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".fbx")
_HIDDEN = (".", "__MACOSX")
ZIP_SUFFIXES = (".zip", ".sh3f")
MAX_RATIO, MIN_BOMB = 100, 1_000_000_000  # of a zip file: meshes shrink to a fifth, textures hardly; bytes


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
                assets = _in_list(path)
        except (OSError, UnicodeError, csv.Error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"{path}: cannot be read ({one_line(error)}); give a folder, zip, list or csv file"
            ) from error
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
    """Meshes below a folder; one that cannot be opened becomes an asset, so that it is among the failures."""
    found: list[Path] = []

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == folder:
            raise error
        found.append(Path(error.filename))

    for path, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        meshes = [Path(path, name) for name in files if not name.startswith(_HIDDEN)]
        found += [mesh for mesh in meshes if mesh.suffix.lower() in MESH_SUFFIXES and mesh.is_file()]
    names = [path.relative_to(folder) for path in sorted(found)]
    return [Asset(_asset_id(name, whole=True), "", folder / name, source=name.as_posix()) for name in names]


def _in_list(path: Path) -> list[Asset]:
    rows = read_table(path, ["id", "path"])
    if rows is not None:
        return [
            Asset(r["id"], r.get("split", ""), path.parent / r["path"], source=_source(Path(r["path"]))) for r in rows
        ]
    if path.suffix.lower() == ".csv":
        raise UserError(f"{path}: needs the columns id and path, and may have split; separated by , or ;")
    lines = [line.partition("#")[0].strip().rstrip(";").rstrip() for line in read_lines(path)]
    names = [Path(line.strip('"')) for line in lines if line]
    return [Asset(_asset_id(name, whole=False), "", path.parent / name, source=_source(name)) for name in names]


def _source(name: Path) -> str:
    return name.name if name.is_absolute() else name.as_posix()


def _asset_id(name: Path, whole: bool) -> str:
    """Of a path, or of its end alone."""
    scanned = len(name.parts) >= 3 and name.parts[-2:] == ("meshes", "model.obj")
    name = name.parent.parent if scanned else name.with_suffix("")
    return re.sub(r"[^\w.+-]+", "-", "_".join(name.parts if whole else name.parts[-1:])).lstrip(".")


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
    """Unzip into `target`. Raises OSError before writing anything if a member would land outside, or if the archive
    unpacks to more than MAX_RATIO times its size (and MIN_BOMB) or than the disk holds."""
    root = target.resolve()
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            path = (root / member.filename.lstrip("/")).resolve()
            if not path.is_relative_to(root) or "\\" in member.filename:
                raise OSError(f"{archive.name}: member '{member.filename}' leads out of the folder")
        size, free = sum(member.file_size for member in members), shutil.disk_usage(_existing(root)).free
        if size > max(MIN_BOMB, MAX_RATIO * archive.stat().st_size):
            raise OSError(f"{archive.name}: unpacks to {size:,} bytes, more than {MAX_RATIO} times its size")
        if size > 0.9 * free:
            raise OSError(f"{archive.name}: unpacks to {size / 1e9:.0f} GB, the disk has {free / 1e9:.0f}")
        for member in members:
            path = root / member.filename.lstrip("/")
            if not member.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                with file.open(member) as source, open(path, "wb") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.is_dir())
