"""Checks of orbits on disk (the format of data/orbits.py).

An orbit with a problem must not be trained on. A degenerate orbit is valid, but its object is hardly worth learning
from; it is reported and stays in the good lists. Both are texts "kind: details".
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ouroboros3d import files
from ouroboros3d.data.orbit_files import RIGID, DataError, first_names, read_depth, read_meta
from ouroboros3d.errors import one_line

MISSING = "missing: there is no such folder"
SOURCE_HASHES = ("source_sha256", "sha256")  # keys of meta.json
VISIBLE = 26  # of 255: less alpha than this counts as empty, so that no stray ray makes a silhouette
DEGREES, RELATIVE = 0.1, 1e-3  # tolerances of angles, and of distances
DEPTH_COVER = 0.1  # by how much the cover of depth maps and pictures may differ, as a share of the picture
# Where an object counts as degenerate. Chosen by eye on the contact sheets of the furniture and procedural sets.
TINY_EXTENT, TINY_COVER, FLAT, ONE_COLOUR = 0.3, 0.02, 0.1, 4.0


@dataclass
class OrbitReport:
    """What was found in one orbit. None: could not be told.

    size: pixels per side; fov, elevation: degrees; distance: world units; cover: mean share of visible pixels, in
    [0, 1]; extent: the longest side of the silhouettes, as a share of the picture; source: what the meta file says
    of the asset, its hash if there; digest: of the pictures.
    """

    id: str
    problems: list[str] = field(default_factory=list)
    degenerate: list[str] = field(default_factory=list)
    size: int | None = None
    fov: float | None = None
    distance: float | None = None
    elevation: float | None = None
    cover: float | None = None
    extent: float | None = None
    source: str | None = None
    digest: str | None = None

    @property
    def good(self) -> bool:
        return not self.problems


def check_orbit(root: Path, orbit_id: str, frames: int = 16, strict: bool = False) -> OrbitReport:
    """Everything one orbit of `frames` views can be checked for by itself; strict: its warnings are problems. Never
    raises."""
    report, folder = OrbitReport(orbit_id), root / orbit_id
    meta_file = folder / "meta.json"
    try:
        if not folder.is_dir():
            report.problems.append(MISSING)
            return report
    except OSError as error:
        report.problems.append(f"name: {error.strerror}")
        return report
    try:
        meta = read_meta(meta_file, frames)
        extra = json.loads(meta_file.read_bytes())
    except DataError as error:
        report.problems.append(f"meta: {_short(error, meta_file)}")
        return report
    report.fov = meta.fov
    report.source = next((str(extra[k]) for k in SOURCE_HASHES if extra.get(k)), None)
    problems, report.distance, report.elevation = check_poses(meta.c2w.numpy())
    if strict and extra.get("warnings"):
        report.problems += [f"warning: {text}" for text in extra["warnings"]]
    stated = extra.get("elevation")
    if not problems and isinstance(stated, int | float) and abs(stated - report.elevation) > DEGREES:
        problems = [f"elevation: the file says {stated:.2f}, the matrices {report.elevation:.2f} degrees"]
    report.problems += problems
    if len(set(meta.names)) < len(meta.names):
        report.problems.append("meta: two frames have the same picture")
    _check_pictures(report, [folder / name for name in meta.names])
    if (folder / "depth.npz").exists():
        _check_depth(report, folder / "depth.npz", frames)
    return report


def check_poses(c2w: np.ndarray) -> tuple[list[str], float | None, float | None]:
    """Problems, distance and elevation (degrees) of camera-to-world matrices [N, 4, 4], OpenGL axes, z up.

    An orbit is a level circle around the z axis: rigid matrices, one distance, one elevation, every camera upright
    and looking at the origin, azimuths 360 / N apart and growing from +x towards +y.
    """
    rotation, centre = c2w[:, :3, :3], c2w[:, :3, 3]
    off = np.abs(np.swapaxes(rotation, 1, 2) @ rotation - np.eye(3)).max((1, 2))
    off = np.maximum(off, np.abs(c2w[:, 3] - [0, 0, 0, 1]).max(1))
    broken = np.flatnonzero((off > RIGID) | (np.linalg.det(rotation) < 0))
    if len(broken):
        return [f"pose: the matrix of {_frames(broken)} is no rotation and translation"], None, None
    distances = np.linalg.norm(centre, axis=1)
    distance = float(distances.mean())
    if distances.min() < RELATIVE * max(distance, 1e-9):
        return ["pose: a camera stands at the origin"], None, None
    back = centre / distances[:, None]
    elevations = np.degrees(np.arcsin(back[:, 2].clip(-1, 1)))
    elevation = float(elevations.mean())
    problems = []
    if np.ptp(distances) > RELATIVE * distance:
        problems.append(f"pose: distances from {distances.min():.4g} to {distances.max():.4g}")
    if np.ptp(elevations) > DEGREES:
        problems.append(f"pose: elevations from {elevations.min():.2f} to {elevations.max():.2f} degrees")
    past = np.degrees(np.linalg.norm(np.cross(rotation[:, :, 2], back), axis=1))  # small angles
    past[(rotation[:, :, 2] * back).sum(1) < 0] = 180
    if past.max() > DEGREES:
        problems.append(f"pose: {_frames(np.flatnonzero(past > DEGREES))} does not look at the origin")
    elif (np.abs(rotation[:, 2, 0]) > np.radians(DEGREES)).any() or (rotation[:, 2, 1] < 0).any():
        problems.append("pose: a camera is rolled, or z is not up")
    return problems + _check_azimuths(np.degrees(np.arctan2(back[:, 1], back[:, 0]))), distance, elevation


def _check_azimuths(azimuths: np.ndarray) -> list[str]:
    """Problems of azimuths in degrees, in orbit order."""
    count = len(azimuths)
    ordered = np.sort(azimuths % 360)
    distinct = int((np.diff(ordered, append=ordered[0] + 360) > DEGREES).sum())
    if distinct < count:
        return [f"azimuth: only {distinct} of {count} are distinct"]
    steps = np.diff(azimuths, append=azimuths[0]) % 360
    if np.abs(steps - 360 / count).max() <= DEGREES:
        return []
    if np.abs(steps - (360 - 360 / count)).max() <= DEGREES:
        return ["azimuth: the orbit runs clockwise, seen from above"]
    return [f"azimuth: steps from {steps.min():.2f} to {steps.max():.2f} degrees instead of {360 / count:.2f}"]


def _check_pictures(report: OrbitReport, paths: list[Path]) -> None:
    """Adds what the pictures show to the report."""
    found: dict[str, list[str]] = defaultdict(list)
    boxes, colours, sizes, digest = [], [], set(), hashlib.sha256()
    for path in paths:
        try:
            rgba = read_picture(path)
        except DataError as error:
            found[f"picture: {_short(error, path)}"].append(path.name)
            continue
        digest.update(np.ascontiguousarray(rgba))
        sizes.add(rgba.shape[:2])
        visible = rgba[..., 3] >= VISIBLE
        if not visible.any():
            found["empty: alpha is nowhere visible"].append(path.name)
            continue
        if visible.all():
            found["full: alpha has no empty pixel"].append(path.name)
        elif visible[[0, -1]].any() or visible[:, [0, -1]].any():
            found["cut: the object touches the border"].append(path.name)
        rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
        height, width = visible.shape
        boxes.append(((np.ptp(columns) + 1) / width, (np.ptp(rows) + 1) / height, visible.mean()))
        rgb = rgba[..., :3][visible].astype(np.float32)
        colours.append((rgb.mean(0), (rgb**2).mean(0)))
    for problem, names in found.items():
        report.problems.append(f"{problem} ({names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''})")
    if len(sizes) > 1:
        report.problems.append("size: the pictures differ: " + ", ".join(f"{w} x {h}" for h, w in sorted(sizes)))
    elif sizes:
        height, width = sizes.pop()
        report.size = width
        if height != width:
            report.problems.append(f"size: {width} x {height} is not square")
    if boxes:
        report.cover, report.extent = float(np.mean(boxes, 0)[2]), float(np.max(boxes, 0)[:2].max())
    if len(boxes) == len(paths):
        report.digest = digest.hexdigest()[:16]
        report.degenerate = _degenerate(np.array(boxes), np.array(colours), report)


def read_picture(path: Path) -> np.ndarray:
    """A picture as it is on disk, [h, w, 4] uint8; raises DataError, also where the dataset would convert it."""
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode != "RGBA":
                raise DataError(f"{path}: is {picture.mode}, it has no alpha channel")
            return np.asarray(picture)
    except DataError:
        raise
    except Exception as error:  # a decoder raises whatever it trips over
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def _check_depth(report: OrbitReport, path: Path, frames: int) -> None:
    try:
        depth = read_depth(path, frames).numpy()
    except DataError as error:
        report.problems.append(f"depth: {_short(error, path)}")
        return
    cover = float((depth > 0).mean())
    if not np.isfinite(depth).all() or (depth < 0).any():
        report.problems.append("depth: not finite or negative")
    elif report.cover is not None and abs(cover - report.cover) > DEPTH_COVER:
        report.problems.append(f"depth: covers {cover:.0%} of the picture, alpha {report.cover:.0%}")


def _degenerate(boxes: np.ndarray, colours: np.ndarray, report: OrbitReport) -> list[str]:
    """boxes [N, 3]: width, height and cover of the silhouettes; colours [N, 2, 3]: mean and mean square, of 255."""
    out = []
    if report.extent < TINY_EXTENT or report.cover < TINY_COVER:
        out.append(f"tiny: {report.extent:.0%} of the picture's width, {report.cover:.1%} of its area")
    sides = _box_sides(boxes[:, 0], boxes[:, 1], report.elevation)
    share = sides.min() / sides.max()
    if share < FLAT:
        out.append(f"flat: its thinnest side is about {share:.0%} of its longest")
    mean, square = np.average(colours, axis=0, weights=boxes[:, 2])
    deviation = float(np.sqrt(np.maximum(square - mean**2, 0)).max())
    if deviation < ONE_COLOUR:
        out.append(f"one colour: {', '.join(f'{c:.0f}' for c in mean)} of 255, deviation {deviation:.1f}")
    return out


def _box_sides(width: np.ndarray, height: np.ndarray, elevation: float | None) -> np.ndarray:
    """Sides [3] of the upright box whose silhouettes are about as wide and high as those of an orbit, [N] each.

    Without perspective, a box turned by an angle a is long |cos a| + deep |sin a| wide, and deep |cos a| + long |sin a|
    deep. A camera above it sees the height and, foreshortened, the top.
    """
    azimuth = 2 * np.pi * np.arange(len(width)) / len(width)
    best = np.inf
    for turn in np.radians(np.arange(0, 90, 2)):
        cos, sin = np.abs(np.cos(azimuth - turn)), np.abs(np.sin(azimuth - turn))
        model = np.stack([cos, sin], 1)
        found = np.linalg.lstsq(model, width, rcond=None)[0].clip(0)
        error = np.square(model @ found - width).sum()
        if error < best:
            best, footprint, depth = error, found, model[:, ::-1] @ found
    angle = np.radians(abs(elevation or 0.0))
    upright = np.median(height - depth * np.sin(angle)) / max(np.cos(angle), 0.1)
    return np.array([*footprint, max(0.0, upright)])


# ---------------------------------------------------------------- the set


def find_orbits(root: Path) -> list[str]:
    """Names of the folders in `root` that hold a meta.json or a picture, sorted; hidden ones are unfinished work."""
    folders = (p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(p.name for p in folders if (p / "meta.json").exists() or any(p.glob("*.webp")))


def read_list(path: Path) -> tuple[list[str], list[str]]:
    """The distinct ids of a list file, in its order, and what is wrong with it. Raises DataError."""
    try:
        lines = files.read_list(path)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error}); check the root and the list's name") from error
    counts = Counter(lines)  # in the order of the file
    problems = [f"blank: {counts.pop('')} blank lines"] if "" in counts else []
    twice = [i for i, count in counts.items() if count > 1]
    if twice:
        problems.append(f"duplicate: {first_names(twice)} more than once")
    return list(counts), problems


def check_set(
    reports: Mapping[str, OrbitReport], lists: Mapping[str, list[str]], size: int | None = None
) -> dict[str, list[str]]:
    """What only shows across orbits: adds to their problems, and returns those of the lists by their name.

    size: of all pictures, in pixels; None: the one that most have. lists: ids by list, training first; what stands in
    several lists stays good in the last of them (see `good_lists`).
    """
    sizes = [r.size for r in reports.values() if r.size is not None]
    expected = size or max(set(sizes), key=sizes.count, default=None)
    first: dict[str, str] = {}
    for report in reports.values():
        if report.size is not None and report.size != expected:
            report.problems.append(f"size: {report.size} pixels per side instead of {expected}")
        if report.digest and (other := first.setdefault(report.digest, report.id)) != report.id:
            report.problems.append(f"duplicate: has the pictures of {other}")
    problems: dict[str, list[str]] = {name: [] for name in lists}
    names = list(lists)
    for k, name in enumerate(names):
        missing = [i for i in lists[name] if i not in reports or reports[i].problems[:1] == [MISSING]]
        if missing:
            problems[name].append(f"missing: no folder for {first_names(missing)}")
        for other in names[k + 1 :]:
            shared = sorted(set(lists[name]) & set(lists[other]))
            if shared:
                problems[name].append(f"overlap: {first_names(shared)} stand in {other} too")
            sources = {reports[i].source for i in lists[other] if i in reports and reports[i].source}
            same = [i for i in lists[name] if i not in shared and i in reports and reports[i].source in sources]
            if same:
                problems[name].append(f"overlap: {first_names(same)} show an asset that {other} shows too")
    return problems


def good_lists(reports: Mapping[str, OrbitReport], lists: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The good ids of every list, in its order, without what a later list holds too: held-out objects stay so."""
    good: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name in reversed(lists):
        good[name] = [i for i in lists[name] if reports[i].good and not {i, reports[i].source} & seen]
        seen.update(*({i, reports[i].source} - {None} for i in lists[name]))
    return {name: good[name] for name in lists}


def _short(error: Exception, path: Path) -> str:
    """The message without the folder, which the report names, and without the way out, which is the same for all."""
    return str(error).replace(f"{path}: ", "").split("; ")[0]


def _frames(indices: np.ndarray) -> str:
    return "frame " + first_names([str(k) for k in indices])
