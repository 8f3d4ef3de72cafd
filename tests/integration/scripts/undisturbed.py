"""What ledger.py's weights are after each step when nobody disturbs it, computed in one process without checkpoints.

    undisturbed.py WORLD STEPS        writes a line "STEP CRC" for each step; STATE_MIB, GROW_FILE and SHARDED as in ledger.py

Every rank's gradients are computed here one after the other and summed as data-parallel training does it: each divided by
the world size first. Two such numbers have one sum, whoever adds them; more than two have an order, so WORLD is at most 2 (with SHARDED any).
"""

from __future__ import annotations

import os
import sys

import torch
from ledger import Ballast, Growing, weights_crc
from torch import nn


def main() -> None:
    world, steps = int(sys.argv[1]), int(sys.argv[2])
    sharded = os.environ.get("SHARDED") == "1"  # the model is not in the CRC
    assert sharded or world <= 2, "the order of a longer sum is the backend's"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ballast = [Ballast(mib)] if (mib := int(os.environ.get("STATE_MIB", "0"))) else []
    growing = Growing(os.environ["GROW_FILE"]) if "GROW_FILE" in os.environ else None
    for step in range(steps):
        sums = None
        for rank in range(0 if sharded else world):
            batch = torch.randn(8, 128, generator=torch.Generator().manual_seed(step * 64 + rank))
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            mine = [p.grad.div(world) for p in model.parameters()]
            sums = mine if sums is None else [a + b for a, b in zip(sums, mine)]
        for p, grad in zip(model.parameters(), sums or []):
            p.grad = grad
        optimizer.step()
        for b in ballast:
            b.values.add_(1)
        if growing:
            growing.step(step)
        print(step, weights_crc(*([] if sharded else [model]), *ballast))


if __name__ == "__main__":
    main()
