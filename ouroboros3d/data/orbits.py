"""Training examples from orbits of rendered objects on disk.

    <root>/<id>/render_0000.webp ...    RGBA views, in orbit order
    <root>/<id>/meta.json               camera_angle_x and one OpenGL camera-to-world matrix per view
    <root>/<id>/depth.npz               optional: `depth` [frames, h, w] along the camera's axis, 0 = empty
    <root>/train.txt                    one id per line

`scripts/render_orbits.py` writes this format, `scripts/make_shards.py` packs it into tar files (shards.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ouroboros3d.cameras import frame_indices, intrinsics_from_fov, opengl_to_opencv, relative_to_first
from ouroboros3d.config.schema import BACKGROUNDS, Config
from ouroboros3d.data.cache import ViewCache, fill_disk, fill_memory, fingerprint, record_type
from ouroboros3d.data.orbit_files import (
    DamagedOrbit,
    DataError,
    Ids,
    Views,
    first_names,
    read_depth,
    read_ids,
    read_poses,
    read_rgba,
    read_views,
)
from ouroboros3d.data.remote import local_root
from ouroboros3d.data.shards import open_orbits

_log = logging.getLogger(__name__)


class OrbitDataset(Dataset):
    """One example is `cameras.num_views` views of an orbit, of which the first is the condition image.

    Item, with V views of H = W = `model.image_size` pixels:
        images  [V, 3, H, W] float32 in [-1, 1], composited on the background
        alpha   [V, 1, H, W] float32 in [0, 1]
        c2w     [V, 4, 4] float32, OpenCV, relative to the first view (computed in float64)
        K       [V, 3, 3] float32, in image widths
        id      name of the orbit's folder;  index  its number in the list (a neighbour's if this one is damaged)
        frames  [V] int64, which frames of the orbit these are
        background  [3] float32 in [0, 1]
        depth   [V, 1, h, w] float32 along the camera's axis, 0 = empty      with `data.depth`
        extra_images, extra_alpha, extra_c2w, extra_K, extra_frames, extra_depth    with `objective.extra_views`

    Everything random is a function of (`train.seed`, epoch, index) alone, so neither the number of workers nor a
    resume changes it.

    An orbit of which a wanted frame, meta.json or depth.npz cannot be used is replaced by the next one in the list
    that can: this too depends on the files alone, not on who found the damage or when. It is named once in the log;
    once more than `data.max_damaged` of the list was found so, by this process and its workers, reading raises
    DataError.

    `data.cache`: "memory" decodes everything now; "disk" does so into a file in `data.cache_dir`, unless there is one
    of the same list, size and unchanged files. That file is 4 frames size^2 bytes per orbit, its pages are shared by
    all processes, and it may be deleted at any time.
    """

    def __init__(self, config: Config, list_file: str, start_view: int | None = None):
        """list_file: the ids, relative to `data.root`. start_view: frame of the condition image, None draws one.
        Raises DataError if data cannot be read."""
        data, self.frames = config.data, config.cameras.orbit_frames
        if start_view is not None and not 0 <= start_view < self.frames:
            raise ValueError(f"start_view must be a frame, 0 to {self.frames - 1}, got {start_view}")
        self.data, self.start_view, self.seed = data, start_view, config.train.seed
        self.size, self.num_views = config.model.image_size, config.cameras.num_views
        self.extra_views = config.objective.extra_views
        self.root = local_root(data.root, list_file, data.cache_dir)
        self.list_file = self.root / list_file
        self.ids = Ids(read_ids(self.list_file))
        selection = config.model.conventions.view_selection
        self._offsets = frame_indices(self.frames, self.num_views, selection)
        self._damaged = torch.zeros(len(self.ids), dtype=torch.bool).share_memory_()
        self._orbits = open_orbits(self.root, self.ids)
        self._cache: ViewCache | None = None
        if data.cache != "none":
            self._cache = self._fill_cache(data.cache, Path(data.cache_dir or self.root / ".cache"), data.workers)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return self.example(0, index)

    def example(self, epoch: int, index: int) -> dict:
        """Item `index` as it is in `epoch`."""
        if not 0 <= index < len(self):  # ends `for item in dataset`
            raise IndexError(f"example {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, epoch, index])
        # Always the same draws in the same order, so that one option does not change what another one gets.
        start, mirrored = int(rng.integers(self.frames)), self.data.mirror and bool(rng.random() < 0.5)
        jitter, background, order = rng.uniform(-1, 1, 2), rng.random(3), rng.permutation(self.frames)
        if self.start_view is not None:
            start = self.start_view
        if self.data.background != "random":
            background = np.asarray(BACKGROUNDS[self.data.background])

        # A mirrored orbit runs backwards; taking its frames in reverse keeps the azimuth growing.
        chosen = [(start + (-k if mirrored else k)) % self.frames for k in self._offsets]
        chosen += [int(k) for k in order if k not in chosen][: self.extra_views]

        index, views = self._load(index, chosen)
        colour = torch.tensor(background, dtype=torch.float32)
        images, alpha = composite(views.rgba, colour, *(self.data.color_jitter * jitter))
        c2w = relative_to_first(opengl_to_opencv(views.c2w))
        item = {
            "images": images,
            "alpha": alpha,
            "c2w": mirror_poses(c2w) if mirrored else c2w,
            "K": intrinsics_from_fov(views.fov).expand(len(chosen), 3, 3).clone(),
            "frames": torch.tensor(chosen),
        }
        item["c2w"] = item["c2w"].float()
        if views.depth is not None:
            item["depth"] = views.depth[:, None].float()
        if mirrored:
            for key in item.keys() & {"images", "alpha", "depth"}:
                item[key] = item[key].flip(-1)
        if self.extra_views:
            item |= {f"extra_{key}": value[self.num_views :] for key, value in item.items()}
            for key in [key for key in item if not key.startswith("extra_")]:
                item[key] = item[key][: self.num_views]
        return item | {"id": self.ids[index], "index": index, "background": colour}

    def _load(self, index: int, chosen: list[int]) -> tuple[int, Views]:
        """The chosen frames of orbit `index`, or of the next one that has them; and the number of that orbit."""
        for position in chain(range(index, len(self)), range(index)):
            views = self._cache.get(position, chosen) if self._cache is not None else None
            try:
                if views is None:
                    views = read_views(self._orbits[position], self.frames, chosen, self.size, self.data.depth)
                return position, views
            except DamagedOrbit as error:
                self._note(position, error)
        raise AssertionError("_note lets no list be damaged as a whole")

    def _note(self, index: int, error: DamagedOrbit) -> None:
        """Names a damaged orbit, the first time; raises DataError when there are too many."""
        known = bool(self._damaged[index])
        self._damaged[index] = True
        found = self._damaged.nonzero().flatten().tolist()
        if len(found) > int(self.data.max_damaged * len(self) + 1e-9):
            raise DataError(
                f"{self.list_file}: {len(found)} of {len(self)} orbits are damaged, more than data.max_damaged "
                f"= {self.data.max_damaged:g} allows: {first_names([self.ids[k] for k in found], 20)}; "
                f"the last one: {error}"
            ) from error
        if not known:
            _log.warning("%s; until then the next orbit of the list is read in its place", error)

    def _fill_cache(self, kind: str, folder: Path, workers: int) -> ViewCache:
        dtype = record_type(self.frames, self.size, self._depth_type() if self.data.depth else None)

        def records() -> Iterable[bytes]:
            loader = DataLoader(
                _Records(self, dtype),
                batch_size=None,
                collate_fn=bytes,
                num_workers=workers,
                generator=torch.Generator(),  # so that the global one stays where it is
            )
            return tqdm(loader, desc=f"reading {self.list_file}", unit="orbit", leave=False)

        if kind == "memory":
            return fill_memory(dtype, len(self), records())
        stamps = (f"{name} {self._orbits.stamp(k)}" for k, name in enumerate(self.ids))
        name = f"{self.list_file.stem}_{self.size}px_{fingerprint(dtype, stamps)}.npy"
        return fill_disk(folder / name, dtype, len(self), records)

    def _depth_type(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of one frame's depth map, by the first orbit that has any."""
        for index in range(len(self)):
            try:
                depth = read_depth(self._orbits[index] / "depth.npz", self.frames).numpy()
                return depth.shape[1:], depth.dtype
            except DamagedOrbit as error:
                self._note(index, error)
        raise AssertionError("_note lets no list be damaged as a whole")

    def record(self, index: int, dtype: np.dtype) -> bytes:
        """Everything of one orbit that is whole, for the cache."""
        record = np.zeros((), dtype)
        try:
            folder = self._orbits[index]
            meta = read_poses(folder, self.frames)
            if self.data.depth:
                depth = read_depth(folder / "depth.npz", self.frames).numpy()
                if (depth.shape, depth.dtype) != (record["depth"].shape, record["depth"].dtype):
                    raise DataError(f"{self.root}: depth.npz files differ in size; render them with one --depth")
                record["depth"][...] = depth
        except DamagedOrbit as error:
            self._note(index, error)
            return record.tobytes()
        record["c2w"][...], record["fov"][...] = meta.c2w, meta.fov
        for k, name in enumerate(meta.names):
            try:
                record["rgba"][k] = read_rgba(folder / name, self.size)
                record["whole"][k] = True
            except DamagedOrbit as error:
                self._note(index, error)
        return record.tobytes()


class _Records(Dataset):
    """An orbit dataset's records for the cache, so that a DataLoader's workers make them."""

    def __init__(self, orbits: OrbitDataset, dtype: np.dtype) -> None:
        self.orbits, self.dtype = orbits, dtype

    def __len__(self) -> int:
        return len(self.orbits)

    def __getitem__(self, index: int) -> bytes:
        return self.orbits.record(index, self.dtype)


def composite(rgba: Tensor, background: Tensor, hue: float = 0, brightness: float = 0) -> tuple[Tensor, Tensor]:
    """RGBA [n, H, W, 4] uint8, its colours shifted, on a background [3] in [0, 1]: images [n, 3, H, W] in [-1, 1] and
    alpha [n, 1, H, W] in [0, 1]."""
    count, *size, _ = rgba.shape
    images, alphas = torch.empty(count, 3, *size), torch.empty(count, 1, *size)
    # Planes before floats and one view at a time, in place: at 512 pixels, fresh memory costs more than decoding.
    for planes, image, alpha in zip(rgba.permute(0, 3, 1, 2).contiguous(), images, alphas, strict=True):
        values = planes.float().div_(255)
        rgb = values[:3] if hue == brightness == 0 else shift_colors(values[None, :3], hue, brightness)[0]
        alpha.copy_(values[3:])
        torch.mul(rgb, alpha, out=image).add_(background[:, None, None] * (1 - alpha)).mul_(2).sub_(1)
    return images, alphas


def mirror_poses(c2w: Tensor) -> Tensor:
    """Poses [..., 4, 4] of the world mirrored in x, for pictures mirrored left to right."""
    return c2w * c2w.new_tensor(
        [[1, -1, -1, -1], [-1, 1, 1, 1], [-1, 1, 1, 1], [1, 1, 1, 1]]
    )  # diag(-1, 1, 1, 1) on both sides


def shift_colors(rgb: Tensor, hue: float, brightness: float) -> Tensor:
    """Turn the hue of [n, 3, h, w] in [0, 1] by `hue` half circles, scale by 2 ** brightness, clamp."""
    cos, sin = math.cos(math.pi * hue), math.sin(math.pi * hue)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = cos * torch.eye(3) + (1 - cos) / 3 + sin * cross  # about the grey axis
    return torch.einsum("ij,njhw->nihw", turn * 2.0**brightness, rgb).clamp(0, 1)
