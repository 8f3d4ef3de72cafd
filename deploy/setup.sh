#!/usr/bin/env bash
# Installs what Everstep needs (Debian packages, a Python environment) and builds build/release.
# Idempotent: what is there already is left alone.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '== %s\n' "$*"; }

packages=(g++ cmake ninja-build ccache pkg-config
          libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc
          librocksdb-dev libspdlog-dev libfmt-dev libcli11-dev libcpp-httplib-dev
          libgtest-dev libbenchmark-dev)

missing=()
if command -v dpkg-query > /dev/null; then
  for p in "${packages[@]}"; do
    dpkg-query -W -f '${Status}' "$p" 2> /dev/null | grep -q 'ok installed' || missing+=("$p")
  done
else
  echo "error: this is not a Debian system; install the equivalents of: ${packages[*]}" >&2
  exit 1
fi
if [ ${#missing[@]} -gt 0 ]; then
  say "installing Debian packages: ${missing[*]}"
  sudo=""
  [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

say "building build/release"
cmake --preset release > /dev/null
cmake --build --preset release
