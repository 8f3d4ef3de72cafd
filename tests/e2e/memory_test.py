"""A worker that the kernel kills for memory: named so, restarted, and not charged to the script.

Needs a memory control group of one's own (root, and a hierarchy that lets one be made): skipped, with the reason, elsewhere.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import Run

LIMIT = 96 << 20
SCRIPT = """
import os, pathlib
first = pathlib.Path(os.environ["FIRST"])
if not first.exists():
    first.touch()
    pathlib.Path(os.environ["GROUP"], "cgroup.procs").write_text(str(os.getpid()))
    hoard = []
    while True:
        hoard.append(os.urandom(1 << 20))
print("went on")
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group in which nobody gets more than LIMIT."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    old = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    base = Path("/sys/fs/cgroup/memory" if old is not None else "/sys/fs/cgroup")
    mine = base / (old or "/").strip("/") / f"everstep-test-{os.getpid()}"
    try:
        mine.mkdir()
    except OSError as e:
        pytest.skip(f"no memory control group can be made here: {e}")
    try:
        try:
            (mine / ("memory.limit_in_bytes" if old is not None else "memory.max")).write_text(str(LIMIT))
        except OSError as e:
            pytest.skip(f"memory cannot be limited in {mine}: {e}")
        for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
            if (mine / swap).exists():
                (mine / swap).write_text(str(LIMIT) if "memsw" in swap else "0")
        yield mine
    finally:
        deadline = time.monotonic() + 10
        while mine.exists() and time.monotonic() < deadline:
            try:
                mine.rmdir()  # once its last process is gone
            except OSError:
                time.sleep(0.05)


def test_a_worker_that_the_kernel_killed_for_memory_is_named_and_restarted(group: Path) -> None:
    work = Path(tempfile.mkdtemp(prefix="esm-", dir="/tmp"))
    try:
        (work / "hoard.py").write_text(SCRIPT)
        run = Run(work, "--standalone", "--nproc-per-node", 1, "--no-preload", work / "hoard.py",
                  env={"FIRST": str(work / "first"), "GROUP": str(group)})
        assert run.wait(90) == 0, run.told()
        assert (work / "first").exists() and "went on" in run.stdout()
        assert "worker_out_of_memory" in run.stderr(), run.told()
        run.assert_nothing_left()
    finally:
        shutil.rmtree(work, ignore_errors=True)
