#!/usr/bin/env bash
# Sets up what is missing, then runs:
#   ./run.sh inference [arguments of inference.py]   without --input_img: the first picture of testset/
#   ./run.sh train     [arguments of train.py]       without any: the small model; torchrun with several GPUs
#   ./run.sh train_small [--budget 4h]               the small model from nothing: objects, orbits, every stage
#   ./run.sh test      [arguments of pytest]
# Uses the active Python environment if it satisfies requirements.txt, otherwise .venv beside this file, which
# PYTHON=python3.12 ./run.sh ... would make with that interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$root/.venv"
# torch's and numba's threads share the cores: waiting ones must not spin.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
torch_cpu="2.13.0" # of the CPU build; any torch that requirements.txt allows will do

say() { echo "run.sh: $*" >&2; }
die() { say "$@"; exit 1; }
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q "^GPU"; }

# satisfied PYTHON PACKAGE...: does it have requirements.txt and these, in versions that fit?
satisfied() {
  command -v "$1" >/dev/null && "$1" - "$root/requirements.txt" "${@:2}" 2>/dev/null <<'EOF'
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
with open(sys.argv[1]) as file:
    lines = [line.split("#")[0].strip() for line in file] + sys.argv[2:]
for wanted in map(Requirement, filter(None, lines)):
    if not wanted.specifier.contains(version(wanted.name), prereleases=True):
        sys.exit(f"{wanted} is missing")
EOF
}

# install PACKAGE...: makes .venv and installs requirements.txt and these into it.
install() {
  local base="${PYTHON:-python3}"
  command -v "$base" >/dev/null || die "there is no $base; install Python 3.10 or newer, or set PYTHON to one"
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "Python 3.10 or newer is needed, $base is $("$base" -V 2>&1); set PYTHON, e.g. PYTHON=python3.12 $0"
  say "setting up $venv, once; this takes some minutes"
  "$base" -m venv "$venv"
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq --prefer-binary)
  if ! has_gpu && ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
    # The default wheels bring gigabytes of CUDA; "+cpu" cannot be one of them. It is found where pip is told of
    # PyTorch's index of CPU wheels (PIP_EXTRA_INDEX_URL); elsewhere take what the configured index has.
    "${pip[@]}" "torch==$torch_cpu+cpu" 2>/dev/null || "${pip[@]}" "torch==$torch_cpu" ||
      say "torch $torch_cpu is not to be had"
  fi
  "${pip[@]}" -r "$root/requirements.txt" "$@" || die "pip could not install the packages; its message is above"
}

# Sets `python` to an interpreter that has what is needed.
prepare() {
  local candidate
  has_gpu && set -- "$@" "gsplat>=1.5.3" # the renderer there
  for candidate in python python3 "$venv/bin/python"; do
    if satisfied "$candidate" "$@"; then
      python="$candidate"
      return
    fi
  done
  install "$@"
  python="$venv/bin/python"
}

verb="${1:-}"
[[ $# -gt 0 ]] && shift
case "$verb" in
  inference)
    prepare
    if [[ " $* " != *" --input_img"[\ =]* && " $* " != *" -h "* && " $* " != *" --help "* ]]; then
      pictures=("$root"/testset/*.{webp,png})
      for picture in "${pictures[@]}"; do [[ -e $picture ]] && break; done
      [[ -e $picture ]] || die "there is no picture in $root/testset; pass --input_img"
      set -- --input_img "$picture" "$@"
    fi
    exec "$python" "$root/inference.py" "$@"
    ;;
  train)
    prepare
    [[ $# -gt 0 ]] || set -- --config "$root/configs/small.yaml"
    gpus=0
    has_gpu && gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    [[ $gpus -gt 1 ]] &&
      exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$root/train.py" "$@"
    exec "$python" "$root/train.py" "$@"
    ;;
  train_small)
    prepare embreex mapbox_earcut
    PYTHON="$python" exec "$root/scripts/train_small.sh" "$@"
    ;;
  test)
    prepare pytest ruff trimesh embreex mapbox_earcut webdataset
    cd "$root"
    exec "$python" -m pytest "$@"
    ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
