"""Trains the small model's VAE, image encoder or tiny decoder from scratch (the full model uses SVD's).

    python scripts/train_frozen_parts.py vae --config configs/small/vae_colours.yaml
    python scripts/train_frozen_parts.py vae --config configs/small/vae.yaml
    python scripts/train_frozen_parts.py image_encoder --config configs/small/image_encoder.yaml
    python scripts/train_frozen_parts.py tiny_decoder --config configs/small/tiny_decoder.yaml

VAE: squared error in opponent colours and a little KL on orbits of views, so that the temporal decoder learns to
treat them as frames. Image encoder: two views of an object must embed closer than those of other objects
(InfoNCE), which keeps what an object's views have in common: its colours and kind. Tiny decoder: trained to repeat the
VAE decoder's output, on latents of which some are noisy as inside the loop.
Writes `<train.output_dir>/export/vae.safetensors`, `image_encoder.safetensors` or the folder `tiny_decoder`, and
pictures beside it.
"""

from __future__ import annotations

from ouroboros3d.cli.options import ConfigParser, say_loading
from ouroboros3d.config.loading import load_config


def main(arguments: list[str]) -> None:
    parser = ConfigParser(__doc__, config=None)
    parser.add_argument("part", choices=("vae", "image_encoder", "tiny_decoder"), help="what to train")
    parser.add_argument(
        "--orbits",
        type=int,
        default=32,
        help="number of orbits that the tiny decoder learns from (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    load_config(options.config, options.overrides)  # refuses a bad one before seconds of imports
    say_loading()
    from ouroboros3d.training.frozen_parts import train_part

    train_part(options)
