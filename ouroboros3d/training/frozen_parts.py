"""Training of the parts that stay frozen later: VAE, image encoder, tiny decoder (scripts/train_frozen_parts.py)."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature

from ouroboros3d.config.loading import load_config
from ouroboros3d.config.schema import Config
from ouroboros3d.data.batch import OrbitBatch
from ouroboros3d.data.splits import build_dataset
from ouroboros3d.errors import ConfigError
from ouroboros3d.evaluation.bootstrap import spread_evenly
from ouroboros3d.evaluation.metrics import psnr
from ouroboros3d.models.svd import CLIP_MEAN, CLIP_STD, make_image_encoder, make_tiny_decoder, make_vae
from ouroboros3d.models.weights import fit_state, read_state, save_tiny_decoder, write_state
from ouroboros3d.training.trainer import Trainer
from ouroboros3d.visualize import view_grid

KL_WEIGHT = 1e-3  # per latent number: keeps latents centred and of about unit variance
FOREGROUND_WEIGHT = 4.0  # two thirds of a view are background
GUIDE_WEIGHT = 0.5  # the first three latent channels follow the small picture itself: see VAEObjective
# Luma, red against green, yellow against blue, each over its standard deviation inside objects (views in [-1, 1]):
# in rgb the hues have a hundredth of the energy of light and dark, and are learned long after shapes or never.
OPPONENT = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]) / torch.tensor([3.0, 2, 6]).sqrt()[:, None]
OPPONENT_SCALE = torch.tensor([0.8, 0.25, 0.25])
LUMA_MEAN = 1.34  # of whole views, mostly white background
TEMPERATURE = 0.1


class VAEObjective(nn.Module):
    """Reconstruction of all views of each orbit through the temporal decoder.

    From random weights colours are a saddle: the encoder does not write what the decoder does not read. So the first
    three latent channels are pulled to the picture at the latents' size, in opponent colours of about unit variance.
    """

    collate = staticmethod(OrbitBatch.collate)

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def draw(self, seed: int, step: int, samples: list[int], batch: OrbitBatch) -> Tensor:
        size = batch.images.shape[-1] // 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (batch.images.shape[1], self.vae.config.latent_channels, size, size)
        draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7919 * s)) for s in samples]
        return torch.cat(draws).to(batch.images.device)

    def forward(self, batch: OrbitBatch, noise: Tensor) -> dict[str, Tensor]:
        images, views = batch.images.flatten(0, 1), batch.images.shape[1]
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        decoded = self.vae.decode(latents, num_frames=views).sample.float()
        small = opponent(F.adaptive_avg_pool2d(images, latents.shape[-1]))
        weight = 1 + FOREGROUND_WEIGHT * batch.alpha.flatten(0, 1)
        losses = {
            # Squared: an L1's median is grey until a colour is nearly certain.
            "views": (weight * (opponent(decoded) - opponent(images)) ** 2).mean(),
            "guide": GUIDE_WEIGHT * F.mse_loss(posterior.mean[:, :3].float(), small),
            "kl": KL_WEIGHT * 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean(),
        }
        return losses | {"total": sum(losses.values())}


def opponent(images: Tensor) -> Tensor:
    """Views [n, 3, h, w] in [-1, 1] as luma, red-green and yellow-blue of about unit variance."""
    matrix = (OPPONENT / OPPONENT_SCALE[:, None]).to(images)
    channels = torch.einsum("ij,njhw->nihw", matrix, images)
    return channels - channels.new_tensor([LUMA_MEAN / OPPONENT_SCALE[0], 0, 0])[:, None, None]


class TeacherPairs(Dataset):
    """Latents of orbits, each with noise of its own strength as inside the loop, and what the VAE's decoder makes of
    them; made once, since the decoder costs more than a step of the tiny one."""

    @torch.no_grad()
    def __init__(self, orbits: Dataset, vae: nn.Module, count: int) -> None:
        chosen = spread_evenly(range(len(orbits)), count)
        self.items = [self._pair(orbits[i], vae.eval(), i) for i in tqdm(chosen, desc="teacher", unit="orbit")]

    @staticmethod
    def _pair(item: dict, vae: nn.Module, seed: int) -> dict:
        generator = torch.Generator().manual_seed(seed)
        latents = vae.encode(item["images"]).latent_dist.mean
        latents += torch.rand((), generator=generator) * torch.randn(latents.shape, generator=generator)
        views = vae.decode(latents, num_frames=len(latents)).sample
        return {"latents": latents * vae.config.scaling_factor, "views": views, "alpha": item["alpha"]}

    def __len__(self) -> int:
        return len(self.items)

    def example(self, _epoch: int, index: int) -> dict:
        return self.items[index]


class TinyDecoderObjective(nn.Module):
    """The tiny decoder against the VAE's own."""

    def __init__(self, tiny: nn.Module) -> None:
        super().__init__()
        self.decoder = tiny.decoder

    @staticmethod
    def collate(items: list[dict]) -> BatchFeature:
        return BatchFeature({key: torch.cat([item[key] for item in items]) for key in ("latents", "views", "alpha")})

    def draw(self, seed: int, step: int, samples: list[int], batch: BatchFeature) -> None:
        """Nothing is drawn."""

    def forward(self, batch: BatchFeature, _draws: None) -> dict[str, Tensor]:
        difference = opponent(self.decoder(batch["latents"]).float()) - opponent(batch["views"])
        return {"total": ((1 + FOREGROUND_WEIGHT * batch["alpha"]) * difference**2).mean()}


class ContrastiveObjective(nn.Module):
    """InfoNCE between the condition view and another, random view of each orbit."""

    collate = staticmethod(OrbitBatch.collate)

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def draw(self, seed: int, step: int, samples: list[int], batch: OrbitBatch) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 7919 * samples[0])
        return torch.randint(1, batch.images.shape[1], (len(samples),), generator=generator)

    def forward(self, batch: OrbitBatch, other: Tensor) -> dict[str, Tensor]:
        rows = torch.arange(len(other), device=batch.images.device)
        pairs = torch.stack([batch.images[:, 0], batch.images[rows, other]])
        embeds = F.normalize(self.encoder(normalise(pairs.flatten(0, 1))).image_embeds.float(), dim=-1)
        first, second = embeds.chunk(2)
        logits = first @ second.T / TEMPERATURE
        total = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
        accuracy = (logits.argmax(-1) == rows).float().mean()
        return {"total": total, "accuracy": accuracy}


def normalise(images: Tensor) -> Tensor:
    """[-1, 1] to what CLIP encoders see."""
    mean, std = (images.new_tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (images * 0.5 + 0.5 - mean) / std


@torch.no_grad()
def see_colours(vae: nn.Module) -> None:
    """Lets the untrained encoder's first layer see opponent colours, luma and hues at equal strength."""
    matrix = OPPONENT / OPPONENT_SCALE[:, None]
    weight = vae.encoder.conv_in.weight
    weight.copy_(torch.einsum("oihw,ij->ojhw", weight, matrix.to(weight)))


def held_out(config: Config) -> OrbitBatch:
    """The first orbits of the validation list, `train.validate_objects` at most."""
    dataset = build_dataset(config, "val")
    return OrbitBatch.collate([dataset[i] for i in range(min(len(dataset), config.train.validate_objects))])


def side_by_side(batch: OrbitBatch, *pictures: Tensor) -> Image:
    """Rows of an orbit's views, of each of `pictures` [B V, 3, H, W] in [0, 1] in turn."""
    rows = torch.stack([x.unflatten(0, batch.images.shape[:2]) for x in pictures], dim=1)
    return view_grid(rows.flatten(0, 2), columns=batch.images.shape[1])


@torch.no_grad()
def score_tiny(tiny: nn.Module, vae: nn.Module, batch: OrbitBatch) -> tuple[dict[str, float], dict[str, Image]]:
    """PSNR of the tiny decoder's views against the VAE's decoder's and against the truth, and their picture."""
    images = batch.images.flatten(0, 1)
    latents = vae.encode(images.to(next(vae.parameters()).device)).latent_dist.mean
    full = vae.decode(latents, num_frames=batch.images.shape[1]).sample.clamp(-1, 1).cpu() * 0.5 + 0.5
    scaled = (latents * vae.config.scaling_factor).to(next(tiny.parameters()).device)
    made = tiny.decode(scaled).sample.clamp(-1, 1).cpu() * 0.5 + 0.5
    truth = images * 0.5 + 0.5
    values = {"psnr_to_full": psnr(made, full).mean().item(), "psnr": psnr(made, truth).mean().item()}
    return values, {"tiny_decoder": side_by_side(batch, truth, full, made)}


@torch.no_grad()
def score_vae(vae: nn.Module, batch: OrbitBatch) -> tuple[dict[str, float], dict[str, Image]]:
    """PSNR over everything and over the foreground of held-out views, and their picture."""
    images = batch.images.flatten(0, 1)
    posterior = vae.encode(images.to(next(vae.parameters()).device)).latent_dist
    decoded = vae.decode(posterior.mean, num_frames=batch.images.shape[1]).sample.clamp(-1, 1).cpu()
    truth, made = images * 0.5 + 0.5, decoded * 0.5 + 0.5
    seen = batch.alpha.flatten(0, 1) > 0.5
    (_, *hues), (_, *made_hues) = (opponent(x * 2 - 1).unbind(1) for x in (truth, made))
    gain = [(a * b)[seen[:, 0]].sum() / (b * b)[seen[:, 0]].sum() for a, b in zip(made_hues, hues, strict=True)]
    values = {
        "red_green": gain[0].item(),  # 1: hues come out as strong as they are, 0: grey
        "yellow_blue": gain[1].item(),
        "psnr": psnr(made, truth).mean().item(),
        "psnr_foreground": psnr(made, truth, seen).mean().item(),
        "latent_mean": posterior.mean.mean().item(),
        "latent_std": posterior.mean.std().item(),
    }
    return values, {"vae": side_by_side(batch, truth, made)}


def train_part(options: argparse.Namespace) -> None:
    """The command with the options of ouroboros3d/cli/train_frozen_parts.py."""
    config = load_config(options.config, options.overrides)
    torch.manual_seed(config.train.seed)
    dataset, validate = build_dataset(config, "train"), None
    if options.part == "image_encoder":
        module = make_image_encoder(config.model.image_encoder)
        objective = ContrastiveObjective(module)
    else:
        module = make_vae(config.model.vae)
        if (start := config.model.pretrained.vae) is not None:
            fit_state(module, read_state(start), start)
        elif options.part == "tiny_decoder":
            raise ConfigError(
                "model.pretrained.vae = null: names the trained VAE that the tiny decoder learns from, such as "
                "checkpoints/small/vae.safetensors"
            )
        else:
            see_colours(module)
        objective, validate = VAEObjective(module), partial(score_vae, module, held_out(config))
    if options.part == "tiny_decoder":
        vae, module = module, make_tiny_decoder(config.model.tiny_decoder, config.model.vae.latent_channels)
        dataset = TeacherPairs(dataset, vae, options.orbits)
        objective, validate = TinyDecoderObjective(module), partial(score_tiny, module, vae, held_out(config))

    def export(folder: Path) -> None:
        if options.part == "tiny_decoder":
            save_tiny_decoder(module, folder / options.part)
        else:
            write_state(module.state_dict(), folder / f"{options.part}.safetensors")

    Trainer(objective, dataset, config.train, validate, export).run()
