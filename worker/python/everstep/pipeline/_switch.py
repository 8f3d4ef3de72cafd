"""From what ranks hold to what the plan wants them to hold: layers' state goes from rank to rank, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from everstep.pipeline._agree import Move, moves
from everstep.pipeline._layer import Bundle

TAG_STATE = 6 << 24
T = TypeVar("T")


def gather(value: T) -> list[T]:
    """Every rank's value, by rank."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes; where it raises, every rank raises the same."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, 0)
    if box[1] is not None:
        raise box[1]
    value: T = box[0]
    return value


@dataclass
class Moved:
    """What a switch moved, of all ranks together."""

    layers: int = 0
    bytes: int = 0


def fetch(wanted: Sequence[int], offers: Mapping[int, Sequence[int]], sizes: Sequence[int],
          pack: Callable[[int], Bundle], install: Callable[[int, Bundle], None]) -> Moved:
    """Collective: gives each rank its `wanted` layers from those that offer them. `pack(layer)`: on the source;
    `install`: on the target, once the bytes are the source's. Layers that came damaged are fetched again from
    another rank. Returns when all have all. Raises RuntimeError when nobody gives a layer undamaged."""
    rank = dist.get_rank()
    bad: frozenset[tuple[int, int]] = frozenset()
    missing = [(r, layer) for r, each in enumerate(gather(list(wanted))) for layer in each]
    moved = Moved()
    while missing:
        plan = moves(missing, offers, bad, sizes)
        failed, size = _round(plan, rank, pack, install)
        told = gather((failed, size))
        moved.bytes += sum(each for _, each in told)
        moved.layers += len(plan) - sum(len(each) for each, _ in told)
        bad |= {(move.source, move.layer) for each, _ in told for move in each}
        missing = [(move.target, move.layer) for each, _ in told for move in each]
    return moved


def send(bundle: Bundle, target: int, tag: int) -> list[tuple[Any, torch.Tensor]]:
    """A layer's state sets off, under three tags; whoever waits for what is returned knows that it is gone."""
    head = torch.tensor([len(bundle.table), bundle.payload.numel(), bundle.checksum], dtype=torch.int64)
    table = torch.frombuffer(bytearray(bundle.table), dtype=torch.uint8)
    return [(dist.isend(piece, target, tag=tag + i), piece)
            for i, piece in enumerate((head, table, bundle.payload)) if piece.numel()]


class Arrival:
    """A layer's state on its way to this rank."""

    def __init__(self, source: int, tag: int) -> None:
        self._source, self._tag = source, tag
        self._head = torch.empty(3, dtype=torch.int64)
        self._table = self._payload = self._head
        self._checksum = 0
        self._waits: list[Any] = [dist.irecv(self._head, source, tag=tag)]

    def open(self) -> None:
        """Waits until the source has begun, and makes room for it."""
        self._waits.pop().wait()
        table_bytes, payload_bytes, self._checksum = self._head.tolist()
        self._table, self._payload = (torch.empty(n, dtype=torch.uint8) for n in (table_bytes, payload_bytes))
        self._waits = [dist.irecv(piece, self._source, tag=self._tag + i)
                       for i, piece in ((1, self._table), (2, self._payload)) if piece.numel()]

    def take(self) -> tuple[Bundle, bool]:
        """Waits for all of it; whether the bytes are the source's."""
        for wait in self._waits:
            wait.wait()
        bundle = Bundle(self._table.numpy().tobytes(), self._payload)
        return bundle, bundle.checksum == self._checksum


def _round(plan: Sequence[Move], rank: int, pack: Callable[[int], Bundle],
           install: Callable[[int, Bundle], None]) -> tuple[list[Move], int]:
    packed: dict[int, Bundle] = {}
    works: list[tuple[Any, torch.Tensor]] = []
    coming: list[tuple[Move, Arrival]] = []
    for number, move in enumerate(plan):
        tag = TAG_STATE + 3 * number
        if move.source == rank and move.layer not in packed:
            packed[move.layer] = pack(move.layer)
        if move.source == rank and move.target != rank:
            works += send(packed[move.layer], move.target, tag)
        elif move.target == rank and move.source != rank:
            coming.append((move, Arrival(move.source, tag)))
    for _, arrival in coming:
        arrival.open()
    failed: list[Move] = []
    size = 0
    for move, arrival in coming:
        bundle, whole = arrival.take()
        size += bundle.payload.numel()
        if whole:
            install(move.layer, bundle)
        else:
            failed.append(move)
    for move in plan:
        if move.source == move.target == rank:
            install(move.layer, packed[move.layer])
    for work, _ in works:
        work.wait()
    return failed, size
