"""Trains a small model with dropout and Adam for $STEPS steps; appends `step rank loss` (hex) to $PROGRESS.

$PACE: seconds a step takes at least. The state is the ranks' own (no DDP), so each rank's file matters.
"""

import os
import time

import everstep
import torch
import torch.distributed as dist


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    history: dict[str, object] = {"seen": 0, "names": ("a", 1.5), "tied": model[0].weight}
    ck = everstep.Checkpointer({"model": model, "optimizer": optimizer, "history": history}, replicated=False)
    start = ck.restore()
    with open(os.environ["PROGRESS"], "a", buffering=1) as out:
        for step in range(start, int(os.environ["STEPS"])):
            loss = model(torch.randn(32, 16)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history["seen"] = step
            ck.step(step)
            out.write(f"{step} {rank} {loss.item().hex()}\n")
            dist.barrier()
            time.sleep(float(os.environ.get("PACE", "0")))
    ck.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
