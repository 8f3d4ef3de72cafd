"""torch.save to a file on tmpfs, renamed when it is whole; torch.load(mmap=True)."""

from __future__ import annotations

from pathlib import Path

import torch

from systems import System as Base
from systems import flip_in_file, value


class System(Base):
    config = "torch.save to a file on tmpfs, then rename; torch.load(mmap=True); the newest two kept; the newest step that all ranks have"
    place = "files on the node (here on tmpfs)"

    def path(self, step: int, rank: int) -> Path:
        return self.store / f"step-{step:06d}-rank-{rank}.pt"

    def saves(self) -> list[Path]:
        return sorted(self.store.glob(f"step-*-rank-{self.rank}.pt"))

    def save(self, step: int) -> None:
        part = self.path(step, self.rank).with_suffix(".part")
        torch.save(self.state(), part)
        part.rename(self.path(step, self.rank))

    def finish(self, step: int) -> None:
        for old in self.saves()[:-2]:
            old.unlink()

    def restore(self) -> int | None:
        """The newest step that every rank has, as a script would agree on it."""
        newest = torch.tensor([int(self.saves()[-1].name[5:11]) if self.saves() else -1])
        torch.distributed.all_reduce(newest, torch.distributed.ReduceOp.MIN)
        step = int(newest)
        if step < 0:
            return None
        saved = torch.load(self.path(step, self.rank), mmap=True)
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
        return step

    def damage(self, step: int) -> str:
        return flip_in_file(self.path(step, 1), value(1, step, 1))
