"""torch.distributed.checkpoint.async_save, by a thread or by a process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from systems import System as Base
from systems import flip_in_file, value


class System(Base):
    config = ("async_save, AsyncCheckpointerType.{}, one DefaultStager kept (no accelerator: not pinned, not asynchronous), "
              "folder on tmpfs, the newest two kept")
    place = "files on the node (here on tmpfs)"

    def __init__(self, tensors: list[torch.Tensor], store: Path, node: Path, variant: str = "thread") -> None:
        super().__init__(tensors, store, node)
        process = variant == "process"
        self.kind = AsyncCheckpointerType.PROCESS if process else AsyncCheckpointerType.THREAD
        self.stager = DefaultStager(StagingOptions(False, process, False, False))
        self.config = self.config.format(self.kind.name)
        self.future = None

    def folder(self, step: int) -> Path:
        return self.store / f"step-{step:06d}"

    def save(self, step: int) -> None:
        if self.future is not None:
            self.wait()
        self.future = dcp.async_save(self.state(), checkpoint_id=self.folder(step), async_stager=self.stager,
                                     async_checkpointer_type=self.kind, process_group=self.group())

    def group(self) -> torch.distributed.ProcessGroup | None:
        return torch.distributed.group.WORLD

    def wait(self) -> None:
        future = getattr(self.future, "upload_completion", self.future)
        future.result()
        self.future = None

    def finish(self, step: int) -> None:
        self.wait()
        prune(self.store, self.rank)

    def restore(self) -> int | None:
        whole = [p for p in sorted(self.store.glob("step-*")) if (p / ".metadata").exists()]
        if not whole:
            return None
        state = self.state()
        dcp.load(state, checkpoint_id=whole[-1])
        return int(whole[-1].name[5:])

    def close(self) -> None:
        if self.future is not None:
            self.wait()
        self.stager.close()

    def damage(self, step: int) -> str:
        newest = sorted(self.store.glob("step-*"))[-1]
        return flip_in_file(max(newest.glob("__1_*.distcp"), key=lambda p: p.stat().st_size), value(1, step, 1))


def prune(store: Path, rank: int) -> None:
    """Older saves than the newest two go, as any retention would have it."""
    import shutil

    torch.distributed.barrier()
    if rank == 0:
        for old in sorted(store.glob("step-*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)
