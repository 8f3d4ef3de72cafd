#!/usr/bin/env bash
# Sets up everything, builds, and shows a training job that survives SIGKILL of a worker, a node, an agent and the
# controller. Ends with a table and a plot (demo-output/loss.png). About 2 minutes once set up; the first time, the
# packages, PyTorch and the build come on top.
set -euo pipefail
cd "$(dirname "$0")/.."
bash deploy/setup.sh
exec .venv/bin/python deploy/demo/demo.py "$@"
