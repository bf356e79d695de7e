"""Cross-attention to one token: the short cut's values and gradients are those of diffusers' attention."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from torch import nn

from ouroboros3d.models.one_key import OneKeyAttention, freeze_unread, use_one_key_attention

VIEWS = 8


def with_diffusers_attention(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(getattr(part, "processor", None), OneKeyAttention):
            part.set_processor(AttnProcessor2_0())
    return module


def block(width: int, heads: int, context: int) -> TransformerSpatioTemporalModel:
    torch.manual_seed(0)
    return TransformerSpatioTemporalModel(heads, width // heads, width, cross_attention_dim=context)


@pytest.fixture(params=[(32, 2, 16), (320, 5, 1024)], ids=["tiny", "full width"])
def short(request) -> TransformerSpatioTemporalModel:
    module = block(*request.param)
    use_one_key_attention(module)
    return module


def run(module: TransformerSpatioTemporalModel) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2 * VIEWS, module.in_channels, 4, 4, generator=g)
    width = module.transformer_blocks[0].attn2.to_k.in_features
    context = torch.randn(2, 1, width, generator=g).repeat_interleave(VIEWS, 0)
    return module(x, context, torch.zeros(2, VIEWS), return_dict=False)[0]


@torch.no_grad()
def test_values_are_those_of_attention(short, monkeypatch):
    expected = run(with_diffusers_attention(short))
    queries = []
    for name, part in short.named_modules():
        if name.endswith("attn2.to_q"):
            part.register_forward_hook(lambda *_: queries.append(1))
    torch.testing.assert_close(run(short), expected, atol=1e-6, rtol=1e-6)
    assert not queries  # in neither the spatial nor the temporal block


def test_while_everything_is_trained_it_is_attention_itself(short):
    run(short).square().mean().backward()
    long = with_diffusers_attention(short)
    long.zero_grad()
    run(long).square().mean().backward()
    for (name, one), other in zip(short.named_parameters(), long.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    for name, parameter in short.named_parameters():
        unread = "norm2" in name or "attn2.to_q" in name or "attn2.to_k" in name
        assert unread <= (parameter.grad.abs().max() < 1e-6), name  # but for rounding in the softmax


def test_frozen_the_gradients_of_the_rest_are_the_same(short):
    long = with_diffusers_attention(short)
    freeze_unread(short)
    for module in (short, long):
        run(module).square().mean().backward()
    for (name, one), other in zip(short.named_parameters(), long.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-7, rtol=1e-4, msg=name)
        else:
            assert one.grad is None and "2" in name
    assert sum(not p.requires_grad for p in short.parameters()) == 2 * 4  # norm2's two, to_q, to_k; in both blocks


@torch.no_grad()
def test_more_tokens_are_attended_to(short):
    attn = short.transformer_blocks[0].attn2
    x, context = torch.randn(2, 5, short.in_channels), torch.randn(2, 3, attn.to_k.in_features)
    torch.testing.assert_close(
        attn(x, context), with_diffusers_attention(short).transformer_blocks[0].attn2(x, context)
    )
    assert attn(x, context).shape == x.shape


def test_attention_it_does_not_know_is_refused():
    module = block(32, 2, 16)
    module.transformer_blocks[0].attn2.residual_connection = True
    with pytest.raises(ValueError, match="one-key"):
        use_one_key_attention(module)
