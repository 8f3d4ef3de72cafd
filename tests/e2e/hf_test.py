"""everstep.hf.EverstepCallback in a real Trainer: killed in the middle, it goes on at the right step with equal losses.

Needs transformers and accelerate, which setup does not install: EVERSTEP_HF_PYTHON names an interpreter that has them,
and torch; else the project's own is looked at. Without them it is skipped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_test import KILLED_AT, STEPS, Training, work  # noqa: F401
from launch import PROGRAMS, PYTHON, ROOT

SCRIPT = Path(__file__).parent / "scripts/hf_trainer.py"
HF_PYTHON = os.environ.get("EVERSTEP_HF_PYTHON", str(PYTHON))
HAS_TRANSFORMERS = subprocess.run([HF_PYTHON, "-c", "import importlib.util as u, sys; "
                                   "sys.exit(not (u.find_spec('transformers') and u.find_spec('accelerate')))"]).returncode == 0
needs = pytest.mark.skipif(not HAS_TRANSFORMERS, reason=f"{HF_PYTHON} has no transformers and accelerate; set EVERSTEP_HF_PYTHON")


def losses(run: Training) -> dict[int, str]:
    """What each step's loss was, the same each time that a step was done."""
    told: dict[int, str] = {}
    for words in run.lines("step"):
        assert told.setdefault(int(words[1]), words[3]) == words[3], words
    return told


@needs
@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_trainer_goes_on_with_equal_losses(work: Path, world: int) -> None:  # noqa: F811
    command = [str(PROGRAMS / "everstep-run"), "--standalone", "--nproc-per-node", str(world), "--max-restarts", "3"]
    environment = {"PYTHON_EXEC": HF_PYTHON}
    whole = Training(work, "whole", [*command, "--state-dir", str(work / "w")], SCRIPT, env=environment)
    end = whole.finish()
    assert end[:2] == ["memory", str(STEPS)]
    run = Training(work, "killed", [*command, "--state-dir", str(work / "k")], SCRIPT, env=environment)
    run.kill_a_worker()
    assert run.finish() == end
    run.assert_went_on(STEPS + 1)
    assert losses(run) == losses(whole)


@needs
def test_alone_it_goes_on_from_files(work: Path) -> None:  # noqa: F811
    whole = Training(work, "whole", [HF_PYTHON], SCRIPT)
    end = whole.finish()
    assert end[0] == "files"
    first = Training(work, "a", [HF_PYTHON], SCRIPT)
    first.kill_a_worker()
    assert first.process.wait(30) == -signal.SIGKILL
    before = losses(first)
    second = Training(work, "a", [HF_PYTHON], SCRIPT)
    assert second.finish() == end
    assert KILLED_AT < min(losses(second)) <= STEPS
    assert before | losses(second) == losses(whole)


def test_without_transformers_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["transformers"] = None
try:
    import everstep.hf
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT / "worker/python")})
    assert "needs Hugging Face's transformers" in said.stdout and "pip install transformers accelerate" in said.stdout, said
