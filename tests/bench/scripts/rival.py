"""What tests/bench/rivals.py launches for every system: a rank with 64 float32 tensors, saved and restored.

The first start saves and tells what that cost, then dies as $RIVAL_END says ("kill": SIGKILL, "fail": exit code 1); the
launcher starts it again (or is started again), and it restores, checks every bit and tells what that cost. All through
scripts/systems, so that one script measures every system. $RIVAL_SYSTEM which, $RIVAL_BYTES of a rank's state, $RIVAL_SAVES
how many of each kind of save, $RIVAL_FOLDER on tmpfs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path

import systems
import torch
import torch.distributed as dist
from measure import Copier, footprint, tell

TENSORS = 64
NAME, END, FOLDER = os.environ["RIVAL_SYSTEM"], os.environ["RIVAL_END"], Path(os.environ["RIVAL_FOLDER"])
BYTES, SAVES, RANK = (int(os.environ[name]) for name in ("RIVAL_BYTES", "RIVAL_SAVES", "RANK"))
MARK = FOLDER / f"saved-{RANK}"  # there: the first start has saved


def fill(tensors: list[torch.Tensor], step: int) -> None:
    for index, tensor in enumerate(tensors):
        tensor.fill_(systems.value(RANK, step, index))


def right(tensors: list[torch.Tensor], step: int) -> bool:
    return all(bool((t == systems.value(RANK, step, i)).all()) for i, t in enumerate(tensors))


def compute(seconds: float, a: torch.Tensor) -> None:
    """A forward and backward that keep one core busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)


def save(system: systems.System, tensors: list[torch.Tensor], copy: Copier) -> None:
    small = torch.rand(256, 256)
    fill(tensors, 0)
    for step in range(1, 2 * SAVES + 2):
        fill(tensors, step)
        # One kind shows what training waits for, with a computation beside the save; the other when it is complete.
        blocking = step == 1 or step % 2 == 0
        dist.barrier()
        before = copy()
        began = time.perf_counter()
        system.save(step)
        took = time.perf_counter() - began
        if blocking:
            compute(4 * before, small)
            again = time.perf_counter()
            system.settle()
            took += time.perf_counter() - again
        system.finish(step)
        if not blocking:
            took = time.perf_counter() - began
        dist.barrier()
        if RANK == 0:
            once = (before + copy()) / 2
            metric = "first" if step == 1 else "blocked" if blocking else "complete"
            tell(metric=metric, value=took / once, seconds=took)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tensors = [torch.full((BYTES // TENSORS // 4,), -1.0) for _ in range(TENSORS)]
    copy = Copier(BYTES)
    store, node = FOLDER / "store", FOLDER / f"node{RANK}"
    store.mkdir(exist_ok=True)
    node.mkdir(exist_ok=True)
    dist.barrier()
    before, open_before = footprint(os.environ["BENCH_RUN"], FOLDER), len(os.listdir("/proc/self/fd"))
    dist.barrier()
    system = systems.make(NAME, tensors, store, node)
    dist.barrier()
    if not MARK.exists():
        if system.restore() is not None:
            raise RuntimeError("a fresh start restored something")
        if RANK == 0:
            tell(config=system.config, place=system.place)
        save(system, tensors, copy)
        dist.barrier()
        if RANK == 0:
            size = BYTES * dist.get_world_size()
            tell(metric="memory", value=(footprint(os.environ["BENCH_RUN"], FOLDER) - before) / size)
            tell(metric="descriptors", value=len(os.listdir("/proc/self/fd")) - open_before)
        MARK.touch()
        dist.barrier()
        sys.stdout.flush()
        if END == "kill" and RANK == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if END == "kill":
            time.sleep(600)  # the launcher ends it
        sys.exit(1)
    dist.barrier()
    unit = copy.median()
    began = time.perf_counter()
    step = system.restore()
    took = time.perf_counter() - began
    if RANK == 0:
        if step is None:
            tell(metric="restored", value=None, error="nothing to restore was left")
        elif not right(tensors, step):
            tell(metric="restored", value=None, error=f"step {step} came back with wrong bits")
        else:
            tell(metric="restored", value=took / ((unit + copy.median()) / 2), seconds=took, step=step)
    dist.barrier()
    system.close()
    dist.barrier()


if __name__ == "__main__":  # a system's own processes may import this file anew
    try:
        main()
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc(), rank=RANK)
        raise
