"""Sums a layer's gradient over the ranks that hold the layer.

Each of q holders owns one of q slices of the flat gradient. start() sends every holder its slice of what this rank
has, as soon as the layer's last backward pass is done; meanwhile earlier layers go on with theirs. finish() adds up
what came for the own slice, in an order that does not depend on who sent it, and hands the sum to the others. So all
holders end with the same bits, and each sends 2 (q - 1) / q of the gradient (more where it has several tree nodes).

    holder 0  [ own | -> 1 | -> 2 ]      sum of own slices     [ own | <- 1 | <- 2 ]
    holder 1  [ -> 0 | own | -> 2 ]  ->  from all holders  ->  [ <- 0 | own | <- 2 ]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from everstep.pipeline._layer import Gradient, Layer, Tie
from everstep.pipeline._tree import Node, Tree

# Tags of point-to-point messages: a kind, then what tells messages of that kind apart.
TAG_PARTS, TAG_SUMS, TAG_TIES = 1 << 24, 2 << 24, 3 << 24
_PER_LAYER = 1 << 11  # messages between two ranks for one layer


class Exchange:
    """One layer, one step. REQUIRES that all holders make one with the same arguments."""

    def __init__(self, gradient: Gradient, rank: int, holders: Sequence[tuple[int, Sequence[Node]]],
                 microbatches: int | None) -> None:
        """`holders`: (rank, the nodes it will have), each rank once, in the same order everywhere.
        `microbatches`: of the tree; None: each has one sum, which are added in the holders' order."""
        self._gradient = gradient
        self._layer = layer = gradient.layer
        self._holders = holders
        self._leaves = microbatches
        count = len(holders)
        self._bounds = [layer.size * i // count for i in range(count + 1)]
        self._me = next(i for i, (holder, _) in enumerate(holders) if holder == rank)
        self._sends: list[tuple[Any, torch.Tensor]] = []
        self._waits: list[Any] = []
        self._came: dict[int, list[torch.Tensor]] = {}
        self._own: list[tuple[Node, torch.Tensor]] = []
        self.total: torch.Tensor | None = None

    def _slice(self, flat: torch.Tensor, i: int) -> torch.Tensor:
        return flat[self._bounds[i]:self._bounds[i + 1]]

    def _tag(self, kind: int, number: int) -> int:
        return kind + self._layer.index * _PER_LAYER + number

    def start(self, parts: list[tuple[Node, torch.Tensor]]) -> None:
        """`parts`: what this rank has; must not change until finish() has returned."""
        self._own = parts
        mine = self._bounds[self._me + 1] - self._bounds[self._me]
        for i, (rank, nodes) in enumerate(self._holders):
            if i == self._me:
                continue
            if mine:
                self._came[i] = [self._gradient.room((i, k), mine) for k in range(len(nodes))]
                self._waits += [dist.irecv(buffer, rank, tag=self._tag(TAG_PARTS, k))
                                for k, buffer in enumerate(self._came[i])]
            if self._bounds[i + 1] > self._bounds[i]:
                for k, (_, flat) in enumerate(parts):
                    piece = self._slice(flat, i)
                    self._sends.append((dist.isend(piece, rank, tag=self._tag(TAG_PARTS, k)), piece))

    def add_up(self) -> None:
        """Waits for what the others have of the own slice, and sends them its sum."""
        for work in self._waits:
            work.wait()
        self._waits.clear()
        if len(self._holders) == 1:
            ((_, self.total),) = self._own  # all microbatches, so one node
            return
        total = self._gradient.room((-1, 0), self._layer.size)
        own = self._slice(total, self._me)
        if own.numel():
            self._sum(own)
        for i, (rank, _) in enumerate(self._holders):
            if i == self._me:
                continue
            piece = self._slice(total, self._me)
            if piece.numel():
                self._sends.append((dist.isend(piece, rank, tag=self._tag(TAG_SUMS, 0)), piece))
            piece = self._slice(total, i)
            if piece.numel():
                self._waits.append(dist.irecv(piece, rank, tag=self._tag(TAG_SUMS, 0)))
        self.total = total

    def _sum(self, out: torch.Tensor) -> None:
        by_holder = [self._came.get(i, []) for i in range(len(self._holders))]
        by_holder[self._me] = [self._slice(flat, self._me) for _, flat in self._own]
        if self._leaves is None:
            first, second, *more = [flat for (flat,) in by_holder]
            torch.add(first, second, out=out)
            for flat in more:
                out.add_(flat)
            return
        tree: Tree[torch.Tensor] = Tree(self._leaves, torch.add)
        for (_, nodes), flats in zip(self._holders, by_holder):
            for node, flat in zip(nodes, flats):
                tree.put(node, flat)
        out.copy_(tree.total)

    def finish(self) -> torch.Tensor:
        """The whole sum. Once all layers have been through add_up()."""
        for work in self._waits:
            work.wait()
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        assert self.total is not None
        return self.total


def sum_ties(ties: Sequence[Tie], layers: Mapping[int, Layer], totals: Mapping[int, torch.Tensor], rank: int,
             holder: Callable[[int], int]) -> None:
    """Makes the gradients of tied parameters their sum, in `totals`, on every rank that holds one of them.
    `holder`: the rank that has a layer in this rank's pipeline, which has each layer once."""
    works: list[tuple[Any, torch.Tensor]] = []
    pieces: list[dict[int, torch.Tensor]] = []
    for number, tie in enumerate(ties):
        here = {index: name for index, name in tie.members if index in layers}
        ranks = {holder(index) for index, _ in tie.members}
        have: dict[int, torch.Tensor] = {}
        pieces.append(have)
        if not here:
            continue
        shape_of = layers[next(iter(here))]
        begin, end = shape_of.offsets[next(iter(here.values()))]
        for place, (index, name) in enumerate(tie.members):
            tag = TAG_TIES + number * 64 + place
            if index in layers:
                first, last = layers[index].offsets[name]
                have[index] = totals[index][first:last].clone()
                works += [(dist.isend(have[index], other, tag=tag), have[index])
                          for other in sorted(ranks - {rank})]
            else:
                have[index] = torch.empty(end - begin, dtype=totals[shape_of.index].dtype)
                works.append((dist.irecv(have[index], holder(index), tag=tag), have[index]))
    for work, _ in works:
        work.wait()
    for tie, have in zip(ties, pieces):
        if not have:
            continue
        summed = have[tie.members[0][0]].clone()
        for index, _ in tie.members[1:]:
            summed.add_(have[index])
        for index, name in tie.members:
            if index in layers:
                first, last = layers[index].offsets[name]
                totals[index][first:last].copy_(summed)
