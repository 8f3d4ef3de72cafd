"""The example of twenty lines with a Checkpointer (docs/examples/train.py): unchanged under everstep run, under torchrun, and alone.

Each way it is killed in the middle and goes on; the end is the same to the last bit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import PROGRAMS, PYTHON, ROOT, clean_environment, wait_for

SCRIPT = ROOT / "docs/examples/train.py"
LIBRARY = PROGRAMS.parent / "lib/libeverstep.so"
KILLED_AT, STEPS = 25, 60


@pytest.fixture
def work() -> Iterator[Path]:
    """Short, since a socket's path is below it."""
    folder = Path(tempfile.mkdtemp(prefix="esk-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Training:
    """One run of the script by `command`, and what it printed."""

    def __init__(self, work: Path, name: str, command: list[str], script: Path = SCRIPT, *more: str,
                 env: dict[str, str] | None = None) -> None:
        self.out = work / f"{name}.out"
        self.old: set[str] = set()  # processes that had made steps when one was killed
        folder = work / f"{name}.cwd"
        folder.mkdir(exist_ok=True)
        steer = clean_environment() | {"OMP_NUM_THREADS": "1", "EVERSTEP_LIBRARY": str(LIBRARY)} | (env or {})
        with self.out.open("wb") as out:
            self.process = subprocess.Popen([*command, str(script), str(work / f"{name}.files"), *more],
                                            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=steer, cwd=folder,
                                            start_new_session=True)

    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def lines(self, word: str) -> list[list[str]]:
        return [w for line in self.text().splitlines() if len(w := line.split()) > 2 and w[0] == word]

    def kill_a_worker(self) -> None:
        """SIGKILL, once some worker has come as far as KILLED_AT."""

        def far() -> int:
            assert self.process.poll() is None, self.text()
            return next((int(w[2]) for w in self.lines("step") if int(w[1]) >= KILLED_AT), 0)

        victim = wait_for(f"step {KILLED_AT}", far, 120)
        os.kill(victim, signal.SIGKILL)
        self.old = {w[2] for w in self.lines("step")}

    def finish(self) -> list[str]:
        """Tier and bits at the end, the same on every rank."""
        try:
            code = self.process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"no end within 120 s\n{self.text()}") from None
        assert code == 0, self.text()
        ends = self.lines("end")
        assert ends, self.text()
        assert all(e == ends[0] for e in ends), ends
        return ends[0][1:]

    def assert_went_on(self, end: int = STEPS) -> None:
        """The new processes began behind the step that was being done when the old one was killed, or redid that one."""
        reached = max(int(w[1]) for w in self.lines("step") if w[2] in self.old)
        fresh = [int(w[1]) for w in self.lines("step") if w[2] not in self.old]
        assert reached - 1 <= min(fresh) <= reached + 1, self.text()
        assert set(fresh) == set(range(min(fresh), end))


@pytest.fixture(scope="module")
def undisturbed() -> list[str]:
    folder = Path(tempfile.mkdtemp(prefix="esk-", dir="/tmp"))
    try:
        return Training(folder, "clean", [sys.executable]).finish()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_alone_it_goes_on_from_files(work: Path, undisturbed: list[str]) -> None:
    first = Training(work, "alone", [sys.executable])
    first.kill_a_worker()
    assert first.process.wait(30) == -signal.SIGKILL
    assert "was not started by `everstep run`: steps go to files" in first.text()
    second = Training(work, "alone", [sys.executable])
    assert second.finish() == undisturbed
    assert int(second.lines("step")[0][1]) >= KILLED_AT
    assert undisturbed[0] == "files"


def test_under_torchrun_it_goes_on_from_files(work: Path, undisturbed: list[str]) -> None:
    torchrun = str(PYTHON.parent / "torchrun")
    run = Training(work, "torchrun", [torchrun, "--standalone", "--nproc-per-node", "1", "--max-restarts", "3"])
    run.kill_a_worker()
    assert run.finish() == undisturbed
    run.assert_went_on()


def test_under_everstep_run_it_goes_on_from_memory(work: Path, undisturbed: list[str]) -> None:
    run = Training(work, "everstep", [str(PROGRAMS / "everstep-run"), "--state-dir", str(work / "s"), "--standalone",
                                      "--nproc-per-node", "2"])
    run.kill_a_worker()
    tier, *bits = run.finish()
    assert tier == "memory"
    assert bits == undisturbed[1:]
    run.assert_went_on()
    assert not list(work.glob("everstep.cwd/checkpoints/*")), "files are for when there is no agent"
