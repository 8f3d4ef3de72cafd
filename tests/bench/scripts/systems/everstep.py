"""Everstep itself, through the interface that its rivals are measured by."""

from __future__ import annotations

import time
from pathlib import Path

import everstep
import torch

from systems import System as Base


class System(Base):
    config = "everstep run, Checkpointer(mode={}), a save each step"

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path, mode: str = "blocking") -> None:
        super().__init__(tensors, store, node)
        self.config = self.config.format(repr(mode))
        self.place = "memory of the node" + (", and checked in a second node's" if self.world > 1 else "")
        self.checkpointer = everstep.Checkpointer({"state": dict(enumerate(tensors))}, mode=mode, replicated=False,
                                                  rng=False, commit_wait=60.0)

    def save(self, step: int) -> None:
        if not self.checkpointer.step(step):
            raise RuntimeError(f"step {step} was skipped: {self.checkpointer.stats()}")

    def settle(self) -> None:
        self.checkpointer.wait()

    def finish(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while self.checkpointer.stats().committed_step < step:
            if time.monotonic() > deadline:
                raise RuntimeError(f"step {step} was not committed within 120 s: {self.checkpointer.stats()}")
            time.sleep(0.0005)

    def restore(self) -> int | None:
        following = self.checkpointer.restore()
        return following - 1 if following > 0 else None

    def close(self) -> None:
        self.checkpointer.close()
