#!/usr/bin/env bash
# Sets up everything, builds, runs the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
bash deploy/setup.sh
ctest --test-dir build/release --output-on-failure --no-tests=error
