"""What one call of the pipeline returns: its objects, and their pictures and Gaussians side by side.

Shapes: B objects, V views, H = W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ouroboros3d.cameras import Cameras
from ouroboros3d.export.object3d import Object3D, Step3D
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.visualize import to_uint8


@dataclass(frozen=True)
class Ouroboros3DOutput:
    """The objects of one call. `output[i]` is one of them, and saves itself: `output[0].save("chair.glb")`.

    Pictures come as `output_type` says: "pil" is a list of V PIL images per object, "pt" a tensor [B, V, 3, H, W] in
    [0, 1] on the CPU.
    """

    objects: list[Object3D]
    output_type: str = "pil"

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> Object3D:
        return self.objects[index]

    @property
    def views(self) -> list[list[Image.Image]] | Tensor:
        """What the diffusion model drew last."""
        return self._pictures([o.views for o in self.objects])

    @property
    def renders(self) -> list[list[Image.Image]] | Tensor:
        """The Gaussians from the same cameras."""
        return self._pictures([o.renders for o in self.objects])

    @property
    def gaussians(self) -> Gaussians:
        """Of all objects, B scenes, on the pipeline's device."""
        return Gaussians.from_tensor(torch.cat([o.gaussians.to_tensor() for o in self.objects]))

    @property
    def cameras(self) -> Cameras:
        """[B, V] of views and renders."""
        poses, intrinsics = zip(*((o.cameras.c2w, o.cameras.K) for o in self.objects), strict=True)
        return Cameras(torch.cat(poses), torch.cat(intrinsics))

    @property
    def history(self) -> list[tuple[Step3D, ...]]:
        """Every step of the loop per object; empty unless `return_history` was asked for."""
        return [o.history for o in self.objects]

    def _pictures(self, tensors: list[Tensor]) -> list[list[Image.Image]] | Tensor:
        if self.output_type == "pt":
            return torch.stack(tensors)
        return [[Image.fromarray(view) for view in to_uint8(views)] for views in tensors]
