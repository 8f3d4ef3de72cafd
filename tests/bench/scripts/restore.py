"""What tests/bench/restore.py launches: one rank whose state its node's memory holds.

Generation 1 captures and kills itself; each later one looks at the state where it lies (view), restores it, writes
how long both took in memcpys of the same bytes, captures anew and kills itself; generation $RESTORE_RUNS + 1 ends.
"""

from __future__ import annotations

import os
import signal
import time

import everstep
import torch
from measure import Copier, tell
from torch import nn

TENSORS = 64
BYTES, RUNS, GENERATION = (int(os.environ[name]) for name in ("RESTORE_BYTES", "RESTORE_RUNS", "EVERSTEP_GENERATION"))


def main() -> None:
    torch.set_num_threads(1)
    model = nn.ParameterList([torch.rand(BYTES // TENSORS // 4) for _ in range(TENSORS)])
    copy = Copier(BYTES)
    ck = everstep.Checkpointer({"model": model}, commit_wait=60.0)
    if GENERATION > 1:
        for metric in ("viewed", "restored"):
            before = copy.median()
            began = time.perf_counter()
            found = ck.view() if metric == "viewed" else ck.restore()
            took = time.perf_counter() - began
            assert found, "nothing to restore"
            once = (before + copy.median()) / 2
            tell(metric=metric, value=took / once, seconds=took, memcpy=once)
            del found
    else:
        assert ck.restore() == 0
    if GENERATION > RUNS:
        ck.close()
        return
    step = GENERATION * 10
    assert ck.step(step)
    deadline = time.monotonic() + 60
    while ck.stats().committed_step < step:
        assert time.monotonic() < deadline, f"step {step} was not committed within 60 s: {ck.stats()}"
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


main()
