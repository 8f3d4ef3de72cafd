"""A data-parallel job that keeps a ledger: what the soak and the recovery tests train.

Every rank appends one JSON line a step to $LEDGER/RANK-PID.jsonl: step, generation, a CRC of its weights after
the step, the wall clock. The weights after step n are a function of n and the world size alone, so two entries of
one step with different CRCs mean that somebody went on from a wrong state.

STATE_MIB adds so many MiB to the state, which change in each step; CAPTURE_MODE is the Checkpointer's mode, REPLICATED its replicated. GROW_FILE names
a file of step numbers, a line each: after these steps the state is a MiB larger. They must be written down some steps ahead.
SHARDED=1 trains by FSDP2, so that another number of ranks restores by ranges; the CRC is then that of the whole MiBs of STATE_MIB,
a function of the step alone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
import zlib
from pathlib import Path

import everstep
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def weights_crc(*modules: nn.Module) -> int:
    crc = 0
    for value in (value for m in modules for value in m.state_dict().values()):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        crc = zlib.crc32(whole.detach().contiguous().numpy(), crc)
    return crc


class Ballast(nn.Module):
    """Parameters that no gradient moves."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.arange(mib << 18, dtype=torch.float32), requires_grad=False)


class Growing:
    """A state that gets larger: its size after a step is a function of the step, whatever it was restored from."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.values = torch.zeros(1)

    def step(self, step: int) -> None:
        more = sum(int(line) <= step for line in self.file.read_text().split()) if self.file.exists() else 0
        self.values = torch.full(((more << 18) + 1,), float(step))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.values = state["values"].clone()


def main() -> None:
    faulthandler.register(signal.SIGUSR1)  # the soak asks who hangs where it stands
    steps = int(os.environ.get("STEPS", "1000000"))
    stop_file = os.environ.get("STOP_FILE", "")
    pace = float(os.environ.get("STEP_SECONDS", "0.05"))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sharded = os.environ.get("SHARDED") == "1"
    net: nn.Module = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    ballast = [Ballast(mib)] if (mib := int(os.environ.get("STATE_MIB", "0"))) else []
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net, mesh=mesh)
        for b in ballast:
            b.values = nn.Parameter(distribute_tensor(b.values.detach(), mesh, [Shard(0)]), requires_grad=False)
    model = net if sharded else DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": net, "optimizer": optimizer}
    if ballast:
        state["ballast"] = ballast[0]
    growing = Growing(os.environ["GROW_FILE"]) if "GROW_FILE" in os.environ else None
    if growing:
        state["growing"] = growing
    checkpoint = everstep.Checkpointer(state, mode=os.environ.get("CAPTURE_MODE", "blocking"), replicated=os.environ.get("REPLICATED"))
    first = checkpoint.restore()
    with open(f"{os.environ['LEDGER']}/{rank}-{os.getpid()}.jsonl", "w", buffering=1) as ledger:
        for step in range(first, steps):
            until = time.time() + pace
            batch = torch.randn(8, 128, generator=torch.Generator().manual_seed(step * 64 + rank))
            # Every rank must leave at the same step: rank 0 looks, the others hear it from the reduction.
            leave = torch.tensor(float(rank == 0 and bool(stop_file) and os.path.exists(stop_file)))
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            for b in ballast:
                b.values.add_(1)
            if growing:
                growing.step(step)
            dist.all_reduce(leave)
            entry = {"step": step, "rank": rank, "world": dist.get_world_size(), "crc": weights_crc(*([] if sharded else [net]), *ballast),
                     "generation": int(os.environ.get("EVERSTEP_GENERATION", "0")), "at": time.time(), "pid": os.getpid()}
            ledger.write(json.dumps(entry) + "\n")
            checkpoint.step(step)  # after the entry: a step that is safe has one
            if leave.item():
                break
            time.sleep(max(0.0, until - time.time()))
    checkpoint.close()
    # Whoever drops the last reference to a gloo group joins its threads, and one of them may still need the GIL to let
    # go of the last reduction's tensor. The Reducer drops it with the GIL held and hangs (PyTorch 2.13); the Python
    # wrapper drops it without. So the Reducer goes first.
    del model
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
