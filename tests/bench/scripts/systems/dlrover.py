"""DLRover's flash checkpoint, in shared memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

from systems import System as Base
from systems import value


class System(Base):
    config = "DdpCheckpointer, a shard a rank, StorageType.MEMORY; at an orderly end the last step to files on tmpfs"
    place = "shared memory of the node"

    holder = 1  # there is no other copy than its own

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path) -> None:
        super().__init__(tensors, store, node)
        self.checkpointer = DdpCheckpointer(str(store / "dlrover"), local_shard_num=int(os.environ["LOCAL_WORLD_SIZE"]),
                                            global_shard_num=self.world)
        self.newest = -1

    def save(self, step: int) -> None:
        self.checkpointer.save_checkpoint(step, {"step": step, **self.state()}, storage_type=StorageType.MEMORY)
        self.newest = step

    def finish(self, step: int) -> None:
        """save() has done all that is done."""

    def restore(self) -> int | None:
        saved = self.checkpointer.load_checkpoint()
        saved = saved.get("model_states", saved)
        if "step" not in saved:
            return None
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
        return int(saved["step"])

    def close(self) -> None:
        if self.newest >= 0:
            self.checkpointer.save_checkpoint(self.newest, {"step": self.newest, **self.state()}, storage_type=StorageType.DISK)
            deadline = time.monotonic() + 60  # its own wait raises when nothing was ever written
            while not (self.store / "dlrover/dlrover_latest.txt").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            self.checkpointer.wait_latest_checkpoint(timeout=60)

    def damage(self, step: int) -> str:
        memory = self.checkpointer._engine._shm_handler.shared_memory
        data = memory.buf
        found = bytes(data).find(torch.tensor([value(1, step, 1)] * 64).numpy().tobytes())
        if found < 0:
            raise RuntimeError(f"{memory.name}: rank 1's step {step} is not there")
        at = found + 128
        data[at] ^= 1
        return f"{memory.name} at byte {at} of {len(data)}"
