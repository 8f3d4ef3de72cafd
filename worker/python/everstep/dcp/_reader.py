"""What dcp.load reads through."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader as _Base
from torch.futures import Future

from everstep._attach import warn
from everstep._library import Slot
from everstep._shards import DamagedError, ShardFile, checkpoints, open_shards, read_manifest
from everstep._state import _copy_all
from everstep._table import Decoder
from everstep.dcp import _arena
from everstep.dcp._plans import Table


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint that can be loaded."""

    id: str | None  # as it was given to dcp.save
    step: int  # the number that the id ends with, or which save it was
    where: Literal["memory", "files"]


class StorageReader(_Base):
    """For dcp.load(..., storage_reader=).

    Args:
        path: the checkpoint's id where the call gives none (`checkpoint_id`), or a folder of several, of which the
            newest is taken. None: the newest in memory.
        memory: False: folders alone, as in a script that looks at checkpoints beside the job.

    Memory comes first: under `everstep run` that is the newest committed step, the same on every rank, or the
    newest save of this run. When another number of ranks saved it and the agent offers its shards, each rank takes
    the ranges of bytes that its own layout wants; as many ranks in another layout read a folder. An id that memory
    does not have is looked for as a folder, one that a StorageWriter wrote without Everstep, or one of `--ckpt-dir`.
    A folder loads into any number of ranks, which read but what they need of it; every tensor that is read is
    checked against its CRC32C.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, memory: bool = True) -> None:
        self._memory = memory
        self._default = self._id = None if path is None else os.fspath(path)
        self._source: _Memory | _Catalog | _Files | None = None

    def newest(self) -> Found | None:
        """What a load would take now; None: nothing, start afresh. Waits for what the agent brings."""
        try:
            return self._find().found
        except FileNotFoundError:
            return None

    # --- what DCP calls, in this order ---

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A load begins, of `checkpoint_id` when it is given."""
        self._id = self._default if checkpoint_id is None else os.fspath(checkpoint_id)
        self._source = None

    def read_metadata(self) -> Metadata:  # type: ignore[override]
        """Every rank: what the checkpoint holds. Raises FileNotFoundError, DamagedError."""
        self._source = self._find()
        return self._source.table.metadata(self._source.found.id)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Every rank: says which checkpoint it is about to read."""
        assert self._source is not None
        parts = _parts(plan) if isinstance(self._source, _Catalog) else None
        return dataclasses.replace(plan, storage_data=(self._source.found, self._source.generation, parts))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Coordinator: no load mixes steps."""
        found = [plan.storage_data for plan in plans]
        if len({(f.step, f.where, generation) for f, generation, _ in found}) > 1:
            told = ", ".join(f"rank {rank}: step {f.step} of generation {generation} in {f.where}"
                             for rank, (f, generation, _) in enumerate(found[:8]))
            raise RuntimeError(f"everstep.dcp: the ranks found different checkpoints ({told}); load on all of them, "
                               "with one and the same id, before the first save or after one that all have ended")
        if not isinstance(self._source, _Catalog):
            return plans
        table = self._source.table.of_another_world([parts for _, _, parts in found])
        return [dataclasses.replace(plan, storage_data=table) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Every rank: copies what it needs, straight from memory or the mapped file."""
        source = self._source
        assert source is not None
        anew = isinstance(source, _Catalog)
        if isinstance(source, _Catalog):
            source = source.taken(planner, plan.storage_data)
        with source:
            pairs: list[tuple[torch.Tensor, Any]] = []
            tensors: list[tuple[Any, torch.Tensor]] = []
            for item in plan.items:
                fqn = item.storage_index.fqn
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, _pickled(source.value(fqn)))
                    continue
                # What was put together for this rank lies as the rank wants it.
                index, begin = (item.dest_index, item.dest_offsets) if anew \
                    else (item.storage_index, item.storage_offsets)
                chunk = source.tensor(fqn, tuple(index.offset or ()))
                part = chunk[tuple(slice(at, at + n) for at, n in zip(begin, item.lengths))]
                target = planner.resolve_tensor(item)
                if target.shape != part.shape:
                    raise RuntimeError(f"{fqn}: a part of {tuple(part.shape)} for {tuple(target.shape)}")
                pairs.append((target.detach(), part))
                tensors.append((item, target))
            _copy_all(pairs)
            for item, target in tensors:
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any path may name a checkpoint."""
        return bool(os.fspath(checkpoint_id))

    # --- and what it does ---

    def _find(self) -> _Memory | _Catalog | _Files:
        arena, why = _arena.arena() if self._memory else (None, "memory=False")
        asked, held = self._id, ""
        if arena is not None:
            shards = arena.catalog()
            if shards is not None:
                catalog = _Catalog(arena, shards)
                if asked is None or _names(asked, catalog.found.id):
                    return catalog
                held = f" step {shards.step}, {catalog.found.id!r},"
            slot = arena.newest()
            while slot is not None:
                memory = _Memory(arena, slot)
                if asked is None or _names(asked, memory.found.id):
                    return memory
                held += f"{' and' if held else ''} step {slot.step}, {memory.found.id!r},"
                slot = arena.before(slot.step)
            why = f"this rank's memory has{held[:-1] or ' nothing'}"
        if asked is None:
            raise FileNotFoundError(f"everstep.dcp: no checkpoint: {why}, and no folder was named; ask "
                                    "StorageReader.newest() before dcp.load")
        files = self._files(Path(asked))
        if files is None:
            raise FileNotFoundError(f"everstep.dcp: no checkpoint {asked!r}: {why}, and no folder there has a "
                                    "manifest.json; StorageReader().newest() says what memory would give")
        return files

    def _files(self, folder: Path) -> _Files | None:
        listed = []
        for path in checkpoints(folder):
            try:
                listed.append((int(read_manifest(path)["step"]), path))
            except DamagedError as error:
                if path == folder:
                    raise
                warn(f"{error}: an older checkpoint is looked for")
        return _Files(max(listed)[1]) if listed else None


class _Memory:
    """A slot of this rank's arena."""

    def __init__(self, arena: _arena.Arena, slot: Slot) -> None:
        self._arena, self._slot = arena, slot
        self._decoder: Decoder | None = None
        with arena.lock:
            payload = arena.client.payload(slot)
            text = bytes(payload[slot.table_offset:slot.table_offset + slot.table_bytes])
        self._text = text
        document = json.loads(text)
        told = _told(document, "the memory of this rank")
        self.found = Found(told["id"], int(slot.step), "memory")
        self.generation = int(slot.generation)
        self.table = Table(told["table"])
        self._index = _Index(document["root"], self.table)

    def __enter__(self) -> _Memory:
        self._arena.lock.acquire()
        try:
            self._decoder = Decoder(self._arena.client.payload(self._slot), self._text)
        except BaseException:
            self._arena.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder = None
        self._arena.lock.release()

    def tensor(self, fqn: str, offsets: tuple[int, ...]) -> torch.Tensor:
        assert self._decoder is not None
        body = self._index.tensors.get((fqn, offsets))
        if body is None:
            owner = self.table.owners.get((fqn, offsets))
            raise RuntimeError(
                f"{fqn} at {offsets}: rank {owner} of the {self.table.world_size} that saved step {self.found.step} "
                "has this part, and the memory of this rank only its own; give the job a directory (`everstep run "
                "--ckpt-dir DIR`) and load from there, StorageReader(DIR), which reads any layout")
        return self._decoder._tensor(body[:3])  # type: ignore[return-value]

    def value(self, fqn: str) -> Any:
        assert self._decoder is not None
        if fqn not in self._index.values:
            raise RuntimeError(f"{fqn}: rank {self.table.values[fqn][0]} has saved it, this rank has not")
        return self._decoder._node(self._index.values[fqn])


class _Catalog:
    """What another number of ranks saved: this rank has their tables, and asks for its part of their bytes."""

    def __init__(self, arena: _arena.Arena, slot: Slot) -> None:
        self._arena = arena
        self._ranges: Any = import_module("everstep._reshard")
        self._look(slot)

    def _look(self, slot: Slot) -> None:
        with self._arena.lock:
            self._slot, self._shards = slot, self._ranges.read_catalog(self._arena.client.payload(slot))
        told = _told(json.loads(self._shards[0].table), f"the memory of {len(self._shards)} ranks")
        self.found = Found(told["id"], int(slot.step), "memory")
        self.generation = int(slot.generation)
        self.table = Table(told["table"])

    def taken(self, planner: LoadPlanner, table: str) -> _Memory:
        """This rank's part, in its arena. `table`: of the checkpoint as it lies from now on."""
        state = getattr(planner, "state_dict", None)
        if not isinstance(state, dict):
            raise TypeError(f"everstep.dcp: {len(self._shards)} ranks saved, {self._arena.world_size} load, and the "
                            f"planner {type(planner).__name__} does not tell what for; use a DefaultLoadPlanner")
        while True:
            part = self._ranges.reshard(self._shards, state, self._arena.rank)
            document = json.loads(part.table)
            document["meta"]["dcp"]["table"] = json.loads(table)
            text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
            slot = self._arena.take(self._slot, part, text)
            if slot is not None:
                return _Memory(self._arena, slot)
            offered = self._arena.catalog()
            if offered is None or int(offered.step) != self.found.step:
                raise RuntimeError(f"everstep.dcp: step {self.found.step} is not whole any more; its last holder was "
                                   "lost while it was being loaded")
            self._look(offered)


class _Files:
    """A folder of the file tier."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._manifest = read_manifest(folder)
        self._shards: dict[int, tuple[ShardFile, _Index]] = {}
        self._rank = _arena.number("RANK", 0)
        first = self._open(0)
        told = _told({"meta": first.meta}, f"{folder}")
        self.found = Found(str(folder), int(self._manifest["step"]), "files")
        self.generation = int(self._manifest["generation"])
        self.table = Table(told["table"])

    def _open(self, rank: int) -> ShardFile:
        return open_shards(self._folder, {"ranks": self._manifest["ranks"][rank:rank + 1]})[0]

    def _at(self, rank: int) -> tuple[ShardFile, _Index]:
        if rank not in self._shards:
            shard = self._open(rank)
            self._shards[rank] = shard, _Index(shard._root, self.table)
        return self._shards[rank]

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._shards.clear()

    def tensor(self, fqn: str, offsets: tuple[int, ...]) -> torch.Tensor:
        shard, index = self._at(self.table.owners[(fqn, offsets)])
        return shard._tensor(index.tensors[(fqn, offsets)][:3])  # type: ignore[return-value]

    def value(self, fqn: str) -> Any:
        ranks = self.table.values[fqn]
        if self._rank < self.table.world_size and fqn in self._at(self._rank)[1].values:
            ranks = [self._rank]  # one's own, where each rank has one
        shard, index = self._at(ranks[0])
        return shard._node(index.values[fqn])


class _Index:
    """Where the parts are that one rank wrote."""

    def __init__(self, root: dict[str, Any], table: Table) -> None:
        self.tensors: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
        self.values: dict[str, Any] = {}
        for fqn, node in root["d"]:
            if fqn not in table.tensors:
                self.values[fqn] = node
                continue
            for part in node.get("l", [node]):
                body = part["T"]
                self.tensors[fqn, tuple(body[3]["offsets"] if len(body) > 3 else [0] * len(body[1]))] = body


def _parts(plan: LoadPlan) -> list[tuple[str, list[int], list[int]]]:
    """Of each tensor that a rank loads: name, where in the whole its part begins, and how large that is."""
    parts: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for item in plan.items:
        if item.type == LoadItemType.TENSOR:
            ends = [at + n for at, n in zip(item.dest_offsets, item.lengths)]
            size = parts.setdefault((item.dest_index.fqn, tuple(item.dest_index.offset or ())), ends)
            size[:] = map(max, size, ends)
    return [(fqn, list(offset), size) for (fqn, offset), size in parts.items()]


def _told(document: dict[str, Any], where: str) -> dict[str, Any]:
    told = document["meta"].get("dcp")
    if told is None:
        raise RuntimeError(f"everstep.dcp: {where} holds what a Checkpointer captured; restore it by a Checkpointer, "
                           "or export it (`everstep ckpt export`) to a folder that stock dcp.load reads")
    if told["version"] != 1:
        raise RuntimeError(f"everstep.dcp: {where} has version {told['version']} of the table, this package reads 1")
    return told  # type: ignore[no-any-return]


def _names(asked: str, held: str | None) -> bool:
    """`asked` is the id, or the folder of it."""
    if held is None:
        return False
    asked, held = os.path.normpath(asked), os.path.normpath(held)
    return asked == held or asked == (os.path.dirname(held) or ".")  # noqa: PTH120


def _pickled(value: Any) -> io.BytesIO:
    """As the planner wants values: this pickle lives in this process for the length of a call, nowhere else."""
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data
