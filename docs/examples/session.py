"""kill -9 any of my ranks: the others go on in the same process. everstep run --standalone --nproc-per-node 3 session.py"""
import os
import time

import everstep
import torch

torch.manual_seed(0)
DATA, TRUTH, STEPS, BATCH = torch.randn(1000, 16), torch.randn(16, 1), int(os.environ.get("STEPS", "200")), 48


@everstep.resilient
def train(session: everstep.Session) -> None:
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(session.restore({"model": model, "optimizer": optimizer}), STEPS):
        part = session.share(step, samples=len(DATA), batch=BATCH)
        loss = (model(DATA[part.indices]) - DATA[part.indices] @ TRUTH).square().mean() * part.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        session.step(step)
        print("step", step, "rank", session.rank, "of", session.world_size, "pid", os.getpid(), flush=True)
        time.sleep(0.02)
    print("end", sum(p.sum().item() for p in model.parameters()), flush=True)


train()
