"""A state that N ranks captured, for one rank of a world of another size or layout. Pure: tables in, ranges out.

    tables of the N shards ──┐
                             ├─ reshard() ──► the table of this rank's state, and for each of its bytes: from
    this rank's own tensors ─┘                which shard, from where in it, to where in the new state

What is sharded (a DTensor's part, a share) is put together from whoever holds a part of it; its layout is that of
this rank's own tensor of that name, an optimizer's state lies as its parameter does. What is whole is the same on
every rank and comes from the cheapest one, beside shares from `ancestor()`. Numbers, strings and random streams come
from `ancestor()`. Every shard must describe the same state: a shape or dtype that differs between ranks is an error
that names it.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from everstep._state import RNG, unwrap
from everstep._table import ALIGNMENT, FORMAT, SHARE, is_sharded, itemsize, region

LOCAL, PEER, FILE = 0, 1, 2  # where a shard's bytes come from, cheapest first


@dataclass(frozen=True)
class Shard:
    """One rank's part of the step that is restored."""

    rank: int
    tier: int
    payload_bytes: int
    table: bytes


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it begins and how much of it there is, by dimension."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    def meet(self, other: Box) -> Box | None:
        """What both have; None: nothing."""
        begins = tuple(map(max, self.offsets, other.offsets))
        lengths = tuple(min(a + m, b + n) - begin for a, m, b, n, begin in
                        zip(self.offsets, self.lengths, other.offsets, other.lengths, begins))
        return Box(begins, lengths) if all(n > 0 for n in lengths) else None

    @property
    def elements(self) -> int:
        return math.prod(self.lengths)


class Range(NamedTuple):
    """`times` runs of `size` bytes, from a shard into the new state (everstep_range of everstep.h)."""

    rank: int
    times: int
    source: int
    source_stride: int
    dest: int
    dest_stride: int
    size: int


@dataclass
class Resharded:
    """What this rank asks for."""

    ranges: list[Range] = field(default_factory=list)
    data_bytes: int = 0  # of the new state, without its table; a multiple of ALIGNMENT
    table: bytes = b""


_CATALOG = struct.Struct("<8sIIqQ")  # magic, version, shards, step, generation
_ENTRY = struct.Struct("<iIQQQ")  # rank, tier, payload bytes, where its table lies, how long it is


def read_catalog(payload: memoryview) -> list[Shard]:
    """The shards of one step, by rank, as the agent lists them (docs/internals/arena.md). Raises ValueError."""
    magic, version, count, _, _ = _CATALOG.unpack_from(payload)
    if magic != b"EVSCATLG" or version != 1:
        raise ValueError(f"a catalog of shards of version {version}; use the package and the agent of one release")
    shards = []
    for i in range(count):
        rank, tier, payload_bytes, at, size = _ENTRY.unpack_from(payload, _CATALOG.size + i * _ENTRY.size)
        if rank != i or at + size > len(payload):
            raise ValueError(f"a catalog of shards: entry {i} is of rank {rank}, {size} bytes at {at} of "
                             f"{len(payload)}")
        shards.append(Shard(rank, tier, payload_bytes, bytes(payload[at:at + size])))
    return shards


def ancestor(rank: int, world: int) -> int:
    """The rank of the old world whose numbers, strings and random streams a new rank takes."""
    return rank % world


def runs(part: Box, source: Box, dest: Box, size: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    """How `part` lies in two row-major arrays that hold `source` and `dest` of the same tensor.

    Yields (count, source, source_stride, dest, dest_stride, size) in bytes, `size` being an element's.
    """
    dims = len(part.lengths)
    strides_of = [[0] * dims, [0] * dims]
    for strides, box in zip(strides_of, (source, dest)):
        step = size
        for d in reversed(range(dims)):
            strides[d] = step
            step *= box.lengths[d]
    whole = dims  # dimensions from here on lie in one run: all but the first of them are whole in both
    run = size
    while whole > 0:
        whole -= 1
        run *= part.lengths[whole]
        if part.lengths[whole] != source.lengths[whole] or part.lengths[whole] != dest.lengths[whole]:
            break
    begins = [sum((p - b) * s for p, b, s in zip(part.offsets, box.offsets, strides))
              for box, strides in zip((source, dest), strides_of)]
    outer = range(whole)
    if whole == 0:
        yield 1, begins[0], 0, begins[1], 0, run
        return
    count = part.lengths[whole - 1]
    for index in itertools.product(*(range(part.lengths[d]) for d in outer[:-1])):
        at = [begin + sum(i * s for i, s in zip(index, strides)) for begin, strides in zip(begins, strides_of)]
        yield count, at[0], strides_of[0][whole - 1], at[1], strides_of[1][whole - 1], run


class _Leaf:
    """A tensor or array of the state, in every shard."""

    __slots__ = ("bodies", "kind", "path")

    def __init__(self, path: str, kind: str, bodies: list[list[Any]]) -> None:
        self.path, self.kind, self.bodies = path, kind, bodies  # by rank

    def sharded(self) -> bool:
        return len(self.bodies[0]) > 3

    def shared(self) -> bool:
        return self.sharded() and self.bodies[0][3]["placements"] == SHARE

    def piece(self, mine: int) -> tuple[Any, ...] | None:
        """What names its memory, as rank `mine` has it: the same for tied tensors. None: it has none."""
        ranks = range(len(self.bodies)) if self.shared() else (mine,)
        lies = tuple((self.bodies[r][2], math.prod(self.bodies[r][1])) for r in ranks)
        return lies if any(n for _, n in lies) else None

    def whole(self, rank: int) -> list[int]:
        body = self.bodies[rank]
        return list(body[3]["global"]) if len(body) > 3 else list(body[1])

    def described(self, rank: int) -> str:
        body = self.bodies[rank]
        return f"{'a part of ' if len(body) > 3 else ''}{body[0]} {tuple(self.whole(rank))}"

    def box(self, rank: int) -> Box:
        body = self.bodies[rank]
        if len(body) <= 3:
            return Box((0,) * len(body[1]), tuple(body[1]))
        offsets = body[3].get("offsets")
        if offsets is None:
            raise RuntimeError(f"{self.path}: rank {rank} captured a part with placements {body[3]['placements']}, "
                               "whose place in the whole is not known; only as many ranks as captured it can "
                               "restore it")
        return Box(tuple(offsets), tuple(body[1]))


class _Drift(RuntimeError):
    def __init__(self, path: str, one: int, other: int, what: str) -> None:
        super().__init__(f"{path or 'state'}: rank {one} and rank {other} captured {what}; ranks of one step must "
                         "hold the same state to be restored in shares or by another number of ranks")


def _walk(nodes: Sequence[Any], path: str, mine: int) -> Iterator[tuple[Any, _Leaf]]:
    """Every leaf of the tree of rank `mine`, with what the same place of the other trees holds."""
    node = nodes[mine]
    if not isinstance(node, dict):
        return
    (tag, body), = node.items()
    for rank, other in enumerate(nodes):
        if not isinstance(other, dict) or set(other) != {tag}:
            raise _Drift(path, mine, rank, "other kinds of value")
    if tag in ("T", "N", "n"):
        leaf = _Leaf(path, tag, [n[tag] for n in nodes])
        for rank, theirs in enumerate(leaf.bodies):
            ours = leaf.bodies[mine]
            if (theirs[0], leaf.whole(rank), len(theirs)) != (ours[0], leaf.whole(mine), len(ours)):
                raise _Drift(path, mine, rank, f"{leaf.described(mine)} and {leaf.described(rank)}")
        yield node, leaf
    elif tag in ("d", "o", "C"):
        theirs = [{json.dumps(k): v for k, v in n[tag]} for n in nodes]
        for rank, items in enumerate(theirs):
            if set(items) != set(theirs[mine]):
                odd = sorted(set(items) ^ set(theirs[mine]))
                raise _Drift(path, mine, rank, f"{', '.join(odd[:5])} on one of them only")
        for key, _ in body:
            name = json.dumps(key)
            below = f"{path}[{key!r}]" if path else str(key)
            yield from _walk([items[name] for items in theirs], below, mine)
    elif tag in ("l", "t"):
        for rank, n in enumerate(nodes):
            if len(n[tag]) != len(body):
                raise _Drift(path, mine, rank, f"{len(body)} and {len(n[tag])} items")
        for i in range(len(body)):
            yield from _walk([n[tag][i] for n in nodes], f"{path}[{i}]", mine)


def wanted(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Own tensors that are parts of larger ones, by path; of an optimizer, its parameters by their number."""
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        target = unwrap(value)
        if isinstance(target, torch.nn.Module):
            for key, tensor in target.state_dict().items():
                if isinstance(tensor, torch.Tensor):
                    out[f"{name}[{key!r}]"] = tensor
        elif isinstance(target, torch.optim.Optimizer):
            number = 0
            for group in target.param_groups:
                for parameter in group["params"]:
                    out.setdefault(f"{name}['state'][{number}]", parameter)
                    number += 1
        elif isinstance(target, torch.Tensor):
            out[name] = target
    return out


def _own(leaf: _Leaf, mine: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The tensor of this rank that says how the leaf is to lie; None: as a whole."""
    path = leaf.path
    if path in mine:
        return mine[path]
    parameter = mine.get(path[:path.rfind("[")])  # of optimizer['state'][3]['exp_avg']
    if parameter is not None and list(parameter.shape) == leaf.whole(0) and leaf.whole(0):
        return parameter
    return None


class _Builder:
    def __init__(self, shards: Sequence[Shard], rank: int, whole_from: int | None) -> None:
        self._shards, self._rank = shards, rank
        self._whole_from = whole_from  # the shard that whole tensors come from; None: the cheapest
        self._load = [0] * len(shards)  # bytes taken from each so far
        self._placed: dict[tuple[Any, ...], int] = {}  # _Leaf.piece -> new offset
        self.out = Resharded()

    def place(self, size: int, key: tuple[Any, ...] | None) -> tuple[int, bool]:
        """Where `size` bytes go, and whether they are new."""
        if size == 0:
            return 0, False
        if key is not None and key in self._placed:
            return self._placed[key], False
        at = -(-self.out.data_bytes // ALIGNMENT) * ALIGNMENT
        self.out.data_bytes = at + size
        if key is not None:
            self._placed[key] = at
        return at, True

    def _cheapest(self, ranks: Sequence[int]) -> int:
        """Whose bytes to take that all of `ranks` have: the nearest's, the least loaded's, the next one's in turn."""
        world = len(self._shards)
        return min(ranks, key=lambda r: (self._shards[r].tier, self._load[r], (r - self._rank) % world))

    def fill(self, leaf: _Leaf, want: Box, at: int) -> None:
        """Ranges for every byte of `want`, once each."""
        size = itemsize(leaf.kind, leaf.bodies[0][0])
        holders: dict[Box, list[int]] = {}
        for rank in range(len(self._shards)):
            holders.setdefault(leaf.box(rank), []).append(rank)
        found = 0
        for box, ranks in holders.items():
            part = want.meet(box)
            if part is None:
                continue
            found += part.elements
            source = self._cheapest(ranks) if leaf.sharded() or self._whole_from is None else self._whole_from
            self._load[source] += part.elements * size
            base = leaf.bodies[source][2]
            for count, begin, stride, to, to_stride, run in runs(part, box, want, size):
                self.out.ranges.append(Range(source, count, base + begin, stride, at + to, to_stride, run))
        if found != want.elements:
            raise RuntimeError(f"{leaf.path}: the {len(self._shards)} shards hold {found} of the {want.elements} "
                               f"elements at {want.offsets} that rank {self._rank} wants"
                               + ("; parts overlap" if found > want.elements else ""))


def reshard(shards: Sequence[Shard], state: Mapping[str, Any], rank: int, alike: bool = True) -> Resharded:
    """What rank `rank` of another world takes from `shards` (by rank, all of one step) for `state`.

    `alike`: whole tensors are the same on every rank.
    Raises RuntimeError, with the path, when the shards do not describe one state, or not this one.
    """
    documents = [json.loads(s.table) for s in shards]
    for shard, document in zip(shards, documents):
        if document.get("format") != FORMAT:
            raise RuntimeError(f"the state of rank {shard.rank} has a table of format {document.get('format')!r}, "
                               f"this release reads {FORMAT}")
    mine = ancestor(rank, len(shards))
    own = wanted(state)
    alike = alike and all(document["meta"].get("alike", True) for document in documents)
    # Of a state in shares each rank keeps whole what may differ a little, a buffer say: its own is the right one.
    builder = _Builder(shards, rank, mine if any(map(is_shared, shards)) else None)
    document = documents[mine]
    for name, *nodes in _entries(documents, mine):
        # Random streams differ by rank, sizes too (numpy may be imported in some).
        trees, first = (nodes, mine) if name != RNG else ([nodes[mine]], 0)
        for node, leaf in _walk(trees, name, first):
            body = node[leaf.kind]
            tensor = _own(leaf, own) if name != RNG else None
            want = Box((0,) * len(leaf.whole(0)), tuple(leaf.whole(0)))
            new: list[Any] = [body[0], list(want.lengths), 0]
            if tensor is not None and leaf.path in own \
                    and (list(tensor.shape), str(tensor.dtype)) != (leaf.whole(0), f"torch.{body[0]}"):
                raise RuntimeError(f"{leaf.path}: the checkpoint holds {body[0]} {tuple(leaf.whole(0))}, this rank "
                                   f"has {tensor.dtype} {tuple(tensor.shape)}; the model has changed")
            if not alike and name != RNG and not leaf.sharded() and math.prod(body[1]) > 1:
                raise RuntimeError(f"{leaf.path}: captured with replicated=False, or found to differ, so that "
                                   f"each of the {len(shards)} ranks may hold another tensor there; start "
                                   f"{len(shards)} ranks, or keep what is divided as DTensors")
            if tensor is not None and is_sharded(tensor):
                described = region(tensor)
                if described.get("offsets") is None:
                    raise RuntimeError(f"{leaf.path}: this rank holds a part with placements "
                                       f"{described['placements']}, whose place in the whole is not known")
                local: Any = tensor
                want = Box(tuple(described["offsets"]), tuple(local.to_local().shape))
                new = [body[0], list(want.lengths), 0, described]
            elif tensor is None and leaf.sharded() and not leaf.shared():
                raise RuntimeError(f"{leaf.path}: {len(shards)} ranks captured parts of it, and this rank has no "
                                   "tensor of "
                                   "that name and shape; a sharded tensor outside of a model or an optimizer cannot "
                                   "be put back")
            size = want.elements * itemsize(leaf.kind, body[0])
            new[2], fresh = builder.place(size, leaf.piece(mine if name != RNG else 0))
            if fresh and name == RNG:
                builder.out.ranges.append(Range(mine, 1, body[2], 0, new[2], 0, size))
            elif fresh:
                builder.fill(leaf, want, new[2])
            node[leaf.kind] = new
    out = builder.out
    out.data_bytes = -(-out.data_bytes // ALIGNMENT) * ALIGNMENT
    if rank >= len(shards):
        document["meta"]["streams_of"] = mine  # random streams of another rank: new ones are drawn from them
    out.table = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    return out


def is_divided(shard: Shard) -> bool:
    """Some tensor of it is a part of a larger one."""
    return b'"placements"' in shard.table


def is_shared(shard: Shard) -> bool:
    """It is one rank's share of a state that is the same on every rank."""
    return b'"placements":["share"]' in shard.table


def assemble(part: Resharded, payloads: Sequence[memoryview]) -> memoryview:
    """The new state's bytes, without its table, from the payloads of all shards: what an agent does for a client."""
    out = memoryview(bytearray(part.data_bytes))
    for r in part.ranges:
        for i in range(r.times):
            source, dest = r.source + i * r.source_stride, r.dest + i * r.dest_stride
            out[dest:dest + r.size] = payloads[r.rank][source:source + r.size]
    return out


def _entries(documents: Sequence[Any], mine: int) -> Iterator[tuple[Any, ...]]:
    """Of each name of the state: the name, and its node in every document."""
    roots = [dict(d["root"]["d"]) for d in documents]
    for rank, root in enumerate(roots):
        if set(root) - {RNG} != set(roots[mine]) - {RNG}:
            odd = sorted((set(root) ^ set(roots[mine])) - {RNG})
            raise _Drift("", mine, rank, f"{', '.join(odd[:5])} on one of them only")
    for name, _ in documents[mine]["root"]["d"]:
        yield name, *(root.get(name) for root in roots)
