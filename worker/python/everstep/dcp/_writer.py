"""What dcp.save and dcp.async_save write through."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter as _Base
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from everstep import _library
from everstep._attach import number, warn
from everstep._library import pieces
from everstep._shards import MANIFEST, DamagedError, Facts, number_of, read_manifest, write_manifest, write_shard
from everstep._table import ALIGNMENT, FORMAT, Encoder, Flattened
from everstep.dcp import _arena, _plans
from everstep.dcp._stager import Stager


class StorageWriter(Stager, _Base):
    """For dcp.save(..., storage_writer=) and dcp.async_save, which also stages by it.

    Args:
        path: the checkpoint's id where the call gives none (`checkpoint_id`). An id that ends with a number
            ("ckpt/step-100") names the step; else saves are counted. Under `everstep run` it is no more than
            a name that a load may ask for; anywhere else it is the folder to write.
        commit_timeout: seconds that a save waits until enough nodes hold it; 0: it returns when the state is
            copied, and the agents go on.

    Under `everstep run` all ranks save together, each all that it holds: replicated tensors too, so that a rank
    finds its whole state in its own node's memory. Values that are no tensors are kept as a Checkpointer keeps
    them; a TypeError names the one that cannot be. Use one checkpointing at a time from one thread at a time.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, commit_timeout: float = 0.0) -> None:
        Stager.__init__(self)
        self._default = self._id = None if path is None else os.fspath(path)
        self._commit_timeout = commit_timeout
        self._arena: _arena.Arena | None = None
        self._rank = 0
        self._step = -1
        self._generation = 0
        self._replicated = False
        self._items: list[WriteItem] = []

    # --- what DCP calls, in this order ---

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A save begins, of `checkpoint_id` when it is given."""
        self._id = self._default if checkpoint_id is None else os.fspath(checkpoint_id)

    def storage_meta(self) -> StorageMeta | None:
        """The id of what is being saved."""
        return StorageMeta(checkpoint_id=self._id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Every rank: attaches, and gives the save its number."""
        if kwargs.get("use_collectives") is False:
            raise NotImplementedError("everstep.dcp: use_collectives=False makes checkpoints of single ranks, which "
                                      "are never complete; leave it out")
        self._arena, why = _arena.arena()
        step, self._generation = number_of(self._id or "")
        if self._arena is not None:
            self._rank = self._arena.rank
            self._step = self._arena.next_step(step)
            return
        if self._id is None:
            raise ValueError(f"everstep.dcp: {why}, and no folder was named; give dcp.save a checkpoint_id or "
                             "StorageWriter a path, or start the script with `everstep run`")
        self._rank = int(kwargs.get("rank", number("RANK", 0)))
        if self._rank == 0:
            warn(f"{why}: dcp.save writes files in {self._id}")
        Path(self._id).mkdir(parents=True, exist_ok=True)
        self._step = step if step is not None else self._before() + 1

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Every rank: remembers all that this rank holds, before DCP takes out what others write too."""
        plan, self._items = _plans.announce(plan)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator: makes the table of the whole."""
        if self._arena is not None and len(plans) != self._arena.world_size:
            raise RuntimeError(f"everstep.dcp: {len(plans)} of the job's {self._arena.world_size} ranks save; a step "
                               "counts when every rank has saved: call dcp.save on all of them, without no_dist, and "
                               "without a process_group of some")
        return _plans.agree(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Every rank: copies its items into the arena, or into its file."""
        whole = _plans.agreed(plan)
        with torch.no_grad():
            state = self._flatten(plan.items if self._arena is None else self._items, planner, whole.text)
        stored: Any = None
        if self._arena is not None:
            self._to_memory(self._arena, state, whole.replicated)
        else:
            # With more ranks a file has but what DCP left to its rank, so that it does not stand for the others'.
            self._replicated = whole.replicated and whole.world_size == 1
            stored = self._to_file(state, whole.world_size)
        results = [WriteResult(item.index, 0, stored) for item in plan.items]
        if stored is not None and not results:  # this rank's file is part of the checkpoint, if it holds nothing
            results = [WriteResult(_NOTHING, 0, stored)]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator: files become a checkpoint. In memory the controller does that when all ranks have theirs."""
        if self._arena is not None:
            return
        assert self._id is not None
        folder = Path(self._id)
        ranks = [told[0].storage_data for told in results]
        write_manifest(folder, self._facts(0, len(ranks)), ranks)
        kept = {entry["file"] for entry in ranks}
        for path in folder.glob("rank-*.safetensors"):  # of the checkpoint that stood here before
            if path.name not in kept:
                with contextlib.suppress(OSError):
                    path.unlink()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path may name a checkpoint."""
        return bool(os.fspath(checkpoint_id))

    # --- and what it does ---

    def _flatten(self, items: list[WriteItem], planner: SavePlanner, table: str) -> Flattened:
        encoder = Encoder()
        nodes: dict[str, Any] = {}
        for item in items:
            fqn = item.index.fqn
            if item.type == WriteItemType.BYTE_IO:
                nodes[fqn] = encoder.node(_plain(planner, item), fqn)
                continue
            tensor, told = planner.resolve_data(item), item.tensor_data
            if not isinstance(tensor, torch.Tensor) or told is None or tensor.shape != told.chunk.sizes:
                raise TypeError(f"{fqn}: the planner {type(planner).__name__} gave {_kind(tensor)} for a part of "
                                f"{None if told is None else tuple(told.chunk.sizes)}")
            node = encoder.node(tensor, fqn)
            if item.type == WriteItemType.SHARD:
                # What lies in one memory has one entry, but each its own place in the whole.
                node = {"T": [*node["T"][:3], {"global": list(told.size), "placements": [],
                                               "offsets": list(told.chunk.offsets)}]}
            nodes.setdefault(fqn, []).append(node)
        root = {"d": [[fqn, node if not isinstance(node, list) else node[0] if len(node) == 1 else {"l": node}]
                      for fqn, node in nodes.items()]}
        meta = json.dumps({"step": self._step, "torch": torch.__version__})
        about = f'{{"version":1,"id":{json.dumps(self._id)},"table":{table}}}'  # the table is JSON already
        text = (f'{{"format":{FORMAT},"meta":{meta[:-1]},"dcp":{about}}},'
                f'"root":{json.dumps(root, separators=(",", ":"), allow_nan=False)}}}')
        zone = encoder.rest
        return Flattened(zone.pieces, zone.offsets, zone.end, text.encode(), False, zone.keep)

    def _to_memory(self, arena: _arena.Arena, state: Flattened, replicated: bool) -> None:
        with arena.lock:
            client = arena.client
            flags = _library.REPLICATED_LAYOUT if replicated else 0
            if not client.begin(self._step, state.payload_bytes + 2 * ALIGNMENT + len(state.table), flags):
                why = client.stats().last_skip.decode()
                warn(f"dcp.save of step {self._step} is skipped ({why}): the save before is not on enough nodes yet "
                     "and must not be overwritten; save less often, or see `everstep events`")
                return
            try:
                client.write(pieces(state.pieces), state.offsets)
                client.commit(state.table)
            except BaseException:
                client.abort()
                raise
            arena.saved()
        deadline = time.monotonic() + self._commit_timeout
        while client.stats().committed_step < self._step:
            if time.monotonic() >= deadline:
                if self._commit_timeout > 0:
                    warn(f"dcp.save: step {self._step} is not on enough nodes after {self._commit_timeout:g} s; "
                         "training goes on, a load takes the newest that is; see `everstep events`")
                return
            time.sleep(0.001)

    def _to_file(self, state: Flattened, world: int) -> dict[str, Any]:
        assert self._id is not None
        folder = Path(self._id)
        name = f"rank-{self._rank:05d}-of-{world:05d}"
        # The checkpoint that stands here stays whole until the new manifest takes the old one's place.
        used = {entry["file"] for entry in self._standing().get("ranks", ())}
        file = next(f for f in (f"{name}.safetensors", f"{name}.1.safetensors") if f not in used)
        return write_shard(folder / file, state, self._facts(self._rank, world))

    def _facts(self, rank: int, world: int) -> Facts:
        job = os.environ.get("EVERSTEP_JOB") or "dcp"
        return Facts(job, self._generation, self._step, rank, world, self._replicated)

    def _standing(self) -> dict[str, Any]:
        folder = Path(self._id or "")
        try:
            return read_manifest(folder) if (folder / MANIFEST).exists() else {}
        except DamagedError:
            return {}

    def _before(self) -> int:
        return int(self._standing().get("step", -1))

    def __getstate__(self) -> Any:
        raise TypeError("everstep.dcp.StorageWriter belongs to its process: use AsyncCheckpointerType.THREAD; the "
                        "thread does no more than copy memory, so a process of its own would gain nothing")


@dataclasses.dataclass(frozen=True)
class _Nothing:
    fqn: str = ""


_NOTHING: Any = _Nothing()


def _kind(value: object) -> str:
    return f"{tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _plain(planner: SavePlanner, item: WriteItem) -> Any:
    """A value as the state has it; resolve_data would give its pickle."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    if isinstance(planner, DefaultSavePlanner) \
            and type(planner).transform_object is DefaultSavePlanner.transform_object \
            and type(planner).resolve_data is DefaultSavePlanner.resolve_data:
        return planner.lookup_object(item.index)
    raise TypeError(f"{item.index.fqn}: the planner {type(planner).__name__} makes bytes of its own out of values "
                    "that are no tensors; everstep.dcp keeps such values without pickle: use a DefaultSavePlanner, "
                    "or one that leaves resolve_data and transform_object alone")
