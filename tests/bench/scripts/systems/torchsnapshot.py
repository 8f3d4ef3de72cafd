"""torchsnapshot.Snapshot.async_take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchsnapshot import Snapshot, StateDict

from systems import System as Base
from systems import flip_in_file, value
from systems.dcp import prune


class System(Base):
    config = "Snapshot.async_take, folder on tmpfs, the newest two kept"
    place = "files on the node (here on tmpfs)"

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path) -> None:
        super().__init__(tensors, store, node)
        self.pending: Any = None

    def save(self, step: int) -> None:
        if self.pending is not None:
            self.pending.wait()
        self.pending = Snapshot.async_take(str(self.store / f"step-{step:06d}"), {"state": StateDict(**self.state())})

    def finish(self, step: int) -> None:
        self.pending.wait()
        self.pending = None
        prune(self.store, self.rank)

    def restore(self) -> int | None:
        whole = [p for p in sorted(self.store.glob("step-*")) if (p / ".snapshot_metadata").exists()]
        if not whole:
            return None
        Snapshot(str(whole[-1])).restore({"state": StateDict(**self.state())})
        return int(whole[-1].name[5:])

    def close(self) -> None:
        if self.pending is not None:
            self.pending.wait()

    def damage(self, step: int) -> str:
        newest = sorted(self.store.glob("step-*"))[-1]
        for path in (p for p in newest.rglob("*") if p.is_file()):  # small tensors share files
            try:
                return flip_in_file(path, value(1, step, 1))
            except RuntimeError:
                continue
        raise RuntimeError(f"rank 1's step {step} is not in {newest}")
