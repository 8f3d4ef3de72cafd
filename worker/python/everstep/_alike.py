"""Whether every rank holds the same tensors, and so whether each need capture its share of them only.

    rank 0  digest ──┐                        ┌──► rank 0
    rank 1  digest ──┼──► rank 0 compares ────┼──► rank 1      the same; or whose, and of which tensor
    rank 2  digest ──┘                        └──► rank 2

Every rank asks at the same steps, through the store of the process group, and all hear the same answer. A digest goes
over names, dtypes, shapes and the CRC32C of every byte: one read of the whole state, so it is made at a start and
every PERIOD steps, not at each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch

from everstep._attach import number
from everstep._library import checksum

PERIOD = 32  # steps between two looks
LEAST_BYTES = 16 << 20  # of a state: under it whole copies cost too little for what they survive
_WAIT = timedelta(seconds=60)  # for the other ranks, which are at the same step


class Mark(NamedTuple):
    """One tensor, for comparison with another rank's."""

    path: str
    kind: str  # dtype and shape
    crc: int


class Sameness:
    """What `replicated="auto"` comes to at each step; every rank comes to the same.

    Where ranks differ, or do not come to compare, it is not asked again: whole states from then on.
    """

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._looked = -1  # in which period
        self._layout: list[tuple[str, str]] = []  # of the tensors that were found to be the same
        self._over = world == 1
        self.same: bool | None = None  # None: not known
        self.why = ""  # whole states are captured

    def due(self, n: int) -> bool:
        """At step `n` it is to be looked at (again)."""
        return not self._over and n // PERIOD != self._looked

    def look(self, n: int, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Finds out whether `tensors` are the same on every rank, and worth a division. A collective call: every
        rank makes it at `n`."""
        self._looked = n // PERIOD
        self._layout = []
        if number("GROUP_WORLD_SIZE", 1) > 1 and number("EVERSTEP_HOLDERS", 1) < 2:
            self._over = True
            self.why = "without copies on other nodes a lost node takes its shares along, and whole states stay"
            return
        try:
            self.why = _differs(_store(), f"everstep/alike/{number('EVERSTEP_GENERATION', 0)}/{n}", self._rank,
                                self._world, marks(tensors))
        except (RuntimeError, OSError) as error:  # torch.distributed's are of the first kind
            self.why, self.same, self._over = f"the ranks could not compare what they hold: {error}", None, True
            return
        self.same = not self.why
        self._over = not self.same
        if self.same:
            size = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
            if size < LEAST_BYTES:
                self.why = f"{size} bytes of parameters and optimizer state are under {LEAST_BYTES}"
            else:
                self._layout = _layout(tensors)

    def divides(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> bool:
        """`tensors` are captured in shares: they are those that look() found to be the same, values aside."""
        return bool(self._layout) and self._layout == _layout(tensors)


def marks(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Mark]:
    """Each tensor's mark, sorted by path."""
    crc = checksum()
    out = []
    for path, tensor in tensors:
        flat = tensor.detach()
        if flat.is_conj() or flat.is_neg():
            flat = flat.resolve_conj().resolve_neg()
        flat = flat.cpu().contiguous()
        out.append(Mark(path, _kind(tensor), crc(0, flat.data_ptr(), flat.numel() * flat.element_size())))
    return sorted(out)


def _layout(tensors: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, str]]:
    return [(path, _kind(tensor)) for path, tensor in tensors]


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _store() -> Any:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed has no process group")
    return dist.distributed_c10d._get_default_store()


def _differs(store: Any, key: str, rank: int, world: int, mine: list[Mark]) -> str:
    """"": every rank called with the same marks; else who differs from rank 0 in what, the same text on every rank.

    Raises RuntimeError when a rank did not come.
    """
    digest = hashlib.blake2b(json.dumps(mine).encode(), digest_size=16).hexdigest()
    store.set(f"{key}/{rank}", digest)
    if rank == 0:
        others = [f"{key}/{other}" for other in range(1, world)]
        store.wait(others, _WAIT)
        odd = next((i for i, other in enumerate(others, 1) if store.get(other).decode() != digest), 0)
        store.set(f"{key}/odd", str(odd))
    store.wait([f"{key}/odd"], _WAIT)
    odd = int(store.get(f"{key}/odd"))
    if odd == 0:
        return ""
    if rank == odd:
        store.set(f"{key}/marks", json.dumps(mine))
    if rank == 0:
        store.wait([f"{key}/marks"], _WAIT)
        theirs = [Mark(*mark) for mark in json.loads(store.get(f"{key}/marks"))]
        store.set(f"{key}/why", _first_difference(mine, theirs, odd))
    store.wait([f"{key}/why"], _WAIT)
    return str(store.get(f"{key}/why").decode())


def _first_difference(mine: list[Mark], theirs: list[Mark], odd: int) -> str:
    ours, other = {m.path: m for m in mine}, {m.path: m for m in theirs}
    for path in sorted(set(ours) | set(other)):
        a, b = ours.get(path), other.get(path)
        if a is None or b is None:
            return f"{path} is on one of the ranks 0 and {odd} only"
        if a.kind != b.kind:
            return f"{path} is {a.kind} on rank 0 and {b.kind} on rank {odd}"
        if a.crc != b.crc:
            return f"{path} has other values on rank {odd} than on rank 0"
    return f"rank {odd} holds what rank 0 does not"
