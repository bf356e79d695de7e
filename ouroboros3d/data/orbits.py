"""Orbits of rendered objects on disk, as training examples.

    <root>/<id>/render_0000.webp ...    RGBA views, in orbit order
    <root>/<id>/meta.json               camera_angle_x and one OpenGL camera-to-world matrix a view
    <root>/<id>/depth.npz               optional: `depth` [frames, h, w] along the camera's axis, 0 = empty
    <root>/train.txt                    one id a line

`scripts/render_orbits.py` writes this format.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ouroboros3d.cameras import frame_indices, intrinsics_from_fov, opengl_to_opencv, relative_to_first
from ouroboros3d.errors import UserError

_RENDER_AGAIN = "render this orbit again or take its id out of the list"
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "grey": (0.5, 0.5, 0.5)}


class DataError(UserError, ValueError):
    """Training data cannot be used. The message is one line: the file, what is wrong, what to do."""


@dataclass(frozen=True)
class OrbitMeta:
    """What meta.json says."""

    names: list[str]  # picture files, in orbit order
    c2w: Tensor  # [frames, 4, 4] float64, OpenGL
    fov: float  # degrees


class OrbitDataset(Dataset):
    """One example is `num_views` views of an orbit, of which the first is the condition image.

    Item, with V views of H = W = size pixels:
        images  [V, 3, H, W] float32 in [-1, 1], composited on the background
        c2w     [V, 4, 4] float32, OpenCV, relative to the first view (computed in float64)
        K       [V, 3, 3] float32, in image widths
        id      name of the orbit's folder;  index  its number in the list
        frames  [V] int64, which frames of the orbit these are
        background  [3] float32 in [0, 1]
        alpha   [V, 1, H, W] float32 in [0, 1]                           with load_alpha
        depth   [V, 1, h, w] float32 along the camera's axis, 0 = empty   with load_depth
        extra_images, extra_c2w, extra_K, extra_frames, extra_alpha, extra_depth    with extra_views

    Everything random is a function of (seed, epoch, index) alone, so neither the number of workers nor a
    resume changes it. Call set_epoch before each epoch, persistent workers notice it too.
    """

    def __init__(
        self,
        root: str | Path,
        list_file: str = "train.txt",
        size: int = 512,
        num_views: int = 8,
        view_selection: str = "release",
        background: str | tuple[float, float, float] = "white",
        start_view: int | None = None,
        mirror: bool = False,
        color_jitter: float = 0.0,
        cache: str = "none",
        load_alpha: bool = False,
        load_depth: bool = False,
        extra_views: int = 0,
        frames: int = 16,
        seed: int = 0,
    ):
        """
        list_file: the list of ids, relative to `root`.
        view_selection: "release" (0, 2, ..., 12, 15 of 16) or "even" (every second frame, the paper's).
        background: white, black, grey, random (one colour an example) or rgb in [0, 1].
        start_view: frame of the condition image, None draws one.
        mirror: mirror every other example left to right, by chance.
        color_jitter: 0 to 1, how far hue and brightness may move (1: any hue, half to double brightness),
            together for all views.
        cache: "memory" decodes everything now, at `size`.
        extra_views: further views for supervision, of frames not among the `num_views`.
        frames: of every orbit on disk.
        Raises DataError if data cannot be read and ValueError for bad settings.
        """
        if background != "random":
            background = BACKGROUNDS.get(background, background) if isinstance(background, str) else background
            if isinstance(background, str) or len(background) != 3 or not all(0 <= x <= 1 for x in background):
                raise ValueError(f"background: {', '.join(BACKGROUNDS)}, random or rgb in [0, 1], got {background!r}")
        if cache not in ("none", "memory"):
            raise ValueError(f"cache must be 'none' or 'memory', got {cache!r}")
        if not 0 <= color_jitter <= 1:
            raise ValueError(f"color_jitter must lie in [0, 1], got {color_jitter}")
        if start_view is not None and not 0 <= start_view < frames:
            raise ValueError(f"start_view must be a frame, 0 to {frames - 1}, got {start_view}")
        if size < 1 or num_views < 1 or extra_views < 0 or num_views + extra_views > frames:
            raise ValueError(
                f"size and num_views must be positive and num_views + extra_views at most {frames} frames,"
                f" got {size}, {num_views} and {extra_views}"
            )
        self.root = Path(root)
        self.ids = read_ids(self.root / list_file)
        self.size, self.num_views, self.extra_views, self.frames = size, num_views, extra_views, frames
        self.background, self.start_view = background, start_view
        self.mirror, self.color_jitter = mirror, color_jitter
        self.load_alpha, self.load_depth = load_alpha, load_depth
        self.seed = seed
        self._offsets = frame_indices(frames, num_views, view_selection)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._metas: list[OrbitMeta] | None = None
        if cache == "memory":
            self._fill_cache()

    def __len__(self) -> int:
        return len(self.ids)

    def set_epoch(self, epoch: int) -> None:
        """Other random choices for every example from now on."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> dict:
        return self.example(int(self._epoch), index)

    def example(self, epoch: int, index: int) -> dict:
        """Item `index` as it is in `epoch`, whatever set_epoch said: safe where workers run over an epoch's end."""
        if not 0 <= index < len(self):  # ends `for item in dataset`
            raise IndexError(f"example {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, epoch, index])
        # Always the same draws in the same order, so that one option does not change what another one gets.
        start, mirrored = int(rng.integers(self.frames)), self.mirror and bool(rng.random() < 0.5)
        jitter, background, order = rng.uniform(-1, 1, 2), rng.random(3), rng.permutation(self.frames)
        if self.start_view is not None:
            start = self.start_view
        if self.background != "random":
            background = np.asarray(self.background)

        # A mirrored orbit runs backwards; taking its frames in reverse keeps the azimuth growing.
        chosen = [(start + (-k if mirrored else k)) % self.frames for k in self._offsets]
        chosen += [int(k) for k in order if k not in chosen][: self.extra_views]

        meta, rgba, depth = self._load(index, chosen)
        rgba = rgba.permute(0, 3, 1, 2).float() / 255
        rgb, alpha = rgba[:, :3], rgba[:, 3:]
        if self.color_jitter:
            rgb = shift_colors(rgb, *(self.color_jitter * jitter))
        colour = torch.tensor(background, dtype=torch.float32)
        c2w = relative_to_first(opengl_to_opencv(meta.c2w[chosen]))
        item = {
            "images": (rgb * alpha + colour[:, None, None] * (1 - alpha)) * 2 - 1,
            "c2w": mirror_poses(c2w) if mirrored else c2w,
            "K": intrinsics_from_fov(meta.fov).expand(len(chosen), 3, 3).clone(),
            "frames": torch.tensor(chosen),
        }
        item["c2w"] = item["c2w"].float()
        if self.load_alpha:
            item["alpha"] = alpha.clone()
        if depth is not None:
            item["depth"] = depth[:, None].float()
        if mirrored:
            for key in item.keys() & {"images", "alpha", "depth"}:
                item[key] = item[key].flip(-1)
        if self.extra_views:
            item |= {f"extra_{key}": value[self.num_views :] for key, value in item.items()}
            for key in [key for key in item if not key.startswith("extra_")]:
                item[key] = item[key][: self.num_views]
        return item | {"id": self.ids[index], "index": index, "background": colour}

    def _load(self, index: int, frames: list[int]) -> tuple[OrbitMeta, Tensor, Tensor | None]:
        """Meta, RGBA [n, H, W, 4] uint8 and depth [n, h, w] or None of the chosen frames."""
        if self._metas is not None:
            depth = self._depth[index][frames] if self.load_depth else None
            return self._metas[index], self._rgba[index][frames], depth
        folder = self.root / self.ids[index]
        meta = read_meta(folder / "meta.json", self.frames)
        rgba = torch.stack([read_rgba(folder / meta.names[k], self.size) for k in frames])
        depth = read_depth(folder / "depth.npz", self.frames)[frames] if self.load_depth else None
        return meta, rgba, depth

    def _fill_cache(self) -> None:
        everything = list(range(self.frames))
        metas, depths = [], []
        rgba = torch.empty(len(self), self.frames, self.size, self.size, 4, dtype=torch.uint8)
        for index in tqdm(range(len(self)), desc=f"reading {self.root.name}", unit="orbit", leave=False):
            meta, rgba[index], depth = self._load(index, everything)
            metas.append(meta)
            depths.append(depth)
        if self.load_depth:
            if len({d.shape for d in depths}) > 1:
                raise DataError(f"{self.root}: depth.npz files differ in size; render them with one --depth")
            self._depth = torch.stack(depths)
        self._rgba, self._metas = rgba, metas


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


def read_ids(path: Path) -> list[str]:
    """The ids in a list file; raises DataError if it is missing or empty."""
    hint = "check the root and the list's name, or render orbits with scripts/render_orbits.py"
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder; {hint}")
    try:
        ids = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); {hint}") from error
    if not ids:
        raise DataError(f"{path}: the list is empty; {hint}")
    return ids


def read_meta(path: Path, frames: int) -> OrbitMeta:
    """meta.json of an orbit of `frames` views; raises DataError."""
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        names = [location["frames"][0]["name"] for location in meta["locations"]]
        c2w = torch.tensor([location["transform_matrix"] for location in meta["locations"]], dtype=torch.float64)
        fov = math.degrees(float(meta["camera_angle_x"]))
    except KeyError as error:
        raise DataError(f"{path}: has no {error}; {_RENDER_AGAIN}") from error
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)}); {_RENDER_AGAIN}") from error
    if len(names) != frames:
        raise DataError(f"{path}: has {len(names)} frames instead of {frames}; {_RENDER_AGAIN}")
    if c2w.shape[1:] != (4, 4) or not c2w.isfinite().all() or not 0 < fov < 180:
        raise DataError(f"{path}: a matrix is not 4 x 4 finite numbers, or camera_angle_x no angle; {_RENDER_AGAIN}")
    return OrbitMeta(names, c2w, fov)


def read_rgba(path: Path, size: int) -> Tensor:
    """A picture as [size, size, 4] uint8 RGBA, resized as the release does (bicubic); raises DataError."""
    try:
        with Image.open(path) as picture:
            rgba = picture.convert("RGBA")
    except Exception as error:  # a decoder raises whatever it trips over
        raise DataError(f"{path}: cannot be read ({_reason(error)}); {_RENDER_AGAIN}") from error
    if rgba.width != rgba.height:
        raise DataError(f"{path}: is {rgba.width} x {rgba.height}, not square; {_RENDER_AGAIN}")
    if rgba.width != size:
        rgba = rgba.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgba))


def read_depth(path: Path, frames: int) -> Tensor:
    """Depth maps [frames, h, w] of depth.npz; raises DataError."""
    hint = "render the orbits with --depth or turn load_depth off"
    try:
        with np.load(path) as file:
            depth = torch.from_numpy(file["depth"])
    except Exception as error:  # zipfile, zlib and numpy all have their own
        raise DataError(f"{path}: cannot be read ({_reason(error)}); {hint}") from error
    if depth.ndim != 3 or len(depth) != frames:
        raise DataError(f"{path}: depth has shape {tuple(depth.shape)} instead of [{frames}, h, w]; {hint}")
    return depth


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__
