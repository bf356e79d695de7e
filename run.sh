#!/usr/bin/env bash
# Sets up what is missing, then runs:
#   ./run.sh inference [arguments of inference.py]   without --input_img: the first picture of testset/
#   ./run.sh test      [arguments of pytest]         without any: the default suite
#   ./run.sh train     [arguments of train.py]       without any: one minute on the orbits in tests/data
#   ./run.sh app       [arguments of scripts/app.py] the web app
#   ./run.sh results   [arguments of evaluate.py]    the first table of docs/results.md, from nothing
#   ./run.sh train_small [--budget 4h]               the small model from nothing: objects, orbits, every stage
#   ./run.sh setup                                   only makes .venv
# Uses the active Python environment if it satisfies requirements.txt, otherwise .venv beside this file, which
# PYTHON=python3.12 ./run.sh ... would make with that interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$root/.venv"
# torch's and numba's threads share the cores: waiting ones must not spin.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
torch_cpu="2.13.0" torchvision_cpu="0.28.0" # the CPU builds; any that requirements.txt allows will do

say() { echo "run.sh: $*" >&2; }
die() { say "$@"; exit 1; }
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q "^GPU"; }
activation() { echo "to use it in this shell: source $venv/bin/activate"; }

# needed [PACKAGE...]: the lines of requirements.txt and these. Without a GPU torchvision, which LPIPS alone needs, and
# gsplat may be missing: no index but PyTorch's own has a torchvision for CPU builds of torch.
needed() {
  local skip="^$"
  has_gpu || skip="^(torchvision|gsplat)"
  grep -vE "$skip" "$root/requirements.txt"
  [[ $# -eq 0 ]] || printf '%s\n' "$@"
}

# satisfied PYTHON PACKAGE...: does it have what is needed, in versions that fit?
satisfied() {
  command -v "$1" >/dev/null && needed "${@:2}" | "$1" -c '
import sys
from importlib.metadata import version
from packaging.requirements import Requirement
for line in sys.stdin:
    if wanted := line.split("#")[0].strip():
        wanted = Requirement(wanted)
        applies = wanted.marker is None or wanted.marker.evaluate()
        if applies and not wanted.specifier.contains(version(wanted.name), prereleases=True):
            sys.exit(f"{wanted} is missing")
' 2>/dev/null
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
  if has_gpu; then
    "${pip[@]}" -r "$root/requirements.txt" "$@" || die "pip could not install the packages; its message is above"
  else
    # The default wheels bring gigabytes of CUDA; "+cpu" cannot be one of them. It is found where pip is told of
    # PyTorch's index of CPU wheels (PIP_EXTRA_INDEX_URL); elsewhere take what the configured index has.
    if ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
      "${pip[@]}" "torch==$torch_cpu+cpu" "torchvision==$torchvision_cpu+cpu" 2>/dev/null ||
        "${pip[@]}" "torch==$torch_cpu" || say "torch $torch_cpu is unavailable; taking what pip finds"
    fi
    needed "$@" >"$venv/needed.txt"
    "${pip[@]}" -r "$venv/needed.txt" || die "pip could not install the packages; its message is above"
    "$venv/bin/python" -c "import torchvision" 2>/dev/null ||
      say "no torchvision for a CPU build of torch was found: everything works except LPIPS"
  fi
  say "$venv is ready; $(activation)"
}

# Sets `python` to an interpreter that has what is needed.
prepare() {
  local candidate
  for candidate in python python3 "$venv/bin/python"; do
    if satisfied "$candidate" "$@"; then
      python="$candidate"
      return
    fi
  done
  install "$@"
  python="$venv/bin/python"
}

data_packages=(embreex mapbox_earcut)
verb="${1:-}"
[[ $# -gt 0 ]] && shift
case "$verb" in
  setup)
    prepare
    if [[ $python == "$venv/bin/python" ]]; then say "$(activation)"; else say "$(command -v "$python") has everything"; fi
    ;;
  inference)
    prepare
    if [[ " $* " != *" --input"[_\ =]* && " $* " != *" -h "* && " $* " != *" --help "* ]]; then
      pictures=("$root"/testset/*.{webp,png})
      for picture in "${pictures[@]}"; do [[ -e $picture ]] && break; done
      [[ -e $picture ]] || die "there is no picture in $root/testset; pass --input_img"
      set -- --input_img "$picture" "$@"
    fi
    exec "$python" "$root/inference.py" "$@"
    ;;
  train)
    prepare
    [[ $# -gt 0 ]] || set -- --config configs/first_run.yaml
    gpus=0
    has_gpu && gpus="$("$python" -c 'import torch; print(torch.cuda.device_count())')"
    [[ $gpus -gt 1 && "$*" != *first_run* ]] &&
      exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" "$root/train.py" "$@"
    exec "$python" "$root/train.py" "$@"
    ;;
  app)
    prepare "gradio>=6.31,<7"
    exec "$python" "$root/scripts/app.py" "$@"
    ;;
  results)
    prepare "${data_packages[@]}"
    cd "$root"
    [[ -f data/furniture/assets.csv ]] || "$python" scripts/get_furniture.py --out data/furniture
    "$python" scripts/render_orbits.py --assets data/furniture/assets.csv --out data/orbits64 --size 64 --depth 32
    exec "$python" scripts/evaluate.py --list test.txt --seeds 0 1 2 --out runs/evaluation data.root=data/orbits64 "$@"
    ;;
  train_small)
    prepare "${data_packages[@]}"
    PYTHON="$python" exec "$root/scripts/train_small.sh" "$@"
    ;;
  test)
    prepare pytest pytest-xdist ruff webdataset trimesh gaussforge xatlas "${data_packages[@]}"
    cd "$root"
    # One thread per process: the tests' networks are too small for more. Stealing keeps most of a file's tests in one
    # process, so that they share their fixtures.
    OMP_NUM_THREADS=1 exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
    ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
