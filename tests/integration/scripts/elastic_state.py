"""FSDP2 or DDP with AdamW at any number of ranks; sizes that no number of ranks divides, one shard empty.

KIND fsdp2 | ddp: under a Checkpointer it goes on from memory; dcp: FSDP2 likewise, by dcp.save and dcp.load through
everstep.dcp. With FROM=STEP each goes on from a stock DCP folder of that step. shares | whole: a wider model under DDP
with buffers of each rank's own, captured in shares or whole, and no DCP folder. auto | apart: one wide enough that
replicated="auto" divides it; apart: each rank's first weight is its own.
Rank 0 writes a line a step: generation, world, step, loss and a digest of the whole state, both to the last bit.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import everstep
import everstep.dcp
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

OUT = Path(os.environ["OUT_DIR"])
BATCH = 12  # samples a step, whatever the world
KIND = os.environ["KIND"]
AUTO = KIND in ("auto", "apart")
WIDE = AUTO or KIND in ("shares", "whole")


def build() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    width = 40_009 if AUTO else 1031 if WIDE else 37
    model: Any = nn.Sequential(nn.Linear(24, width), nn.BatchNorm1d(width) if WIDE else nn.GELU(), nn.Linear(width, 10),
                               nn.GELU(), nn.Linear(10, 2))
    if KIND in ("fsdp2", "dcp"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        # Buckets that stay as they are from the first step on: what restarted adds in the order of what did not.
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=WIDE)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def digest(model: Any, optimizer: torch.optim.Optimizer) -> str:
    """Of parameters, buffers and moments, each put together whole. A collective call."""
    found = hashlib.sha256()
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for p in model.parameters() for _, v in sorted(optimizer.state.get(p, {}).items())]
    for tensor in tensors:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found.update(whole.detach().numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generation = int(os.environ.get("EVERSTEP_GENERATION", "0"))
    (OUT / f"pid-{rank}").write_text(str(os.getpid()))
    model, optimizer = build()
    checkpoint, writer = None, None
    if "FROM" in os.environ:
        before = int(os.environ["FROM"])
        kept, moments = get_state_dict(model, optimizer)
        dcp.load({"model": kept, "optimizer": moments}, checkpoint_id=OUT / "dcp" / f"step{before}")
        set_state_dict(model, optimizer, model_state_dict=kept, optim_state_dict=moments)
        first = before + 1
    elif KIND == "dcp":
        writer, reader = everstep.dcp.StorageWriter(), everstep.dcp.StorageReader()
        found, first = reader.newest(), 0
        if found is not None:
            assert found.where == "memory"
            kept, moments = get_state_dict(model, optimizer)
            dcp.load({"model": kept, "optimizer": moments}, storage_reader=reader)
            set_state_dict(model, optimizer, model_state_dict=kept, optim_state_dict=moments)
            first = found.step + 1
    else:
        checkpoint = everstep.Checkpointer({"model": model, "optimizer": optimizer},
                                           replicated="shares" if KIND == "shares" else "auto" if AUTO else None)
        first = checkpoint.restore()
        assert checkpoint.tier == "memory"
    if KIND == "apart" and first == 0:
        model.module[0].weight.data[0, 0] += rank
    lines = open(OUT / os.environ["LINES"], "a", buffering=1)  # noqa: SIM115
    start = digest(model, optimizer)
    if rank == 0:
        lines.write(f"start {generation} {world} {first - 1} {start}\n")
    end = torch.zeros(1)
    for step in range(first, int(os.environ["STEPS"])):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(BATCH, 24, generator=generator), torch.randn(BATCH, 2, generator=generator)
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        loss = (model(x[mine]) - y[mine]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        dist.all_reduce(loss)
        state = digest(model, optimizer)
        if rank == 0:  # before the capture: what is restored was told
            lines.write(f"step {generation} {world} {step} {loss.item().hex()} {state}\n")
        if checkpoint is not None or writer is not None:
            if not WIDE:
                kept, moments = get_state_dict(model, optimizer)
                dcp.save({"model": kept, "optimizer": moments}, checkpoint_id=OUT / "dcp" / f"step{step}")
            if checkpoint is not None:
                checkpoint.step(step)
            else:
                dcp.save({"model": kept, "optimizer": moments}, checkpoint_id=f"step-{step}", storage_writer=writer)
            time.sleep(0.02)
        if rank == 0:
            end[0] = (OUT / "end").exists()
        dist.broadcast(end, 0)
        if end.item():
            break
    if checkpoint is not None:
        (OUT / f"bytes-{KIND}-{rank}").write_text(str(checkpoint.stats().bytes))
        checkpoint.close()
    dist.destroy_process_group()
    lines.close()
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then


if __name__ == "__main__":
    main()
