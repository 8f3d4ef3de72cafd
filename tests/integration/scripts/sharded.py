"""A job whose ranks each hold a state of their own, for drills: it makes steps only as far as it is told.

$HOLD names a JSON file: {"step": N, "generation": G}. Steps up to N are made; five more by generations later than G
alone, so that a step is made after a fault and none before it. Each rank writes $LEDGER/GENERATION-RANK.json: the
step it goes on with, how many steps its state says were made, and how many of its values are not what those make.
SHARES=1: all hold the same state, and capture it once together.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import everstep
import torch
import torch.distributed as dist
from torch import nn

VALUES = 2 << 20


class State(nn.Module):
    def __init__(self, begin: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((VALUES,), begin), requires_grad=False)
        self.register_buffer("made", torch.zeros(1, dtype=torch.int64))


def main() -> None:
    dist.init_process_group("gloo")
    rank, generation = dist.get_rank(), int(os.environ["EVERSTEP_GENERATION"])
    shares = os.environ.get("SHARES") == "1"
    begin = 0.0 if shares else float(rank)
    state = State(begin)
    checkpoint = everstep.Checkpointer({"state": state}, replicated="shares" if shares else False, rng=False, commit_wait=30.0)
    step = checkpoint.restore()
    wrong = int((state.values != begin + int(state.made)).sum())
    told = {"step": step, "made": int(state.made), "wrong": wrong}
    path = Path(os.environ["LEDGER"]) / f"{generation}-{rank}.json"
    path.with_suffix(".new").write_text(json.dumps(told))
    path.with_suffix(".new").rename(path)
    while True:
        hold = json.loads(Path(os.environ["HOLD"]).read_text())
        may = torch.tensor(int(step <= hold["step"] + (5 if generation > hold["generation"] else 0)))
        dist.broadcast(may, 0)
        if not may.item():
            time.sleep(0.02)
            continue
        state.values += 1
        state.made += 1
        checkpoint.step(step)
        step += 1


if __name__ == "__main__":
    main()
