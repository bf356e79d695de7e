"""A batch of orbits, for training and validation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.tensors import Tensors


@dataclass(frozen=True)
class OrbitBatch(Tensors):
    """B objects seen on V cameras."""

    images: Tensor  # [B, V, 3, H, W] in [-1, 1]; view 0 is the condition image
    cameras: Cameras
    ids: list[str]
    alpha: Tensor | None = None  # [B, V, 1, H, W] in [0, 1]
    depth: Tensor | None = None  # [B, V, 1, h, w] along the camera's z, 0 = empty
    extra: OrbitBatch | None = None  # further views of the same objects, for supervision alone
    background: Tensor | None = None  # [B, 3] in [0, 1], of the images

    @classmethod
    def collate(cls, items: list[dict]) -> OrbitBatch:
        """From the dataset's items (data/orbits.py)."""
        ids = [item["id"] for item in items]

        def stack(key: str) -> Tensor | None:
            return torch.stack([item[key] for item in items]) if key in items[0] else None

        def views(prefix: str, extra: OrbitBatch | None) -> OrbitBatch:
            cameras = Cameras(stack(f"{prefix}c2w").float(), stack(f"{prefix}K"))
            images, alpha, depth = (stack(f"{prefix}{key}") for key in ("images", "alpha", "depth"))
            return cls(images, cameras, ids, alpha, depth, extra, stack("background"))

        return views("", views("extra_", None) if "extra_images" in items[0] else None)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> OrbitBatch:
        return super().to(device, non_blocking=non_blocking)

    @property
    def supervised(self) -> OrbitBatch:
        """The V views and the extra ones behind them: what renderings are compared to."""
        if self.extra is None:
            return self

        def join(name: str) -> Tensor | None:
            one, other = getattr(self, name), getattr(self.extra, name)
            return None if one is None or other is None else torch.cat([one, other], dim=1)

        cameras = Cameras(
            torch.cat([self.cameras.c2w, self.extra.cameras.c2w], 1),
            torch.cat([self.cameras.K, self.extra.cameras.K], 1),
        )
        return OrbitBatch(join("images"), cameras, self.ids, join("alpha"))
