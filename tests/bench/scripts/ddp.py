"""A stock DDP script that knows torchrun only: 0.5 M parameters, steps of about 50 ms.

Writes one JSON line per mark to $MARKS/RANK-PID.jsonl: start (first line of the script), imports, group, step.
"""

import json
import os
import time

began = time.time()

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

imported = time.time()


def born() -> float:
    """This process's start, from the kernel (10 ms resolution)."""
    ticks = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19])
    boot = time.time() - float(open("/proc/uptime").read().split()[0])
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    rank = int(os.environ["RANK"])
    with open(f"{os.environ['MARKS']}/{rank}-{os.getpid()}.jsonl", "w", buffering=1) as marks:
        def mark(name: str, at: float, **more: object) -> None:
            marks.write(json.dumps({"mark": name, "at": at, "rank": rank, "pid": os.getpid(), **more}) + "\n")

        mark("born", born())
        mark("start", began)
        mark("imports", imported)
        dist.init_process_group("gloo")
        mark("group", time.time(), world=dist.get_world_size())
        torch.manual_seed(0)
        model = DDP(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for step in range(int(os.environ.get("STEPS", "1000000"))):
            until = time.time() + 0.05
            model(torch.randn(16, 512)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            mark("step", time.time(), step=step)
            time.sleep(max(0.0, until - time.time()))


if __name__ == "__main__":
    main()
