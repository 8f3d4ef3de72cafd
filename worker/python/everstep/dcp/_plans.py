"""DCP's plans and Metadata as a JSON table, and back. No pickle.

Every rank's slot or file has the table of the whole checkpoint, so that any of them tells what there is and who
has it. The coordinator makes it out of all ranks' plans; it travels with the plans, once, and again when it
changes: a rank says by its digest which one it has.

    {"world": W, "replicated": bool, "planner": NODE,
     "tensors": [[fqn, dtype, [size ...], requires_grad, [[rank, [offset ...], [size ...]] ...]] ...],
     "values": [[fqn, [rank ...]] ...]}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import OrderedDict
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from everstep._table import _DTYPES, Decoder, Encoder


@dataclasses.dataclass(frozen=True)
class Local:
    """What a rank tells the coordinator beside its plan."""

    held: tuple[str, ...]  # digests of the tables that it has
    layout: str  # digest of what it would write
    sharded: bool


@dataclasses.dataclass(frozen=True)
class Whole:
    """A table that was made, as text, and what a save needs of it."""

    text: str
    world_size: int
    replicated: bool


@dataclasses.dataclass(frozen=True)
class Agreed:
    """What the coordinator tells every rank."""

    digest: str
    whole: Whole | None  # None: the rank has it


_KEPT = 8  # tables
_tables: OrderedDict[str, Whole] = OrderedDict()  # by digest, of this process's newest saves
_mine: list[WriteItem] = []  # what this rank would write, for planners that say "as the time before"
_plans: dict[int, list[SavePlan]] = {}  # coordinator: the newest plans by world size, for planners that send changes


def announce(plan: SavePlan) -> tuple[SavePlan, list[WriteItem]]:
    """A rank's plan with what the coordinator needs to know, and all that the rank holds."""
    global _mine
    if not usable(plan):  # DefaultSavePlanner(enable_plan_caching=True): as the time before
        return plan, _mine
    _mine = plan.items
    layout = hashlib.sha256(repr(sorted((i.index.fqn, tuple(i.index.offset or ()), i.type.name)
                                        for i in plan.items)).encode()).hexdigest()
    told = Local(tuple(_tables), layout, any(map(is_part, plan.items)))
    return dataclasses.replace(plan, storage_data=told), plan.items


def agree(plans: list[SavePlan]) -> list[SavePlan]:
    """On the coordinator: every rank's plan with the table of the whole."""
    before = _plans.get(len(plans))
    if not any(usable(plan) for plan in plans):
        return plans  # nothing has changed, and every rank still has its plan with the table
    if not all(usable(plan) for plan in plans):
        if before is None:
            raise RuntimeError("everstep.dcp: the planner sends changes of a plan that was saved by another storage "
                               "writer; give this writer a planner of its own, or one without enable_plan_caching")
        plans = [plan if usable(plan) else old for plan, old in zip(plans, before)]
    _plans[len(plans)] = plans
    whole = _table(plans)
    digest = hashlib.sha256(whole.text.encode()).hexdigest()
    known, anew = Agreed(digest, None), Agreed(digest, whole)
    return [dataclasses.replace(plan, storage_data=known if digest in plan.storage_data.held else anew)
            for plan in plans]


def agreed(plan: SavePlan) -> Whole:
    """On every rank: the table. Raises RuntimeError."""
    data = plan.storage_data
    if isinstance(data, Agreed):
        whole = data.whole if data.whole is not None else _tables.get(data.digest)
        if whole is not None:
            _tables[data.digest] = whole
            _tables.move_to_end(data.digest)
            while len(_tables) > _KEPT:
                _tables.popitem(last=False)
            return whole
    raise RuntimeError("everstep.dcp: the planner gave a plan that this writer never saw; give it a planner of its "
                       "own, or one without enable_plan_caching")


def usable(plan: SavePlan) -> bool:
    """False: the planner's word for "as the time before". PyTorch before 2.7 has no such plans."""
    return bool(getattr(plan, "usable", True))


def is_part(item: WriteItem) -> bool:
    """It is a part of a tensor, not the whole."""
    data = item.tensor_data
    return data is not None and data.chunk.sizes != data.size


def _table(plans: list[SavePlan]) -> Whole:
    tensors: dict[str, list[Any]] = {}
    values: dict[str, list[int]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            fqn, data = item.index.fqn, item.tensor_data
            if item.type == WriteItemType.BYTE_IO:
                values.setdefault(fqn, []).append(rank)
                continue
            if data is None:
                raise TypeError(f"{fqn}: a {item.type.name} item without a description of its tensor")
            told = tensors.setdefault(fqn, [fqn, _name(data.properties.dtype), list(data.size),
                                            bool(data.properties.requires_grad), []])
            told[4].append([rank, list(data.chunk.offsets), list(data.chunk.sizes)])
    local = [plan.storage_data for plan in plans]
    replicated = len({told.layout for told in local}) == 1 and not any(told.sharded for told in local)
    text = json.dumps({"world": len(plans), "replicated": replicated, "planner": _planner(plans),
                       "tensors": list(tensors.values()), "values": list(values.items())}, separators=(",", ":"))
    return Whole(text, len(plans), replicated)


def _planner(plans: list[SavePlan]) -> Any:
    told = [plan.planner_data for plan in plans if plan.planner_data is not None]
    if not told:
        return None
    if all(isinstance(data, dict) for data in told):
        merged: dict[Any, Any] = {}
        for data in reversed(told):  # as DefaultSavePlanner: the lowest rank's word counts
            merged.update(data)
        return Encoder().node(merged, "the planner's data")
    return Encoder().node(told[0], "the planner's data")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Table:
    """The table of a checkpoint that is there."""

    def __init__(self, told: dict[str, Any]) -> None:
        self.world_size: int = told["world"]
        self._tensors: list[list[Any]] = told["tensors"]
        self._planner = told["planner"]
        self.owners: dict[tuple[str, tuple[int, ...]], int] = {
            (fqn, tuple(offsets)): rank for fqn, _, _, _, chunks in self._tensors for rank, offsets, _ in chunks}
        self.values: dict[str, list[int]] = dict(told["values"])
        self.tensors = {tensor[0] for tensor in self._tensors}

    def of_another_world(self, parts: list[list[tuple[str, list[int], list[int]]]]) -> str:
        """The table of the same checkpoint once it lies as `parts` say: by rank, (fqn, offset, size) of each."""
        where: dict[str, dict[tuple[int, ...], list[Any]]] = {}
        for rank, mine in enumerate(parts):
            for fqn, offset, size in mine:
                where.setdefault(fqn, {}).setdefault(tuple(offset), [rank, offset, size])
        tensors = [[*tensor[:4], list(where.get(tensor[0], {}).values())] for tensor in self._tensors]
        replicated = all(size == tensor[2] for tensor in tensors for _, _, size in tensor[4])
        everyone = list(range(len(parts)))
        told = {"world": len(parts), "replicated": replicated, "planner": self._planner, "tensors": tensors,
                "values": [[fqn, everyone] for fqn in self.values]}
        return json.dumps(told, separators=(",", ":"))

    def metadata(self, checkpoint_id: str | None) -> Metadata:
        """What DCP plans a load with."""
        state: dict[str, Any] = {}
        for fqn, dtype, size, requires_grad, chunks in self._tensors:
            state[fqn] = TensorStorageMetadata(
                TensorProperties(dtype=_DTYPES[dtype], requires_grad=requires_grad), torch.Size(size),
                [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for _, offsets, sizes in chunks])
        state.update((fqn, BytesStorageMetadata()) for fqn in self.values)
        planner = None if self._planner is None else _decoded(self._planner)
        return Metadata(state, planner_data=planner, storage_meta=StorageMeta(checkpoint_id=checkpoint_id))


def _decoded(node: Any) -> Any:
    return Decoder(memoryview(b""), json.dumps({"format": 1, "meta": {}, "root": node}).encode()).root()
