#!/usr/bin/env bash
# From nothing to the small model in checkpoints/small: objects, orbits, and the stages of configs/small/.
#
#   scripts/train_small.sh [--budget 4h]
#
# The budget is the training time of all stages together (rendering the orbits takes some minutes on top); every long
# stage gets its share, and its learning rate ends with it. More is better: see checkpoints/small/README.md.
# Every part can be interrupted and repeated: what is finished is skipped, what is not goes on where it was.
# Needs `apt-get download` (or the package's .deb, see scripts/get_furniture.py) and pip's trimesh, embreex, scipy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE
python="${PYTHON:-python}"
budget=4h
case "${1:-}" in
  "") ;;
  --budget) budget="${2:-}" ;;
  *) budget="" ;;
esac
case "$budget" in
  *[0-9]h) seconds=$((${budget%h} * 3600)) ;;
  *[0-9]m) seconds=$((${budget%m} * 60)) ;;
  *) echo "error: scripts/train_small.sh [--budget 7h], in whole h or m" >&2; exit 2 ;;
esac
share() { echo "train.time_budget=$((seconds * $1 / 100))s"; }

[[ -f data/furniture/assets.csv ]] || "$python" scripts/get_furniture.py --out data/furniture
"$python" scripts/render_orbits.py --assets data/furniture/assets.csv --out data/orbits64 --size 64 --depth 32
"$python" scripts/render_orbits.py --procedural 920 --orbits 1 --out data/procedural64 --size 64 --depth 32

# The training list holds both sets, as paths relative to data/small64; validation and test are furniture alone.
mkdir -p data/small64
{ sed 's#^#../orbits64/#' data/orbits64/train.txt; sed 's#^#../procedural64/#' data/procedural64/train.txt; } \
  > data/small64/train.txt
for split in val test; do sed 's#^#../orbits64/#' "data/orbits64/$split.txt" > "data/small64/$split.txt"; done

"$python" scripts/train_frozen_parts.py vae --config configs/small/vae_colours.yaml
"$python" scripts/train_frozen_parts.py vae --config configs/small/vae.yaml "$(share 10)"
"$python" scripts/train_frozen_parts.py image_encoder --config configs/small/image_encoder.yaml
"$python" train.py --config configs/small/lgm_positions.yaml
"$python" train.py --config configs/small/lgm.yaml "$(share 20)"
"$python" train.py --config configs/small/unet.yaml "$(share 45)"
"$python" train.py --config configs/small/joint.yaml "$(share 20)"
mkdir -p checkpoints/small
cp runs/small/joint/export/*.safetensors checkpoints/small/
