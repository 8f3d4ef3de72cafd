"""FSDP2: fully_shard over a CPU device mesh; state through torch.distributed.checkpoint every few steps."""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = 40


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)])
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first, folder = 0, Path(os.environ["OUT_DIR"])
    latest = folder / "latest"
    if latest.exists():
        first = int(latest.read_text())
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / f"step{first}")
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    with open(os.environ["PROGRESS"], "a", buffering=1) as progress:
        for step in range(first, STEPS):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step * 8 + rank))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 10 == 0:
                model_state, optimizer_state = get_state_dict(model, optimizer)
                dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / f"step{step + 1}")
                if rank == 0:
                    (folder / "latest.tmp").write_text(str(step + 1))
                    (folder / "latest.tmp").replace(latest)
            progress.write(f"{step + 1} {rank} {os.getpid()}\n")
            time.sleep(0.04)
    print(f"rank {rank} finished {STEPS} steps", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
