#!/usr/bin/env bash
# From nothing to the small model in checkpoints/small: objects, orbits, and the stages of configs/small/.
#
#   ./run.sh train_small [--budget 4h] [--dry_run]    (or this file itself, in an environment that has what it needs)
#
# On a GPU, or on CPU cores, of which it takes two for the longest stages. The budget is the training time of all stages
# together (rendering the orbits takes some minutes on top); every long stage gets its share, and its learning rate ends
# with it. More is better: checkpoints/small/README.md has what the committed weights took. docs/training.md
# lists the stages; validation goes to their metrics.jsonl, and the last command prints the model's scores.
# Every part can be interrupted and repeated: what is finished is skipped, what is not goes on where it was.
# --dry_run prints the plan: stages, samples, and hours on this machine from a timed step of each.
# Needs `apt-get download` (or the package's .deb, see scripts/get_furniture.py), and pip's embreex and mapbox_earcut,
# which run.sh installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=. OMP_WAIT_POLICY=PASSIVE
python="${PYTHON:-python}"
budget=4h
dry_run=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    --budget) budget="${2:-}"; shift $(($# > 1 ? 2 : 1)) ;;
    --dry_run) dry_run=yes; shift ;;
    *) budget=""; break ;;
  esac
done
case "$budget" in
  *[0-9]h) seconds=$((${budget%h} * 3600)) ;;
  *[0-9]m) seconds=$((${budget%m} * 60)) ;;
  *) echo "error: scripts/train_small.sh [--budget 7h] [--dry_run], in whole h or m" >&2; exit 2 ;;
esac
processes=1 # of the U-Net's and the joint stage
if ! nvidia-smi -L 2>/dev/null | grep -q "^GPU" && [[ "$(nproc)" -gt 1 ]]; then processes=2; fi
precision=() # of the configurations: bf16, which a CPU without its instructions only emulates
if ! nvidia-smi -L 2>/dev/null | grep -q "^GPU" && ! grep -q avx512_bf16 /proc/cpuinfo; then
  precision=(train.mixed_precision=fp32)
fi
# Stages of configs/small and their shares of the budget in percent; 0 has a fixed number of steps.
stages=(vae_colours:0 vae:10 image_encoder:0 lgm_positions:0 lgm:10 lgm_grown:5 unet:45 joint:10 feedback:10 lgm_predicted:5)
if [[ -n "$dry_run" ]]; then
  exec "$python" scripts/plan_stages.py --budget_seconds "$seconds" "${stages[@]}" "${precision[@]}"
fi

[[ -f data/furniture/assets.csv ]] || "$python" scripts/get_furniture.py --out data/furniture
"$python" scripts/render_orbits.py --assets data/furniture/assets.csv --out data/orbits64 --size 64 --depth 32
"$python" scripts/render_orbits.py --assets data/furniture/assets.csv --split train --stretch 1.4 --seed 1 \
  --out data/stretched64 --size 64 --depth 32
"$python" scripts/render_orbits.py --procedural 1840 --orbits 1 --out data/procedural64 --size 64 --depth 32

# The training list holds all three sets, as paths relative to data/small64; validation and test are furniture alone.
mkdir -p data/small64
for set in orbits64 stretched64 procedural64; do sed "s#^#../$set/#" "data/$set/train.txt"; done > data/small64/train.txt
for split in val test; do sed 's#^#../orbits64/#' "data/orbits64/$split.txt" > "data/small64/$split.txt"; done

for stage in "${stages[@]}"; do
  name="${stage%:*}" percent="${stage#*:}"
  options=(--config "configs/small/$name.yaml" "${precision[@]}")
  if [[ "$percent" -gt 0 ]]; then options+=("train.time_budget=$((seconds * percent / 100))s"); fi
  case "$name" in
    vae*) "$python" scripts/train_frozen_parts.py vae "${options[@]}" ;;
    image_encoder) "$python" scripts/train_frozen_parts.py image_encoder "${options[@]}" ;;
    lgm | lgm_positions) "$python" train.py "${options[@]}" ;;
    lgm_grown)
      start=runs/small/lgm_grown/start/recon_model.safetensors
      [[ -f $start ]] || "$python" scripts/grow_lgm.py runs/small/lgm/export/recon_model.safetensors --out "$start"
      "$python" train.py "${options[@]}"
      ;;
    *) # 8 objects a step, shared by the processes
      "$python" -m torch.distributed.run --standalone --nproc_per_node="$processes" train.py "${options[@]}" \
        "train.batch_size=$((8 / processes))" ;;
  esac
done
"$python" scripts/evaluate.py --list test.txt --out runs/small/evaluation \
  model.pretrained.checkpoint=runs/small/lgm_predicted/export
echo "weights: runs/small/lgm_predicted/export; the committed ones are left as they are. To replace them:"
echo "  cp runs/small/lgm_predicted/export/*.safetensors checkpoints/small/"
