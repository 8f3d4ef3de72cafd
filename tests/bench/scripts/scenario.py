"""What tests/bench/scenarios.py launches: two ranks that save some steps, meet what $RIVAL_PLAN says, and restore.

The first start writes $RIVAL_FOLDER/began and saves $RIVAL_SAVES steps, each complete before the next. Then, by plan:
  steps    saves beside a fixed piece of work, and tells what that costs; ends in order
  clean    ends in order
  midsave  rank 0 is killed by SIGKILL $RIVAL_KILL of a save's time after the next one began
  node     waits to be killed with its node;  flip  the same, after one bit of a stored copy was flipped
  shrink   the same; what comes back is one rank fewer
Every later start restores and tells the step and whether every bit is right.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
import traceback
from pathlib import Path

import systems
import torch
import torch.distributed as dist
from measure import Copier, footprint, tell

TENSORS = 64
NAME, PLAN, FOLDER = os.environ["RIVAL_SYSTEM"], os.environ["RIVAL_PLAN"], Path(os.environ["RIVAL_FOLDER"])
BYTES, SAVES, RANK, WORLD = (int(os.environ[name]) for name in ("RIVAL_BYTES", "RIVAL_SAVES", "RANK", "WORLD_SIZE"))
BEGAN = FOLDER / "began"
AGAIN = BEGAN.exists()  # nobody makes it before all ranks have come this far
OWNER = 0 if "RIVAL_REPLICATED" in os.environ else RANK  # whose values this rank's tensors hold


def fill(tensors: list[torch.Tensor], step: int) -> None:
    for index, tensor in enumerate(tensors):
        tensor.fill_(systems.value(OWNER, step, index))


def right(tensors: list[torch.Tensor], step: int) -> bool:
    return all(bool((t == systems.value(OWNER, step, i)).all()) for i, t in enumerate(tensors))


def save(system: systems.System, tensors: list[torch.Tensor], step: int) -> float:
    """A complete save; its seconds."""
    fill(tensors, step)
    dist.barrier()
    began = time.perf_counter()
    system.save(step)
    system.settle()
    system.finish(step)
    return time.perf_counter() - began


def wait_to_be_killed() -> None:
    (FOLDER / f"ready-{RANK}").write_text(f"{os.getpid()} {os.environ.get('EVERSTEP_KEEPER', '')}")
    time.sleep(600)


def steps(system: systems.System, tensors: list[torch.Tensor], before: int, files: int) -> None:
    """Scenarios 1, 2, 3 and 9: pairs of steps of the same work, one with a save beside it."""
    copy, small = Copier(BYTES), torch.rand(256, 256)
    size = BYTES * WORLD
    began = time.perf_counter()
    for _ in range(100):
        torch.mm(small, small)
    work = max(1, int(20 * copy.median() / ((time.perf_counter() - began) / 100)))
    times: dict[bool, list[float]] = {False: [], True: []}
    for step in range(SAVES + 1, SAVES + 2 * int(os.environ["RIVAL_STEPS"]) + 1):
        saving = step % 2 == 1
        fill(tensors, step)
        dist.barrier()
        once = copy()
        began = time.perf_counter()
        if saving:
            system.save(step)
        blocked = time.perf_counter() - began
        for _ in range(work):
            torch.mm(small, small)
        again = time.perf_counter()
        if saving:
            system.settle()
        blocked += time.perf_counter() - again
        times[saving].append(time.perf_counter() - began)
        if not saving:
            continue
        system.finish(step)
        lag = time.perf_counter() - began - times[True][-1]
        if RANK == 0:
            tell(metric="blocked", value=blocked / once)
            tell(metric="lag", value=lag + blocked, seconds=lag + blocked)
    if RANK == 0:
        tell(metric="inflation", value=statistics.median(times[True]) / statistics.median(times[False]))
        tell(metric="memory", value=(footprint(os.environ["BENCH_RUN"], FOLDER) - before) / size - 2 * BYTES / size)
        tell(metric="descriptors", value=len(os.listdir("/proc/self/fd")) - files)


def first(system: systems.System, tensors: list[torch.Tensor], before: int, files: int) -> None:
    took = [save(system, tensors, step) for step in range(1, SAVES + 1)]
    if RANK == 0:
        tell(metric="first", value=took[0])
    dist.barrier()
    if PLAN in ("node", "flip", "shrink"):
        if PLAN == "flip" and system.holder == RANK:
            tell(damaged=system.damage(SAVES))
        dist.barrier()
        wait_to_be_killed()
    if PLAN == "midsave":
        after = float(os.environ["RIVAL_KILL"]) * statistics.median(took[1:])
        killer = subprocess.Popen(["/bin/sh", "-c", f"read go; sleep {after:.4f}; kill -9 {os.getpid()}"], stdin=subprocess.PIPE)
        fill(tensors, SAVES + 1)
        dist.barrier()
        if RANK == 0:
            assert killer.stdin
            killer.stdin.write(b"go\n")
            killer.stdin.flush()
        system.save(SAVES + 1)
        system.settle()
        system.finish(SAVES + 1)
        time.sleep(600)
    if PLAN == "steps":
        steps(system, tensors, before, files)
    dist.barrier()
    system.close()
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tensors = [torch.full((BYTES // TENSORS // 4,), -1.0) for _ in range(TENSORS)]
    store, node = FOLDER / "store", FOLDER / f"node{RANK}"
    store.mkdir(exist_ok=True)
    node.mkdir(exist_ok=True)
    dist.barrier()
    BEGAN.touch()
    before, files = (footprint(os.environ["BENCH_RUN"], FOLDER) if RANK == 0 and PLAN == "steps" else 0), len(os.listdir("/proc/self/fd"))
    dist.barrier()
    system = systems.make(NAME, tensors, store, node)
    dist.barrier()
    if not AGAIN:
        if system.restore() is not None:
            raise RuntimeError("a fresh start restored something")
        if RANK == 0:
            tell(config=system.config)
        first(system, tensors, before, files)
        return
    began = time.perf_counter()
    step = system.restore()
    tell(restored=step, rank=RANK, world=WORLD, right=step is not None and right(tensors, step), seconds=time.perf_counter() - began)
    dist.barrier()
    system.close()


if __name__ == "__main__":  # a system's own processes may import this file anew
    try:
        main()
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}", trace=traceback.format_exc(), rank=RANK, again=AGAIN)
        raise
