#!/usr/bin/env bash
# Installs what Everstep needs and builds build/release. Idempotent.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake --preset release > /dev/null
cmake --build --preset release
