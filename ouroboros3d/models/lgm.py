"""The reconstructor: views and cameras to Gaussians with LGM (Tang et al. 2024), told the noise level (Sec. 3.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ouroboros3d.cameras import Cameras
from ouroboros3d.config.schema import LGMConfig
from ouroboros3d.gaussians import Gaussians
from ouroboros3d.geometry import plucker_maps
from ouroboros3d.interfaces import Reconstructor
from ouroboros3d.models.lgm_unet import LGMUNet
from ouroboros3d.models.precision import Float32Conv2d, cast_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class LGM(nn.Module, Reconstructor):
    """LGM as the loop's reconstructor. State-dict names are LGM's: `unet.*`, `conv.*`.

    rotation: "textbook" makes every quaternion a unit one; "release" divides each component by its norm over *all*
    Gaussians (quirk 17), which leaves nearly the identity, and is what the released weights were trained with.
    `config.positions`: "absolute" is LGM's; "ray" adds the point of each pixel's ray nearest the origin, so that a
    reconstructor without public weights starts from billboards through the object instead of from one point.
    `config.colours`: "absolute" is LGM's; the others take each Gaussian's hue from its input pixel, so that grey stays
    grey: "chroma" needs no training, "residual" has a sharper picture and does.
    """

    def __init__(self, config: LGMConfig, rotation: str = "release") -> None:
        super().__init__()
        self.config, self.rotation = config, rotation
        self.unet = LGMUNet(config)
        self.conv = Float32Conv2d(14, 14, 1)
        with torch.no_grad():  # 0.1 softplus(bias) = initial_scale
            self.conv.bias[4:7] += math.log(math.expm1(config.initial_scale / 0.1))
        for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(f"_{name}", torch.tensor(value)[:, None, None], persistent=False)

    def to_inference_dtype(self, dtype: torch.dtype) -> LGM:
        """Casts the weights but for the head's: its rounding would move the Gaussians."""
        cast_weights(self, dtype, keep=(self.unet.conv_out, self.conv))
        return self

    def input_views(self, views: int) -> list[int]:
        """Indices of the input views among `views`: every (views // 4)-th of them (quirk 16)."""
        wanted = self.config.num_input_views
        if views < wanted:
            raise ValueError(f"the reconstructor reads {wanted} views, got {views}")
        return list(range(0, views, views // wanted))[:wanted]

    def _inputs(self, views: int) -> slice:
        """`input_views` as a slice: a list of indices would be copied to the GPU in every step, which waits for it."""
        every, count = views // self.config.num_input_views, len(self.input_views(views))
        return slice(0, every * count, every)

    @property
    def grid(self) -> int:
        return self.config.splat_size

    def enable_gradient_checkpointing(self) -> None:
        self.unet.gradient_checkpointing = True

    def encode_cameras(self, cameras: Cameras) -> Tensor:
        """[B, 4, 6, s, s] Plücker maps of the input views; depends on the cameras alone, so once per run."""
        return plucker_maps(cameras.views(self._inputs(cameras.num_views)), self.config.input_size)

    def forward(self, images: Tensor, cameras: Cameras, c_noise: Tensor, rays: Tensor | None = None) -> Gaussians:
        """images [B, V, 3, H, W] in about [-1, 1] (decoded x0 is not clamped), c_noise scalar or [B] (0 = clean at
        sigma 1, quirk 23), rays from `encode_cameras` -> 4 * splat_size^2 Gaussians per sample."""
        rays = self.encode_cameras(cameras) if rays is None else rays
        views = images[:, self._inputs(images.shape[1])].flatten(0, 1)
        batch, size = images.shape[0], self.config.input_size
        views = (views * 0.5 + 0.5 - self._mean) / self._std
        views = F.interpolate(views, (size, size), mode="bilinear", align_corners=False)
        x = torch.cat([views, rays.flatten(0, 1).to(views.dtype)], dim=1).to(self.unet.conv_in.weight.dtype)
        c_noise = self._told(c_noise).expand(batch).repeat_interleave(self.config.num_input_views)
        x = rearrange(self.conv(self.unet(x, c_noise)), "(b v) c h w -> b (v h w) c", b=batch)
        if self.config.positions == "ray":
            x = torch.cat([x[..., :3] + self._nearest_points(rays), x[..., 3:]], dim=-1)
        return self.activate(x, None if self.config.colours == "absolute" else self._pixels(images))

    def _told(self, c_noise: Tensor) -> Tensor:
        """The noise level the network is told. Below what it saw in training it would answer with a colour cast."""
        if not self.config.noise_level:
            return torch.zeros_like(c_noise)
        lowest = self.config.lowest_noise_level
        return c_noise if lowest is None else c_noise.clamp(min=lowest)

    def _pixels(self, images: Tensor) -> Tensor:
        """[B, N, 3] in [0, 1]: the input view's colour at each Gaussian's pixel."""
        views = images[:, self._inputs(images.shape[1])].flatten(0, 1).float() * 0.5 + 0.5
        views = F.interpolate(views, (self.config.splat_size,) * 2, mode="area").clamp(0, 1)
        return rearrange(views, "(b v) c h w -> b (v h w) c", b=len(images))

    def _nearest_points(self, rays: Tensor) -> Tensor:
        """d x (o x d), the point of each Gaussian's ray nearest the origin: [B, 4, 6, s, s] -> [B, N, 3]."""
        maps = F.interpolate(rays.flatten(0, 1), (self.config.splat_size,) * 2, mode="area").unflatten(
            0, rays.shape[:2]
        )
        moment, direction = rearrange(maps, "b v (two c) h w -> two b (v h w) c", two=2)
        return torch.linalg.cross(direction, moment)

    def activate(self, x: Tensor, pixels: Tensor | None = None) -> Gaussians:
        """[B, N, 14] raw channels to Gaussians (LGM Sec. 3.3, quirk 18); `pixels` [B, N, 3]: the input views'
        colours, unless `config.colours` is "absolute"."""
        means, opacity, scales, quats, rgb = x.split([3, 1, 3, 4, 3], dim=-1)
        return Gaussians(
            means=means.clamp(-1, 1),
            quats=F.normalize(quats, dim=1 if self.rotation == "release" else -1),
            scales=self._scales(scales),
            opacities=opacity.sigmoid()[..., 0],
            rgb=self._colours(0.5 * rgb.tanh(), pixels),
        )

    def _scales(self, raw: Tensor) -> Tensor:
        """[B, N, 3] standard deviations from raw channels: LGM's, and never below `config.smallest_scale`."""
        scales, least = 0.1 * F.softplus(raw), self.config.smallest_scale
        return scales if least == 0 else (scales.square() + least**2).sqrt()

    def _colours(self, change: Tensor, pixels: Tensor | None) -> Tensor:
        """[B, N, 3] from the network's answer in (-0.5, 0.5) and the input views' pixels."""
        if self.config.colours == "absolute":
            return change + 0.5
        if self.config.colours == "residual":
            return (pixels + change).clamp(0, 1)
        brightness = 0.5 + change.mean(dim=-1, keepdim=True)
        return (brightness + pixels - pixels.mean(dim=-1, keepdim=True)).clamp(0, 1)
