"""nvidia-resiliency-ext's local checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from nvidia_resiliency_ext.checkpointing.local.base_state_dict import TensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

from systems import System as Base
from systems import flip_in_file, value


class CpuStateDict(TensorAwareStateDict):
    """The package's own one asserts CUDA tensors; this one is its interface for a flat dict of CPU tensors."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state, self.hollow = dict(state), False

    def pop_tensors(self) -> list[torch.Tensor]:
        out = list(self.state.values())
        self.state = {k: torch.empty_like(v, device="meta") for k, v in self.state.items()}
        self.hollow = True
        return out

    @property
    def tensors(self) -> list[torch.Tensor]:
        return list(self.state.values())

    @property
    def is_hollow(self) -> bool:
        return self.hollow

    def insert_tensors(self, tensor_data: list[torch.Tensor]) -> None:
        self.state, self.hollow = dict(zip(self.state, tensor_data)), False

    def init_tensors(self) -> None:
        self.state = {k: torch.empty_like(v, device="cpu") for k, v in self.state.items()}
        self.hollow = False

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        self.state = {k: v.clone() for k, v in self.state.items()}

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """They are where they belong."""

    def to_state_dict(self) -> dict[str, torch.Tensor]:
        return self.state


class System(Base):
    config = ("LocalCheckpointManager on the node's tmpfs, CliqueReplicationStrategy(jump=1, factor=2) over gloo, "
              "is_async=False (its asynchronous way calls torch.cuda.synchronize)")

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path) -> None:
        super().__init__(tensors, store, node)
        self.place = "files on the node (here on tmpfs)" + (", and on the paired rank's" if self.world > 1 else "")
        strategy = CliqueReplicationStrategy.from_replication_params(1, 2) if self.world % 2 == 0 else None
        self.manager = LocalCheckpointManager(str(node / "nvrx"), "bench", repl_strategy=strategy)

    def save(self, step: int) -> None:
        self.manager.save(CpuStateDict(self.state()), step, is_async=False)

    def finish(self, step: int) -> None:
        """save() has done all that is done."""

    def restore(self) -> int | None:
        step = self.manager.find_latest()
        if step < 0:
            return None
        loaded, _ = self.manager.load()
        for tensor, saved in zip(self.tensors, loaded.tensors):
            tensor.copy_(saved)
        return step

    def damage(self, step: int) -> str:
        return flip_in_file(next((self.node / "nvrx").rglob(f"iter_{step:07d}_1_local.pt")), value(1, step, 1))
