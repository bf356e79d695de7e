"""Cross-attention to the single token of the condition image, without computing queries and keys.

SVD's U-Net attends to one CLIP token. The softmax over one key is 1 whatever the query, so attention is the linear
map `to_out(to_v(token))`, the same for every query; `norm2`, `to_q` and `to_k` act on nothing and get gradients of 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn


class OneKeyAttention(AttnProcessor2_0):
    """diffusers' attention, short-cut where the context has one token.

    While `to_q` is trained the long way is taken: its zero gradients let weight decay act, as in the release.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs
    ) -> Tensor:
        """[N, queries, C]; of the short cut [N, 1, C], which broadcasts over the queries."""
        trained = torch.is_grad_enabled() and attn.to_q.weight.requires_grad
        if trained or encoder_hidden_states is None or encoder_hidden_states.shape[1] != 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        out = attn.to_v(encoder_hidden_states)
        for layer in attn.to_out:
            out = layer(out)
        return out


def use_one_key_attention(unet: nn.Module) -> None:
    """Gives the cross-attention of every transformer block in `unet` the short cut."""
    for block in _blocks(unet):
        attn = block.attn2
        plain = attn.rescale_output_factor == 1.0 and not attn.residual_connection
        if not plain or attn.spatial_norm is not None or attn.group_norm is not None or attn.norm_cross:
            raise ValueError("one-key attention knows no rescaling, residual or norm inside the attention")
        attn.set_processor(OneKeyAttention())


def freeze_unread(unet: nn.Module) -> None:
    """Takes the gradients from what one key never reads, so that training takes the short cut too."""
    for block in _blocks(unet):
        for module in (block.norm2, block.attn2.to_q, block.attn2.to_k):
            module.requires_grad_(False)


def _blocks(unet: nn.Module) -> Iterator[nn.Module]:
    return (m for m in unet.modules() if getattr(m, "attn2", None) is not None)
