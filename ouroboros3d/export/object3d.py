"""One generated object with everything that its exports need.

Shapes: V views, H = W pixels, pictures in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ouroboros3d import export
from ouroboros3d.cameras import Cameras
from ouroboros3d.config.schema import TurntableConfig
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.interfaces import Renderer
from ouroboros3d.rendering import render
from ouroboros3d.visualize import shrink

if TYPE_CHECKING:
    from ouroboros3d.sampler import SamplerStep

HISTORY_PIXELS = 256  # of a kept step's pictures: 25 full steps would hold gigabytes


@dataclass(frozen=True)
class Step3D:
    """What one step of the loop made of one object, on the CPU."""

    index: int  # from 0
    total: int
    sigma: float  # noise level the step started from
    gaussians: Gaussians  # B = 1
    views: Tensor  # [V, 3, H, W] decoded prediction
    maps: dict[str, Tensor]  # "rgb" and "ccm", [V, 3, H, W]: what the step hands to the next one


def step3d(step: SamplerStep, index: int) -> Step3D:
    """What the step made of one object, on the CPU, its pictures at most HISTORY_PIXELS wide."""
    pictures = {name: shrink(images, HISTORY_PIXELS) for name, images in step.pictures(index).items()}
    gaussians = step.gaussians.scene(index).to("cpu")
    return Step3D(step.index, step.total, step.sigma, gaussians, pictures.pop("views"), pictures)


@dataclass(frozen=True)
class Object3D:
    """One generated object. `save` writes it; only `gaussians` is needed, what is None is left out of the files.

    The Gaussians lie in the canonical frame of cameras.py: y up for the input camera, which stands at +z. An object
    seen from `elevation` degrees above therefore leans towards +z by that angle.
    """

    gaussians: Gaussians  # B = 1
    elevation: float = 0.0  # degrees, of the input camera above the object
    seed: int = 0  # of the sampling noise
    cameras: Cameras | None = None  # [1, V] of `views` and `renders`, on the device of the Gaussians
    views: Tensor | None = None  # [V, 3, H, W] on the CPU: what the diffusion model drew
    renders: Tensor | None = None  # [V, 3, H, W] on the CPU: the Gaussians from the same cameras
    image: Tensor | None = None  # [3, H, W] on the CPU: the input as the networks saw it
    history: tuple[Step3D, ...] = ()  # every step of the loop, if it was kept
    renderer: Renderer = render
    turntable: TurntableConfig = field(default_factory=TurntableConfig)

    def save(self, path: str | Path, **options: Any) -> Path:
        """Writes the format of the path's ending, see `ouroboros3d.export.WRITERS`, and returns the path.

        Raises FormatError for an unknown ending, OutputError if the file cannot be written.
        """
        return export.save(self, path, **options)
