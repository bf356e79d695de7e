#!/usr/bin/env bash
# From nothing to the small model in checkpoints/small: objects, orbits, and the four stages of configs/small/.
#
#   scripts/train_small.sh [minutes for the diffusion model] [minutes for joint training]
#
# Every part can be interrupted and repeated: what is finished is skipped, what is not goes on where it was.
# Needs `apt-get download` (or the package's .deb, see scripts/get_furniture.py) and pip's trimesh, embreex, scipy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE
python="${PYTHON:-python}"
unet_minutes="${1:-180}" joint_minutes="${2:-60}"

[[ -f data/furniture/assets.csv ]] || "$python" scripts/get_furniture.py --out data/furniture
"$python" scripts/render_orbits.py --assets data/furniture/assets.csv --out data/orbits64 --size 64 --depth 32
"$python" scripts/render_orbits.py --procedural 920 --orbits 1 --out data/procedural64 --size 64 --depth 32

# The training list holds both sets, as paths relative to data/small64; validation and test are furniture alone.
mkdir -p data/small64
{ sed 's#^#../orbits64/#' data/orbits64/train.txt; sed 's#^#../procedural64/#' data/procedural64/train.txt; } \
  > data/small64/train.txt
for split in val test; do sed 's#^#../orbits64/#' "data/orbits64/$split.txt" > "data/small64/$split.txt"; done

"$python" scripts/train_frozen_parts.py vae --config configs/small/vae_colours.yaml
"$python" scripts/train_frozen_parts.py vae --config configs/small/vae.yaml
"$python" scripts/train_frozen_parts.py image_encoder --config configs/small/image_encoder.yaml
"$python" train.py --config configs/small/lgm_positions.yaml
"$python" train.py --config configs/small/lgm.yaml
"$python" train.py --config configs/small/unet.yaml train.time_budget="${unet_minutes}m"
"$python" train.py --config configs/small/joint.yaml train.time_budget="${joint_minutes}m"
mkdir -p checkpoints/small
cp runs/small/joint/export/*.safetensors checkpoints/small/
