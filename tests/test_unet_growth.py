"""One more layer per block of the multi-view U-Net: the same function, and every new weight free to learn."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ouroboros3d.models.multiview_unet import MultiViewUNet
from ouroboros3d.models.weights import CheckpointError

ONE_WIDTH = {"block_out_channels": [32, 32, 32], "num_attention_heads": [2, 2, 2]}


@pytest.fixture(params=[1, 2])
def grown(request, make_config, make_models, load_script, tmp_path):
    """A U-Net of one or two layers per block, and the one with one more that the command makes of it."""

    def config(layers: int):
        unet = ONE_WIDTH | {"layers_per_block": layers}
        return make_config({"model": {"multiview": {"unet": unet}}}, textbook=True)

    before = make_models(config(request.param)).unet
    save_file(before.state_dict(), tmp_path / "unet.safetensors")
    load_script("grow_unet").main([str(tmp_path / "unet.safetensors"), "--out", str(tmp_path / "grown.safetensors")])
    after = MultiViewUNet(config(request.param + 1).model).eval()
    after.load_state_dict(load_file(tmp_path / "grown.safetensors"))
    return before, after


def predict(unet: MultiViewUNet, cameras) -> torch.Tensor:
    randn, rand = (torch.Generator().manual_seed(s) for s in (0, 1))
    sample, context = torch.randn(2, 8, 8, 8, 8, generator=randn), torch.randn(2, 1, 16, generator=randn)
    maps = {name: torch.rand(2, 8, 3, 32, 32, generator=rand) for name in ("rgb", "ccm")}
    ids = torch.tensor([[6.0, 127.0, 0.02], [6.0, 127.0, 0.1]])
    noise = torch.tensor([0.5, 1.0])
    return unet(sample, noise, context, ids, unet.encode_cameras(cameras, 8), unet.encode_feedback(maps))


@torch.no_grad()
def test_a_grown_unet_computes_the_same(grown, make_cameras):
    before, after = (predict(unet, make_cameras(2)) for unet in grown)
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_every_new_layer_learns(grown, make_cameras):
    """The ends of its branches, at zero now, get gradients."""
    before, after = grown
    predict(after, make_cameras(2)).square().mean().backward()
    ends = [
        name
        for name, weight in after.unet.named_parameters()
        if name.endswith(("conv2.weight", "proj_out.weight")) and "_blocks" in name and not weight.any()
    ]
    layers = {name.split(".spatial")[0].split(".temporal")[0].removesuffix(".proj_out.weight") for name in ends}
    new = {name.rsplit(".", 1)[0] for name, _ in after.unet.named_modules() if name.endswith(".spatial_res_block")}
    new |= {name for name, module in after.unet.named_modules() if type(module).__name__.startswith("TransformerSp")}
    assert len(layers) == len(new) - sum(
        name.endswith(".spatial_res_block") or type(module).__name__.startswith("TransformerSp")
        for name, module in before.unet.named_modules()
    )
    assert all(after.unet.get_parameter(name).grad.any() for name in ends)


def test_weights_of_blocks_of_two_widths_do_not_grow(textbook, load_script, tmp_path):
    save_file(textbook.unet.state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match=r"\[32, 64\] channels; growing wants one width"):
        load_script("grow_unet").main([str(tmp_path / "unet.safetensors"), "--out", str(tmp_path / "out.safetensors")])


def test_other_weights_do_not_grow(textbook, load_script, tmp_path):
    save_file(textbook.lgm.state_dict(), tmp_path / "lgm.safetensors")
    with pytest.raises(CheckpointError, match="not weights of the multi-view U-Net"):
        load_script("grow_unet").main([str(tmp_path / "lgm.safetensors"), "--out", str(tmp_path / "out.safetensors")])
