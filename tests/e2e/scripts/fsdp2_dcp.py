"""fully_shard over a CPU mesh, state by stock dcp.save and dcp.load; Everstep's reader and writer are all that is ours.

Arguments: a folder, and how to save: save (the default) or async_save.
"""

import hashlib
import os
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from everstep.dcp import StorageReader, StorageWriter
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = 60


def main() -> None:
    folder, how = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "save"
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 61), nn.GELU(), nn.Linear(61, 64)) for _ in range(3)])
    for block in model:
        fully_shard(block, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first, where = 0, "nothing"
    reader, writer = StorageReader(folder), StorageWriter()
    found = reader.newest()
    if found is not None:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "next": 0, "seen": torch.zeros(())}
        dcp.load(state, storage_reader=reader)
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
        first, where = state["next"], found.where
        assert found.step == first and state["seen"].item() == first
    os.write(1, f"from {first} {where}\n".encode())
    saving, apart = None, dist.new_group(backend="gloo")  # its thread must not talk among training's collectives
    for step in range(first, STEPS):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step * 8 + rank))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 5 == 0:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            state = {"model": model_state, "optimizer": optimizer_state, "next": step + 1, "seen": torch.tensor(step + 1.0)}
            if saving is not None:
                saving.result()
            if how == "save":
                dcp.save(state, checkpoint_id=f"{folder}/step-{step + 1}", storage_writer=writer)
            else:
                saving = dcp.async_save(state, checkpoint_id=f"{folder}/step-{step + 1}", storage_writer=writer, process_group=apart)
        os.write(1, f"step {step} {os.getpid()}\n".encode())  # a line of its own, whatever the other ranks write
        time.sleep(0.02)
    if saving is not None:
        saving.result()
    whole = [p.full_tensor().detach().numpy().tobytes() for p in model.parameters()]
    os.write(1, f"end {where} {hashlib.sha256(b''.join(whole)).hexdigest()}\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
