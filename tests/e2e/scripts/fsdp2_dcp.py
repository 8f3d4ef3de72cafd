"""fully_shard over a CPU mesh, state by stock dcp.save and dcp.load; Everstep's reader and writer are all that is ours.

Arguments: a folder, and how to save: save (the default) or async_save. With $TOLD it trains until $TOLD.end is there, and
rank 0 writes to $TOLD from where it went on, and what it saved, each with a digest of the whole state.
"""

import hashlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from everstep.dcp import StorageReader, StorageWriter
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = 60
TOLD = os.environ.get("TOLD")


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Of parameters and moments, each put together whole. A collective call."""
    tensors = list(model.parameters())
    tensors += [v for p in model.parameters() for _, v in sorted(optimizer.state.get(p, {}).items())]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in whole)).hexdigest()


def tell(*words: object) -> None:
    """To $TOLD, by rank 0: what, the world, and the words."""
    if dist.get_rank() == 0 and TOLD:
        with open(TOLD, "a") as out:
            out.write(" ".join(map(str, [words[0], dist.get_world_size(), *words[1:]])) + "\n")


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else "ckpt"
    how = sys.argv[2] if len(sys.argv) > 2 else "save"
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
    if TOLD:
        tell("from", first, where, digest(model, optimizer))
    saving, apart = None, dist.new_group(backend="gloo")  # its thread must not talk among training's collectives
    end = torch.zeros(1)
    for step in range(first, 1_000_000 if TOLD else STEPS):
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
            if TOLD:
                tell("saved", step + 1, digest(model, optimizer))
                end[0] = Path(f"{TOLD}.end").exists()
                dist.broadcast(end, 0)
                if end.item():
                    break
        os.write(1, f"step {step} {os.getpid()}\n".encode())  # a line of its own, whatever the other ranks write
        time.sleep(0.02)
    if saving is not None:
        saving.result()
    whole = [p.full_tensor().detach().numpy().tobytes() for p in model.parameters()]
    os.write(1, f"end {where} {hashlib.sha256(b''.join(whole)).hexdigest()}\n".encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
