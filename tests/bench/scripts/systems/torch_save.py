"""torch.save to a file on tmpfs, renamed when it is whole; torch.load(mmap=True)."""

from __future__ import annotations

from pathlib import Path

import torch

from systems import System as Base
from systems import flip_in_file, value


class System(Base):
    config = "torch.save to a file on tmpfs, then rename; torch.load(mmap=True); the newest two kept"
    place = "files on the node (here on tmpfs)"

    def path(self, step: int) -> Path:
        return self.store / f"step-{step:06d}-rank-{self.rank}.pt"

    def saves(self) -> list[Path]:
        return sorted(self.store.glob(f"step-*-rank-{self.rank}.pt"))

    def save(self, step: int) -> None:
        part = self.path(step).with_suffix(".part")
        torch.save(self.state(), part)
        part.rename(self.path(step))

    def finish(self, step: int) -> None:
        for old in self.saves()[:-2]:
            old.unlink()

    def restore(self) -> int | None:
        if not self.saves():
            return None
        newest = self.saves()[-1]
        saved = torch.load(newest, mmap=True)
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
        return int(newest.name[5:11])

    def damage(self, step: int) -> str:
        return flip_in_file(self.saves()[-1], value(0, step, 1))
