"""LGM's asymmetric U-Net with cross-view attention and the time embedding Ouroboros3D adds (Sec. 3.2).

Parameter names are LGM's, so that its public weights load. Shapes: BV = batch * views, views adjacent.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ouroboros3d.config.schema import LGMConfig
from ouroboros3d.models.precision import Float32Conv2d

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two branches


class CrossViewAttention(nn.Module):
    """Self-attention over the tokens of all views of a sample at once."""

    def __init__(self, channels: int, heads: int, groups: int, views: int) -> None:
        super().__init__()
        self.views = views
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.attn = Attention(channels, heads)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = rearrange(self.norm(x), "(b v) c h w -> b (v h w) c", v=self.views)
        tokens = self.attn(tokens)
        return (x + rearrange(tokens, "b (v h w) c -> (b v) c h w", v=self.views, h=height, w=width)) * SKIP_SCALE


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int, time_embed_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        # Zero at the start: public LGM weights then behave as they did without a noise level.
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, out_channels))
        nn.init.zeros_(self.emb_layers[1].weight)
        nn.init.zeros_(self.emb_layers[1].bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb_layers(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (h + self.shortcut(x)) * SKIP_SCALE


class Block(nn.Module):
    """Residual blocks, each followed by cross-view attention where asked; holds LGM's `nets` and `attns`."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool, config: LGMConfig) -> None:
        super().__init__()
        self.nets = nn.ModuleList(ResnetBlock(i, o, config.groups, config.time_embed_dim) for i, o in widths)
        self.attns = nn.ModuleList(
            CrossViewAttention(o, config.heads, config.groups, config.num_input_views) if attention else nn.Identity()
            for _, o in widths
        )


class DownBlock(Block):
    def __init__(self, in_channels: int, out_channels: int, attention: bool, down: bool, config: LGMConfig) -> None:
        ins = [in_channels, *[out_channels] * (config.layers_per_block - 1)]
        super().__init__([(i, out_channels) for i in ins], attention, config)
        self.downsample = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1) if down else None

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for net, attn in zip(self.nets, self.attns, strict=True):
            x = attn(net(x, emb))
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    def __init__(self, channels: int, attention: bool, config: LGMConfig) -> None:
        super().__init__([(channels, channels)] * 2, attention, config)
        self.attns = self.attns[:1]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.attns[0](self.nets[0](x, emb))
        return self.nets[1](x, emb)


class UpBlock(Block):
    def __init__(
        self,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        attention: bool,
        up: bool,
        config: LGMConfig,
    ) -> None:
        layers = config.layers_per_block + 1
        ins = [in_channels, *[out_channels] * (layers - 1)]
        skips = [*[out_channels] * (layers - 1), skip_channels]
        super().__init__([(i + s, out_channels) for i, s in zip(ins, skips, strict=True)], attention, config)
        self.upsample = nn.Conv2d(out_channels, out_channels, 3, padding=1) if up else None

    def forward(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        for net, attn in zip(self.nets, self.attns, strict=True):
            x = attn(net(torch.cat([x, skips.pop()], dim=1), emb))
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class LGMUNet(nn.Module):
    """[BV, 9, s, s] pictures with rays -> [BV, 14, splat, splat] raw Gaussian channels."""

    def __init__(self, config: LGMConfig, in_channels: int = 9, out_channels: int = 14) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        down, up, dim = list(config.down_channels), list(config.up_channels), config.time_embed_dim
        self.time_embed = nn.Sequential(nn.Linear(config.time_channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.conv_in = nn.Conv2d(in_channels, down[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(i, o, attention, level < len(down) - 1, config)
            for level, (i, o, attention) in enumerate(
                zip([down[0], *down[:-1]], down, config.down_attention, strict=True)
            )
        )
        self.mid_block = MidBlock(down[-1], config.mid_attention, config)
        # An up block's last skip comes from the level below the one it mirrors.
        skips = [down[max(-2 - i, -len(down))] for i in range(len(up))]
        self.up_blocks = nn.ModuleList(
            UpBlock(i, s, o, attention, level < len(up) - 1, config)
            for level, (i, s, o, attention) in enumerate(
                zip([down[-1], *up[:-1]], skips, up, config.up_attention, strict=True)
            )
        )
        self.norm_out = nn.GroupNorm(config.groups, up[-1], eps=1e-5)
        self.conv_out = Float32Conv2d(up[-1], out_channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """x [BV, 9, s, s]; c_noise [BV] noise level of each view."""
        emb = self.time_embed(sinusoidal_embedding(c_noise, self.config.time_channels).to(x.dtype))
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, new = self._run(block, x, emb)
            skips += new
        x = self._run(self.mid_block, x, emb)
        for block in self.up_blocks:
            own, skips = skips[-len(block.nets) :], skips[: -len(block.nets)]
            x = self._run(block, x, own, emb)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _run(self, block: nn.Module, *args):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(lambda *a: block(*_fresh(a)), *args, use_reentrant=False)
        return block(*args)


def _fresh(args: tuple) -> list:
    """Copies lists, which an up block empties: a recomputation must see them whole."""
    return [list(a) if isinstance(a, list) else a for a in args]


def sinusoidal_embedding(t: Tensor, channels: int) -> Tensor:
    """[B] -> [B, channels] float32: cosines, then sines, of frequencies 10000^(-2i / channels) (quirk 18)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    phases = t.float()[:, None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=-1)
