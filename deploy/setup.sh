#!/usr/bin/env bash
# Installs what Everstep needs and builds it. Idempotent: what is there already is left alone.
#
#   deploy/setup.sh [--no-python] [--no-build] [--with-nccl]
#
#   --no-python   no virtual environment, no PyTorch
#   --no-build    packages and Python only
#   --with-nccl   NCCL's header and library from PyPI (nvidia-nccl-cu13), for GPU paths
#
# Environment: PYTHON (interpreter of the virtual environment; default python3), JOBS (build jobs).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

python=1 build=1 nccl=0
for arg in "$@"; do
  case $arg in
    --no-python) python=0 ;;
    --no-build) build=0 ;;
    --with-nccl) nccl=1 ;;
    -h | --help) sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: setup.sh does not know '$arg'; it knows --no-python, --no-build, --with-nccl" >&2; exit 2 ;;
  esac
done

say() { printf '== %s\n' "$*"; }

# --- Debian packages: compiler and build, libraries, tests, what the demo and the tests call -----------
packages=(
  g++ cmake ninja-build ccache pkg-config
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc
  librocksdb-dev libspdlog-dev libfmt-dev libcli11-dev nlohmann-json3-dev libcpp-httplib-dev libisal-dev
  libgtest-dev
  iproute2 procps
)
[ "$python" = 0 ] || packages+=(python3-venv)
[ "$(id -u)" = 0 ] && sudo="" || sudo=sudo

if ! command -v dpkg-query > /dev/null || ! command -v apt-get > /dev/null; then
  echo "error: this is not a Debian system, so setup.sh cannot install packages here." >&2
  echo "  hint: install the equivalents of: ${packages[*]}" >&2
  echo "        then: cmake --preset release && cmake --build --preset release" >&2
  exit 1
fi
missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$p" 2> /dev/null | grep -q 'ok installed' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ -n "$sudo" ] && ! command -v sudo > /dev/null; then
    echo "error: missing Debian packages and neither root nor sudo: ${missing[*]}" >&2
    echo "  hint: as root, run: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  say "installing Debian packages: ${missing[*]}"
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
else
  say "Debian packages: all ${#packages[@]} there"
fi

# --- Python: .venv with PyTorch ---------------------------------------------------------------------------
if [ "$python" = 1 ]; then
  py=${PYTHON:-python3}
  has_torch() { "$1" -c 'import torch, sys; v = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]); sys.exit(v < (2, 4))' 2> /dev/null; }
  if [ ! -x .venv/bin/python ]; then
    if has_torch "$py"; then
      say "making .venv/ on top of $("$py" --version), whose PyTorch will do"
      "$py" -m venv --system-site-packages .venv
    else
      say "making .venv/ with $("$py" --version)"
      "$py" -m venv .venv
    fi
  fi
  pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2); }
  if has_torch .venv/bin/python; then
    say "PyTorch $(.venv/bin/python -c 'import torch; print(torch.__version__)'): there"
  else
    say "installing PyTorch 2.13.0 (a few minutes)"
    pip install torch==2.13.0
  fi
  wanted=()
  for m in numpy matplotlib pytest hypothesis safetensors; do
    .venv/bin/python -c "import importlib.util as u, sys; sys.exit(u.find_spec('$m') is None)" || wanted+=("$m")
  done
  if [ ${#wanted[@]} -gt 0 ]; then
    say "installing for the demo and the tests: ${wanted[*]}"
    pip install "${wanted[@]}"
  fi
  [ "$nccl" = 0 ] || { say "installing NCCL from PyPI"; pip install nvidia-nccl-cu13; }
fi

# --- build -------------------------------------------------------------------------------------------------
if [ "$build" = 1 ]; then
  say "building build/release"
  cmake --preset release > /dev/null
  cmake --build --preset release ${JOBS:+--parallel "$JOBS"}
  if [ "$python" = 1 ]; then
    site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    # The package is used from the checkout; a wheel is a matter of `pip install worker/python`.
    printf '%s\n' "$root/worker/python" > "$site/everstep.pth"
    for program in build/release/bin/everstep*; do
      ln -sf "$root/$program" ".venv/bin/$(basename "$program")"
    done
    say "ready: . .venv/bin/activate && everstep run --standalone --nproc-per-node 2 your_script.py"
  fi
fi
