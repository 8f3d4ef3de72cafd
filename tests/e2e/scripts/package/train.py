"""A module: relative imports, __spec__, and sys.argv as `python -m` gives them."""

import os
import sys
import time

import torch
import torch.distributed as dist

from .helper import GREETING


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with open(os.environ["PROGRESS"], "a", buffering=1) as progress:
        for step in range(40):
            dist.all_reduce(torch.ones(8))
            progress.write(f"{step + 1} {rank} {os.getpid()}\n")
            time.sleep(0.04)
    print(f"rank {rank} finished {GREETING} as {__spec__.name} with {sys.argv[1:]}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
