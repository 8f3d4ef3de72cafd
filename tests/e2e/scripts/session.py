"""DDP or FSDP2 (KIND) inside everstep.Session, in float64: $LINES/PID.jsonl has a line for each start and step.

Trains until $LINES/end is there, or STEPS steps. The loss is that of the whole batch.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

LINES, STEPS, BATCH = Path(os.environ["LINES"]), int(os.environ.get("STEPS", "100000")), 22
torch.manual_seed(7)
X, Y = torch.randn(400, 24, dtype=torch.float64), torch.randn(400, 2, dtype=torch.float64)


def train(session: everstep.Session) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(24, 37), nn.GELU(), nn.Linear(37, 2)).double()
    if os.environ["KIND"] == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (session.world_size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = session.restore({"model": model, "optimizer": optimizer})
    about = {"generation": session.generation, "world": session.world_size, "rank": session.rank,
             "resumed": session.resumed}
    end = torch.zeros(1)
    with (LINES / f"{os.getpid()}.jsonl").open("a", buffering=1) as lines:
        lines.write(json.dumps(about | {"at": time.time()}) + "\n")
        for step in range(first, STEPS):
            part = session.share(step, samples=len(X), batch=BATCH, seed=3)
            loss = (model(X[part.indices]) - Y[part.indices]).square().mean() * part.weight
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach() / session.world_size
            dist.all_reduce(total)
            lines.write(json.dumps(about | {"step": step, "loss": total.item(), "at": time.time()}) + "\n")
            session.step(step)
            end[0] = float((LINES / "end").exists()) if session.rank == 0 else 0.0
            dist.broadcast(end, 0)
            if end.item():
                break
            time.sleep(0.02)


if __name__ == "__main__":
    everstep.Session(train).run()
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then
