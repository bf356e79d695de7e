"""From assets to orbits on disk: shared by scripts/render_orbits.py and scripts/render_eval.py.

An orbit's folder appears when it is complete. Assets are rendered in worker processes; one that fails or crashes its
process is reported, and the others continue. A full or read-only disk ends the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ouroboros3d import __version__
from ouroboros3d.camera_defaults import DISTANCE, FOV
from ouroboros3d.errors import UserError
from ouroboros3d.files import check_writable_dir, staged, write_json, write_lines

from .assets import OUTCOMES, SPLITS, Asset, AssetError, Findings, hold_out
from .blender import BlenderScene
from .meshes import load_surface
from .procedural import random_object
from .raycast import Raycaster, orbit_pose
from .surface import OBJECT_RADIUS
from .workers import Outcome, run_all

FRAMES = 16
ELEVATIONS = (-5.0, 30.0)
MAX_FACES = 5_000_000  # 3 GB of memory a worker, with light and without textures
FILL = float(np.tan(np.arcsin(OBJECT_RADIUS / DISTANCE)) / np.tan(np.radians(FOV / 2)))  # 0.832
MAX_NAME = 255  # bytes, on all usual file systems
STALE = 3600  # seconds without a new file, after which a hidden folder belongs to a killed run


@dataclass(frozen=True)
class Settings:
    """How to render.

    size: pixels per side; samples: rays per pixel and axis (light) or paths per pixel (blender); depth: pixels per side
    of depth.npz, 0 = none; up: axis of the files; fov: degrees; distance: of the camera from the origin, world
    units; fill: width of the sphere around the object in the picture, as a share of the picture's; device, denoise
    and threads (0 = all): of Cycles; stretch: most that an axis of an object is stretched or shrunk by, 1 = not at all;
    max_faces: more triangles are refused.
    """

    out: Path
    size: int = 512
    samples: int = 3
    orbits: int = 2
    depth: int = 0
    seed: int = 0
    up: str = "y"
    backend: str = "light"
    fov: float = FOV
    distance: float = DISTANCE
    fill: float = FILL
    device: str = "cpu"
    denoise: bool = False
    threads: int = 0
    stretch: float = 1.0
    max_faces: int = MAX_FACES

    @property
    def radius(self) -> float:
        """Of the sphere around every object, in world units."""
        return self.distance * float(np.sin(np.arctan(self.fill * np.tan(np.radians(self.fov / 2)))))

    def shared(self) -> dict[str, Any]:
        """What the pictures of one folder must have in common."""
        own = ("out", "orbits", "threads", "max_faces")
        return {key: value for key, value in asdict(self).items() if key not in own}


Scene = Raycaster | BlenderScene  # one normalised asset that can be looked at


def light_backend(asset: Asset, settings: Settings, findings: Findings) -> tuple[Scene, str]:
    """Embree on the CPU: the scene, and what drew it. Raises AssetError."""
    name = f"ouroboros3d {__version__}, embreex {version('embreex')}"
    if asset.path is None:
        return Raycaster(random_object(settings.seed, asset.number, settings.radius)), name
    texture = max(256, 2 * settings.size)
    stretch = stretch_factors(asset, settings)
    surface = load_surface(asset.path, settings.up, texture, settings.radius, settings.max_faces, findings, stretch)
    return Raycaster(surface), name


def blender_backend(asset: Asset, settings: Settings, findings: Findings) -> tuple[Scene, str]:
    """Cycles. Raises AssetError, and UserError where it cannot run."""
    names = ("up", "radius", "max_faces", "device", "denoise", "threads", "seed")
    scene = BlenderScene(asset.path, findings=findings, **{name: getattr(settings, name) for name in names})
    return scene, scene.version


BACKENDS: dict[str, Callable[[Asset, Settings, Findings], tuple[Scene, str]]] = {
    "light": light_backend,
    "blender": blender_backend,
}
SAMPLES = {"light": 3, "blender": 64}


@dataclass(frozen=True)
class Orbit:
    """A folder to fill: its name, and the first camera's azimuth and the elevation in degrees."""

    name: str
    azimuth: float
    elevation: float

    def poses(self, distance: float) -> list[np.ndarray]:
        """The 16 camera-to-world matrices [4, 4] (OpenGL axes); the azimuth grows from frame to frame."""
        return [orbit_pose(self.azimuth + 360 * k / FRAMES, self.elevation, distance) for k in range(FRAMES)]


def training_orbits(asset: Asset, settings: Settings) -> list[Orbit]:
    """Orbits of random elevation and start, the same on every machine."""
    orbits = []
    for k in range(settings.orbits):
        rng = np.random.default_rng([settings.seed, k, zlib.crc32(asset.id.encode())])
        elevation, start = float(rng.uniform(*ELEVATIONS)), float(rng.uniform(0, 360))
        orbits.append(Orbit(f"{asset.id}_{k}", start, elevation))
    return orbits


def stretch_factors(asset: Asset, settings: Settings) -> list[float]:
    """Of x, y and z, with z up: from 1 / settings.stretch to settings.stretch, evenly in their logarithm, the same on
    every machine."""
    rng = np.random.default_rng([settings.seed, zlib.crc32(asset.id.encode())])
    return (settings.stretch ** rng.uniform(-1, 1, 3)).tolist()


@dataclass(frozen=True)
class OpenAsset:
    """An asset that has been loaded, and all that meta.json says about it."""

    asset: Asset
    scene: Scene
    meta: dict[str, Any]

    @classmethod
    def load(cls, asset: Asset, settings: Settings, findings: Findings | None = None) -> OpenAsset:
        """Raises AssetError, and UserError where the backend cannot run. findings: takes what the reader met."""
        findings = Findings() if findings is None else findings
        try:
            scene, renderer = BACKENDS[settings.backend](asset, settings, findings)
            digest = hashlib.sha256(asset.path.read_bytes()).hexdigest() if asset.path else None
        except OSError as error:
            raise AssetError(f"{asset.path}: {error.strerror or error}") from error
        surface = scene.surface
        meta = {
            "camera_angle_x": float(np.radians(settings.fov)),
            "distance": settings.distance,
            "fill": settings.fill,
            "seed": settings.seed,
            "renderer": settings.backend,
            "renderer_version": renderer,
            "samples": settings.samples,
            "source": (asset.source or asset.path.name) if asset.path else f"procedural {asset.number}",
            "source_sha256": digest,
            "warnings": list(findings.warnings),
            "features": dict(sorted(findings.features.items())),
            # world = scale * (stretch * (file, turned to z up) - centre)
            "normalisation": {"up": settings.up, "centre": surface.centre.tolist(), "scale": float(surface.scale)},
        }
        if settings.stretch != 1:
            meta["normalisation"]["stretch"] = stretch_factors(asset, settings)
        return cls(asset, scene, meta)

    def write_orbit(self, folder: Path, orbit: Orbit, settings: Settings) -> None:
        """Render an orbit into an empty folder. Raises AssetError if nothing is to be seen."""
        poses = orbit.poses(settings.distance)
        locations, visible = [], False
        for k, pose in enumerate(poses):
            name = f"render_{k:04d}.webp"
            image = self.scene.render(pose, settings.size, settings.samples, settings.fov)
            visible = visible or bool(image[..., 3].any())
            Image.fromarray(image).save(folder / name, lossless=True, quality=50, method=3)
            locations.append({"index": f"{k:04d}", "frames": [{"name": name}], "transform_matrix": pose.tolist()})
        if not visible:
            raise AssetError(f"{self.asset.path}: nothing is to be seen from any side")
        if settings.depth:
            depth = np.stack([self.scene.depth(pose, settings.depth, settings.fov) for pose in poses])
            np.savez_compressed(folder / "depth.npz", depth=depth.astype(np.float16))
        meta = {**self.meta, "elevation": orbit.elevation, "azimuth": orbit.azimuth, "locations": locations}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def is_finished(folder: Path) -> bool:
    """Whether an orbit's folder is complete: the meta file comes last."""
    try:
        return (folder / "meta.json").is_file()
    except OSError:  # a name that no folder can have
        return False


def render_asset(
    asset: Asset,
    settings: Settings,
    plan: Callable[[Asset, Settings], list[Orbit]] = training_orbits,
    finish: Callable[[Path, OpenAsset], None] | None = None,
) -> Outcome:
    """Render those orbits of `plan` that are not there yet; `finish` may add files to their folders.

    What is wrong with the asset is in the outcome. Raises OutputError when an orbit cannot be written.
    """
    begin, busy, views = time.perf_counter(), time.process_time(), 0
    orbits = plan(asset, settings)
    longest = max(len(os.fsencode(orbit.name)) for orbit in orbits)
    if longest > MAX_NAME:
        names = f"folders would have names of {longest} bytes, {MAX_NAME} is the most"
        return Outcome(asset, f"its id is too long: {names}")
    missing = [orbit for orbit in orbits if not is_finished(settings.out / orbit.name)]
    if not missing:
        meta = _finished_meta(settings.out / orbits[0].name)
        return Outcome(asset, None, meta.get("warnings", []), meta.get("features", {}))
    findings = Findings()
    try:
        opened = OpenAsset.load(asset, settings, findings)
        for orbit in missing:
            with staged(settings.out) as stage:
                folder = stage / orbit.name
                folder.mkdir()
                opened.write_orbit(folder, orbit, settings)
                if finish:
                    finish(folder, opened)
            views += FRAMES
    except UserError:
        raise
    except MemoryError:
        return Outcome(asset, f"{asset.source or asset.id}: not enough memory", features=findings.features)
    except Exception as error:  # files can be wrong in more ways than their readers know
        reason = str(error) if isinstance(error, AssetError) else f"{asset.path}: {type(error).__name__}: {error}"
        return Outcome(asset, _one_line(reason), features=findings.features)
    seconds, processor = time.perf_counter() - begin, time.process_time() - busy
    warnings = [_one_line(text) for text in findings.warnings]
    return Outcome(asset, None, warnings, findings.features, views, seconds, processor)


def _one_line(text: str) -> str:
    """With names that are no Unicode spelt out."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())[:1000]


def _finished_meta(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "meta.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'meta.json'}: is no JSON ({error}); delete {folder} to render it again") from error


def prepare_out(settings: Settings, **more: Any) -> None:
    """Make the output folder, sweep up after killed runs, and hold it to one set of options; raises UserError.

    more: options beside those of the settings that all pictures share.
    """
    check_writable_dir(settings.out)
    for folder in settings.out.glob(".tmp-*"):
        with suppress(OSError):  # another job's, finished meanwhile
            newest = max(path.stat().st_mtime for path in (folder, *folder.glob("*"), *folder.glob("*/*")))
            if time.time() - newest > STALE:
                shutil.rmtree(folder, ignore_errors=True)
    path, now = settings.out / "render.json", settings.shared() | more
    if path.is_file():
        try:
            before = {"stretch": 1.0} | json.loads(path.read_text())  # older files do not name it
            changed = [f"{k} was {before[k]} and is now {now[k]}" for k in now if before[k] != now[k]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: cannot be used ({error}); delete it if the folder's pictures are sound"
            ) from error
        if changed:
            raise UserError(f"{path}: {', '.join(changed)}; take the same options again or another --out")
    else:
        write_json(path, now)


def write_lists(assets: list[Asset], settings: Settings, val_share: float) -> dict[str, int]:
    """Write train.txt, val.txt and test.txt, of all finished training orbits of these assets; returns their lengths.

    val_share: see assets.hold_out.
    """
    counts, finished = {}, {}
    for asset in assets:
        names = [orbit.name for orbit in training_orbits(asset, settings)]
        finished[asset.id] = [name for name in names if is_finished(settings.out / name)]
    rendered = hold_out([asset for asset in assets if finished[asset.id]], val_share)
    for split in SPLITS:
        names = [name for asset in rendered if asset.split == split for name in finished[asset.id]]
        counts[split] = len(names)
        write_lines(settings.out / f"{split}.txt", names)
    return counts


def write_report(path: Path, lines: list[str]) -> None:
    """The lines, sorted, or no file if there are none."""
    if lines:
        write_lines(path, sorted(lines))
    else:
        path.unlink(missing_ok=True)


def feature_table(outcomes: list[Outcome]) -> list[str]:
    """Lines: every feature met, the objects that have it, and how many were rendered, approximated or refused."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for feature, kind in outcome.features.items():
            counts.setdefault(feature, Counter())[kind] += 1
    width = max(map(len, [*counts, "feature"]))
    head = [f"{'feature':{width}}  objects  {'  '.join(OUTCOMES)}"] if counts else []
    rows = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    cells = [(name, row, "  ".join(f"{row[kind]:>{len(kind)}}" for kind in OUTCOMES)) for name, row in rows]
    return head + [f"{name:{width}}  {row.total():>7}  {text}" for name, row, text in cells]


def render_set(
    chosen: list[Asset], work: Callable[[Asset], Outcome], settings: Settings, workers: int, shard: str = ""
) -> list[Outcome]:
    """Render all, with a progress bar; writes failures.txt and warnings.txt, prints the features met and the speed.
    Returns outcomes.

    shard: part of the reports' names. Raises UserError, also if nothing could be rendered.
    """
    begin, outcomes, failed = time.perf_counter(), [], 0
    with tqdm(total=len(chosen), unit="object") as bar:
        for outcome in run_all(work, chosen, workers):
            outcomes.append(outcome)
            if outcome.failure:
                failed += 1
                tqdm.write(f"{outcome.asset.id}: {outcome.failure}", file=sys.stderr)
            bar.set_postfix(failed=failed, refresh=False)
            bar.update()
    seconds = time.perf_counter() - begin
    write_report(settings.out / f"failures{shard}.txt", [f"{o.asset.id}\t{o.failure}" for o in outcomes if o.failure])
    write_report(settings.out / f"warnings{shard}.txt", [f"{o.asset.id}\t{w}" for o in outcomes for w in o.warnings])
    rendered = [o for o in outcomes if o.views]
    if rendered:
        views = sum(o.views for o in rendered)
        view, processor = sum(o.seconds for o in rendered) / views, sum(o.processor for o in rendered) / views
        print(
            f"rendered {len(rendered)} objects in {seconds:.1f} s: {3600 * len(rendered) / seconds:,.0f} an hour; "
            f"{view:.3f} s per view in each of {workers} workers, loading included ({processor:.3f} CPU s)"
        )
    print("\n".join(feature_table(outcomes)))
    warned = sum(bool(o.warnings) for o in outcomes)
    print(f"{settings.out}: {failed} of {len(chosen)} objects failed, {warned} have warnings")
    if chosen and failed == len(chosen):
        raise UserError(f"{settings.out / f'failures{shard}.txt'}: nothing could be rendered; the file says why")
    return outcomes
