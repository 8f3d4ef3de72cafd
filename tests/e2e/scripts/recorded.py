"""`@record` around main: rank 1 raises in the first FAILS generations, then all is well."""

import os
import time

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    with open(os.environ["PROGRESS"], "a", buffering=1) as progress:
        for step in range(20):
            dist.all_reduce(torch.ones(8))
            progress.write(f"{step + 1} {rank} {os.getpid()}\n")
            time.sleep(0.03)
            if step == 5 and rank == 1 and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) < int(os.environ.get("FAILS", "0")):
                raise RuntimeError("boom on rank 1")
    print(f"rank {rank} finished", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
