"""docs/examples/pipeline_gpt2.py: Hugging Face's GPT-2 in layers is the model that it was.

Four ranks train it on two pipelines, and one of them is killed; a plain loop trains the whole model on the same samples
(scripts/gpt2_whole.py). Losses and weights agree up to rounding. Needs transformers, as hf_test.py says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import ROOT, Run, clean_environment, wait_for

EXAMPLE = ROOT / "docs/examples/pipeline_gpt2.py"
WHOLE = Path(__file__).parent / "scripts/gpt2_whole.py"
STEPS = 40
HF_PYTHON = os.environ.get("EVERSTEP_HF_PYTHON", str(ROOT / ".venv/bin/python"))
HAS_TRANSFORMERS = subprocess.run([HF_PYTHON, "-c", "import importlib.util as u, sys; "
                                   "sys.exit(not u.find_spec('transformers'))"]).returncode == 0
needs = pytest.mark.skipif(not HAS_TRANSFORMERS, reason=f"{HF_PYTHON} has no transformers; set EVERSTEP_HF_PYTHON")


@pytest.fixture
def work() -> Iterator[Path]:
    """Short, since a socket's path is below it."""
    folder = Path(tempfile.mkdtemp(prefix="esg-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@needs
def test_its_loss_and_weights_are_those_of_the_whole_model_in_a_plain_loop(work: Path) -> None:
    environment = {"PYTHON_EXEC": HF_PYTHON, "OMP_NUM_THREADS": "1"}
    run = Run(work, "--standalone", "--nproc-per-node", 4, "--max-restarts", 3, EXAMPLE, "--steps", STEPS, "--dropout", 0,
              "--save", work / "trained", env=environment)
    line = re.compile(r"step (\d+) rank (\d) of 4 pid (\d+) loss ([\d.]+)")

    def ten_steps() -> dict[int, int]:
        """Rank -> process id, once every rank has taken ten."""
        ranks = {int(rank): int(pid) for step, rank, pid, _ in line.findall(run.stdout()) if step == "9"}
        return ranks if len(ranks) == 4 else {}

    try:
        ranks = wait_for("ten steps of four ranks", ten_steps, 120)
        os.kill(ranks[3], signal.SIGKILL)
        assert run.wait(180) == 0, run.told()
    finally:
        run.stop()
    assert "pipeline 1: 2 nodes" in run.stdout(), "the model is apart: more stages than one"
    told: dict[int, float] = {}
    for step, _, _, loss in line.findall(run.stdout()):
        assert told.setdefault(int(step), float(loss)) == float(loss), f"step {step} on two ranks"
    assert sorted(told) == list(range(STEPS))
    plain = subprocess.run([HF_PYTHON, str(WHOLE), str(EXAMPLE), str(STEPS), str(work / "trained")], capture_output=True,
                           text=True, timeout=180, env=clean_environment() | {"OMP_NUM_THREADS": "1"})
    assert plain.returncode == 0, plain.stderr
    whole = json.loads(plain.stdout)
    assert whole["losses"][-1] < whole["losses"][0] / 2, "it learns"
    for step in range(STEPS):
        assert told[step] == pytest.approx(whole["losses"][step], rel=1e-4), f"step {step}"
    # Adam divides gradients that are nothing but rounding (a key's bias has none) by themselves.
    assert whole["weights"] < 0.01 * whole["moved"]
