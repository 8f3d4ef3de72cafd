"""lm-resiliency's InMemoryCheckpointManager: GEMINI by its first author."""

from __future__ import annotations

from pathlib import Path

import torch
from lm_resiliency.checkpointing.config import InMemoryCkptConfig
from lm_resiliency.checkpointing.manager import InMemoryCheckpointManager, RecoveryMode

from systems import System as Base


class System(Base):
    config = ("InMemoryCheckpointManager, interval=1, pairs of ranks over gloo, verify_integrity=True, its default disk_flush_interval=100 and "
              "its flush on SIGTERM and exit; disk_folder shared by all nodes, so that what a pair flushes reaches a new node")

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path) -> None:
        super().__init__(tensors, store, node)
        self.place = "memory of the trainer" + (", and of the paired rank's trainer" if self.world > 1 else "")
        self.folder = store / "lm"
        self.manager = InMemoryCheckpointManager(InMemoryCkptConfig(
            interval=1, pin_memory=False, replication_jump=1, disk_folder=str(self.folder), verify_integrity=True,
            run_id="bench"))

    def save(self, step: int) -> None:
        self.manager.save(self.state(), step)

    def settle(self) -> None:
        self.manager.maybe_wait()

    def finish(self, step: int) -> None:
        self.manager.finalize_replication()

    def restore(self) -> int | None:
        if self.manager.find_latest(RecoveryMode.LATEST_GEMINI) < 0:
            return None
        loaded = self.manager.load(RecoveryMode.LATEST_GEMINI)
        if loaded is None:
            return None
        saved, step = loaded
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
        return step

    def close(self) -> None:
        self.manager.flush_for_restart()
        self.manager.close()

    def damage(self, step: int) -> str:
        slot = self.manager._buffer_pool.peer_current  # rank 1's replica in rank 0's memory
        words = slot.tensors[1].view(torch.int32).view(-1)
        words[words.numel() // 2] ^= 1
        return f"rank {self.rank}'s replica of its pair's step {slot.step}, tensor 1"
