"""One class for each system that is measured, all with one meaning, so that one script measures them all.

A System is made inside the worker, after the process group, with the state's tensors; `store` is its folder on tmpfs,
`node` a folder of this node alone (lost with it). It must
  save(step)    begin a save of the tensors as they are; what it takes is what training waits for
  settle()      return when the tensors may change again (a system that copies in the background)
  finish(step)  return when that save is complete: all that the system does for it is done
  restore()     put the newest save into the tensors; its step, or None: it has none
  close()       the script's orderly end
  damage(step)  flip one bit of tensor data in a stored copy of rank 1's state, the one that a restore after the loss of its
                node would take; called on rank `holder`; says where
`config` says in one line how it was set up, `place` where a complete save lies.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch


class System:
    config = ""
    place = ""
    holder = 0

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path) -> None:
        self.tensors, self.store, self.node = tensors, store, node
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.replicated = "RIVAL_REPLICATED" in os.environ  # every rank has the same state, as in data parallel training

    def state(self) -> dict[str, Any]:
        """Names as a model's state_dict() would give them; every rank's own unless the state is replicated."""
        prefix = "" if self.replicated else f"rank{self.rank}."
        return {f"{prefix}{i}": t for i, t in enumerate(self.tensors)}

    def save(self, step: int) -> None:
        raise NotImplementedError

    def settle(self) -> None:
        """Nothing to wait for: save() has copied."""

    def finish(self, step: int) -> None:
        raise NotImplementedError

    def restore(self) -> int | None:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to end."""

    def damage(self, step: int) -> str:
        raise NotImplementedError


def make(name: str, tensors: list[torch.Tensor], store: Path, node: Path) -> System:
    """The system called `name` in tests/bench/rivals.py: module, then its variant."""
    module, _, variant = name.partition(":")
    kind = importlib.import_module(f"systems.{module}").System
    return kind(tensors, store, node, variant) if variant else kind(tensors, store, node)


def value(rank: int, step: int, index: int) -> float:
    """What tensor `index` of `rank` is full of after `step`: exact in float32, another for each."""
    return rank * 4096 + step + index / 128


def flip_in_file(path: Path, full_of: float) -> str:
    """Flips the lowest mantissa bit of one float32 of a run of `full_of` well inside of `path`; where."""
    pattern = torch.tensor([full_of] * 64).numpy().tobytes()
    with path.open("r+b") as file:
        data = file.read()
        at = data.find(pattern, len(data) // 2)
        if at < 0:
            at = data.find(pattern)
        if at < 0:
            raise RuntimeError(f"{path}: no run of 64 times {full_of} in its {len(data)} bytes")
        at += 4 * 32
        file.seek(at)
        file.write(bytes([data[at] ^ 1]))
    return f"{path.name} at byte {at} of {len(data)}"
