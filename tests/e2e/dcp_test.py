"""FSDP2 with stock dcp.save and dcp.load through everstep.dcp: under everstep run, under torchrun, with no launcher.

Each way a worker is killed in the middle, and the weights at the end are those of a run that nothing disturbed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_test import KILLED_AT, Training, work  # noqa: F401
from launch import PROGRAMS, PYTHON, clean_environment

SCRIPT = Path(__file__).parent / "scripts/fsdp2_dcp.py"
TORCHRUN = [str(PYTHON.parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]


def everstep_run(work: Path, name: str, *flags: object) -> list[str]:  # noqa: F811
    # A survivor's own error may be seen before the killed rank's end, and is the script's then.
    return [str(PROGRAMS / "everstep-run"), "--state-dir", str(work / name), "--standalone", "--nproc-per-node", "2",
            "--max-restarts", "3", *map(str, flags)]


def went_on(run: Training, where: str, since: int = KILLED_AT - KILLED_AT % 5) -> None:
    """Some start went on from the save that was over before KILLED_AT, or a later one."""
    starts = [(int(w[1]), w[2]) for w in run.lines("from")]
    assert any(step >= since and tier == where for step, tier in starts), run.text()


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[dict[int, str]]:
    """Weights at the end by world size."""
    folder = Path(tempfile.mkdtemp(prefix="esd-", dir="/tmp"))
    try:
        yield {2: Training(folder, "two", TORCHRUN, SCRIPT).finish()[1],
               1: Training(folder, "one", [sys.executable], SCRIPT).finish()[1]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_under_everstep_run_async_saves_go_on_from_memory(work: Path, undisturbed: dict[int, str]) -> None:  # noqa: F811
    run = Training(work, "e", everstep_run(work, "s"), SCRIPT, "async_save")
    run.kill_a_worker()
    assert run.finish() == ["memory", undisturbed[2]]
    went_on(run, "memory", KILLED_AT - 5)  # the newest may still be on its way
    assert not (work / "e.files").exists(), "files are for when there is no agent"


def test_under_everstep_run_it_goes_on_from_memory_and_its_files_load_anywhere(work: Path,  # noqa: F811
                                                                               undisturbed: dict[int, str]) -> None:
    """Two ranks' files, written by agents: into one process by StorageReader, and exported, by dcp.load alone."""
    run = Training(work, "e", everstep_run(work, "s", "--name", "shards", "--ckpt-dir", work / "ckpt"), SCRIPT)
    run.kill_a_worker()
    assert run.finish() == ["memory", undisturbed[2]]
    went_on(run, "memory")
    newest = max((work / "ckpt").glob("step-*/manifest.json")).parent
    assert newest.name.startswith("step-000000000060.")
    exported = subprocess.run([PROGRAMS / "everstep", "ckpt", "export", work / "ckpt", work / "stock", "--format", "dcp",
                               "--python", PYTHON], env=clean_environment(), capture_output=True, text=True)
    assert exported.returncode == 0, exported.stdout + exported.stderr
    load = f"""
import hashlib, sys, warnings, torch, torch.distributed.checkpoint as dcp
warnings.simplefilter("ignore")
from torch import nn
model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 61), nn.GELU(), nn.Linear(61, 64)) for _ in range(3)])
state = {{"model": model.state_dict(), "next": 0, "seen": torch.zeros(())}}
if sys.argv[1] == "stock":
    dcp.load(state, checkpoint_id={str(work / "stock")!r})
    assert not any(name.startswith("everstep") for name in sys.modules)
else:
    from everstep.dcp import StorageReader
    dcp.load(state, storage_reader=StorageReader({str(work / "ckpt")!r}))
assert state["next"] == 60 and state["seen"].item() == 60
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""
    for how in ("stock", "everstep"):
        loaded = subprocess.run([PYTHON, "-c", load, how], env=clean_environment(), capture_output=True, text=True)
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.strip() == undisturbed[2], how


def test_under_torchrun_it_goes_on_from_files(work: Path, undisturbed: dict[int, str]) -> None:  # noqa: F811
    """Started anew by hand: workers that torchrun restarts often dial those of the attempt before, again and again."""
    first = Training(work, "t", TORCHRUN, SCRIPT)
    first.kill_a_worker()
    first.process.wait(60)
    second = Training(work, "t", TORCHRUN, SCRIPT)
    assert second.finish() == ["files", undisturbed[2]]
    went_on(second, "files")


def test_alone_it_goes_on_from_files(work: Path, undisturbed: dict[int, str]) -> None:  # noqa: F811
    first = Training(work, "a", [sys.executable], SCRIPT)
    first.kill_a_worker()
    first.process.wait(30)
    second = Training(work, "a", [sys.executable], SCRIPT)
    assert second.finish() == ["files", undisturbed[1]]
    went_on(second, "files")
