from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ouroboros3d.cameras import Cameras
from ouroboros3d.cli import call
from ouroboros3d.config.loading import config_from_dict
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.models.svd import make_vae
from ouroboros3d.training import frozen_parts


@pytest.fixture
def script(load_script):
    return load_script("train_frozen_parts")


def test_opponent_colours(script):
    grey, red, green, yellow = (torch.tensor(c)[None, :, None, None] for c in
                                ([0.2, 0.2, 0.2], [1.0, -1, -1], [-1.0, 1, -1], [1.0, 1, -1]))  # fmt: skip
    assert frozen_parts.opponent(grey)[0, 1:].abs().max() < 1e-6
    assert torch.allclose(frozen_parts.opponent(red)[0, 1], -frozen_parts.opponent(green)[0, 1])
    assert frozen_parts.opponent(red)[0, 1] > 5 and frozen_parts.opponent(yellow)[0, 2] > 5
    mean_grey = torch.full((1, 3, 1, 1), frozen_parts.LUMA_MEAN / 3**0.5)
    assert frozen_parts.opponent(mean_grey).abs().max() < 1e-5


def test_the_first_layer_sees_opponent_colours(script):
    vae = nn.Module()
    vae.encoder = nn.Module()
    vae.encoder.conv_in = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    images, before = torch.rand(2, 3, 8, 8), vae.encoder.conv_in.weight.detach().clone()
    frozen_parts.see_colours(vae)
    opponent = frozen_parts.opponent(images) + torch.tensor([frozen_parts.LUMA_MEAN / 0.8, 0, 0])[:, None, None]
    expected = nn.functional.conv2d(opponent, before, padding=1)
    assert torch.allclose(vae.encoder.conv_in(images), expected, atol=1e-5)


def test_vae_objective_reaches_encoder_and_decoder(script):
    torch.manual_seed(0)
    vae = make_vae(config_from_dict(SMALL).model.vae)
    images = torch.rand(1, 4, 3, 16, 16) * 2 - 1
    cameras = Cameras(torch.eye(4).expand(1, 4, 4, 4), torch.eye(3).expand(1, 4, 3, 3))
    batch = OrbitBatch(images, cameras, ["a"], torch.ones(1, 4, 1, 16, 16))
    objective = frozen_parts.VAEObjective(vae)
    losses = objective(batch, objective.draw(0, 0, [0], batch))
    losses["total"].backward()
    assert torch.isclose(losses["total"], losses["views"] + losses["guide"] + losses["kl"])
    for layer in (vae.encoder.conv_in, vae.decoder.conv_out):
        assert layer.weight.grad.abs().max() > 0


class Elsewhere(nn.Module):
    """A VAE or tiny decoder on another device than the batch: notes where its inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))
        self.config = SimpleNamespace(scaling_factor=1.0)
        self.encoded, self.decoded = [], []

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        self.encoded.append(images.device.type)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.rand(len(images), 4, 4, 4)))

    def decode(self, latents: torch.Tensor, num_frames: int = 0) -> SimpleNamespace:
        self.decoded.append(latents.device.type)
        return SimpleNamespace(sample=torch.rand(len(latents), 3, 16, 16))


def test_held_out_views_go_where_the_networks_are():
    cameras = Cameras(torch.eye(4).expand(1, 4, 4, 4), torch.eye(3).expand(1, 4, 3, 3))
    batch = OrbitBatch(torch.rand(1, 4, 3, 16, 16), cameras, ["a"], torch.ones(1, 4, 1, 16, 16))
    vae, tiny = Elsewhere(), Elsewhere()
    frozen_parts.score_vae(vae, batch)
    frozen_parts.score_tiny(tiny, vae, batch)
    assert vae.encoded == ["meta", "meta"] and tiny.decoded == ["meta"]


def test_labels_are_made_where_the_batch_is():
    objective = frozen_parts.ContrastiveObjective(lambda pictures: SimpleNamespace(image_embeds=pictures.flatten(1)))
    with FakeTensorMode(allow_non_fake_inputs=True):  # refuses to mix devices, as CUDA does
        cameras = Cameras(torch.empty(2, 4, 4, 4, device="meta"), torch.empty(2, 4, 3, 3, device="meta"))
        batch = OrbitBatch(torch.empty(2, 4, 3, 16, 16, device="meta"), cameras, ["a", "b"])
        losses = objective(batch, torch.ones(2, dtype=torch.long))
    assert losses["total"].device.type == losses["accuracy"].device.type == "meta"


def test_a_tiny_decoder_needs_a_trained_vae(script, tmp_path, capsys):
    """configs/small.yaml names a checkpoint, which this command does not read."""
    root = Path(__file__).parent / "data" / "orbits"
    more = [f"data.root={root}", "data.cache=none", f"train.output_dir={tmp_path / 'run'}"]
    assert call(script.main, ["tiny_decoder", "--config", "configs/small.yaml", *more]) == 2
    assert "model.pretrained.vae = null: names the trained VAE" in capsys.readouterr().err
