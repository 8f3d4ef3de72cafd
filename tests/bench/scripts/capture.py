"""What tests/bench/capture.py launches: rank 0 holds the state and measures, rank 1 is its peer's trainer, or holds the
same state and captures the other half of it (shares), or three others hold as much each (alone, copies3, parity).

Generation 1 captures, writes its figures and kills itself; generation 2 restores from the node's memory and
writes how long that took. Every figure is a multiple of one warm memcpy of the same bytes in the same process,
measured around it. One JSON line per figure goes to $BENCH_OUT.
"""

from __future__ import annotations

import os
import signal
import statistics
import time

import everstep
import torch
import torch.distributed as dist
from measure import Copier, tell
from torch import nn

TENSORS = 64
RANK, GENERATION = int(os.environ["RANK"]), int(os.environ["EVERSTEP_GENERATION"])
BYTES, MODE, STEPS = int(os.environ["CAPTURE_BYTES"]), os.environ["CAPTURE_MODE"], int(os.environ["CAPTURE_STEPS"])


def until_committed(ck: everstep.Checkpointer, step: int) -> None:
    deadline = time.monotonic() + 120
    while ck.stats().committed_step < step:
        if time.monotonic() > deadline:
            raise SystemExit(f"error: step {step} was not committed within 120 s: {ck.stats()}")
        time.sleep(0.0002)


def train(model: nn.ParameterList) -> None:
    """Every byte changes, as in a step: chunks that did not are compared and copied at the peer, not sent."""
    with torch.no_grad():
        for p in model:
            p.mul_(1.001)


def compute(seconds: float, a: torch.Tensor) -> None:
    """A forward and backward that keep one core busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    shares = MODE == "shares"
    each = MODE in ("alone", "copies3", "parity")  # every rank has a state of its own
    size = BYTES if RANK == 0 or shares or each else 4096
    model = nn.ParameterList([torch.rand(size // TENSORS // 4) for _ in range(TENSORS)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    copy = Copier(size)
    ck = everstep.Checkpointer({"model": model, "optimizer": optimizer}, replicated="shares" if shares else False, commit_wait=60.0,
                               mode="blocking" if shares or each else MODE)
    dist.barrier()
    began = time.perf_counter()
    start = ck.restore()
    took = time.perf_counter() - began
    if start > 0:
        if RANK == 0:
            tell(metric="restored", value=took / copy.median())
        dist.barrier()
        ck.close()
        return
    time.sleep(max(1.0, BYTES / 2**30 * 3))  # what a script does before its first step: data, compilation
    small = torch.rand(256, 256)
    for p in model.parameters():
        p.grad = torch.zeros(1).expand_as(p)
    for step in range(STEPS):
        train(model)
        dist.barrier()
        before = copy()
        waited = ck.stats().waited_seconds
        began = time.perf_counter()
        assert ck.step(step)
        blocked = time.perf_counter() - began
        if MODE == "overlapped":
            compute(4 * before, small)
            began = time.perf_counter()
            optimizer.step()  # waits for what is not yet copied, then does its own work
            second = time.perf_counter()
            optimizer.step()
            blocked += max(0.0, second - began - (time.perf_counter() - second))
        blocked -= ck.stats().waited_seconds - waited
        began_commit = time.perf_counter()
        until_committed(ck, step)
        replicated = time.perf_counter() - began_commit + blocked
        if RANK == 0:
            once = (before + copy()) / 2
            first = "first" if step == 0 else "steady"
            tell(metric="blocked", when=first, value=blocked / once, memcpy=once)
            if MODE != "overlapped":
                tell(metric="replicated", when=first, value=replicated / once)
        dist.barrier()
    if MODE == "overlapped":
        # Without a computation to hide behind, before steps have told how fast it may go: when is it on the peer?
        for step in range(STEPS, STEPS + 3):
            train(model)
            dist.barrier()
            before = copy()
            began = time.perf_counter()
            assert ck.step(step)
            until_committed(ck, step)
            replicated = time.perf_counter() - began
            if RANK == 0:
                tell(metric="replicated", when="steady", value=replicated / ((before + copy()) / 2))
            dist.barrier()
        # A fixed piece of work, by turns with and without a capture beside it.
        began = time.perf_counter()
        for _ in range(200):
            torch.mm(small, small)
        work = max(1, int(20 * copy() / ((time.perf_counter() - began) / 200)))
        times: dict[bool, list[float]] = {False: [], True: []}
        for step in range(STEPS + 3, STEPS + 13):
            began = time.perf_counter()
            if step % 2:
                ck.step(step)
            for _ in range(work):
                torch.mm(small, small)
            optimizer.step()
            times[step % 2 == 1].append(time.perf_counter() - began)
            if step % 2:
                dist.barrier()
                until_committed(ck, step)
        if RANK == 0:
            tell(metric="step_time", when="steady", value=statistics.median(times[True]) / statistics.median(times[False]))
    if RANK == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)  # the generation ends with rank 0


main()
