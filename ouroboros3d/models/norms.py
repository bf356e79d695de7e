"""GroupNorm in narrow networks."""

from __future__ import annotations

from torch import nn


def set_norm_groups(module: nn.Module, groups: int) -> None:
    """Sets the number of groups of every GroupNorm inside to at most `groups`.

    diffusers fixes 32 groups. In a network 32 channels wide each group is then one channel, whose mean, and with it
    the level of any colour, the normalisation erases: such a VAE learns shapes and no colours. Fewer groups keep
    several channels together; weights have the same names and shapes.
    """
    for norm in module.modules():
        if isinstance(norm, nn.GroupNorm) and norm.num_groups > groups:
            norm.num_groups = groups
