"""Everstep itself, through the interface that its rivals are measured by."""

from __future__ import annotations

import os
import time
from pathlib import Path

import everstep
import torch

from systems import System as Base
from systems import flip_in_file, value


class System(Base):
    config = "everstep run, Checkpointer(mode={}), a save each step"

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path, mode: str = "blocking") -> None:
        super().__init__(tensors, store, node)
        self.config = self.config.format(repr(mode))
        self.place = "memory of the node" + (", and checked in a second node's" if self.world > 1 else "")
        model = torch.nn.ParameterList(torch.nn.Parameter(t, requires_grad=False) for t in tensors)  # the same memory
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # so that it is known who changes parameters, and when
        self.checkpointer = everstep.Checkpointer({"model": model, "optimizer": optimizer}, mode=mode, replicated=self.replicated,
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

    def damage(self, step: int) -> str:
        keeper = (Path(os.environ["EVERSTEP_KEEPER"]).parent / "keeper.pid").read_text().split()[0]
        for link in Path(f"/proc/{keeper}/fd").iterdir():
            if not os.readlink(link).startswith("/memfd:"):
                continue
            try:
                return f"the peer's memory of rank 1, {flip_in_file(link, value(1, step, 1))}"
            except RuntimeError:  # another rank's arena
                continue
        raise RuntimeError(f"keeper {keeper} holds no copy of rank 1's step {step}")
