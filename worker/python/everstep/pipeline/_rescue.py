"""What outlives a step that was broken off: the gradients of pipelines that lost nobody.

A pipeline whose ranks are all there and have done all their backward passes need not do them again. Its ranks keep
what they have added up; under the new plan that is given to ranks which hold the layers then, and only the other
microbatches are divided among the new pipelines. With trees of microbatches (deterministic=True) the bits are those
of a step that nothing happened to.

    before  pipeline A: 0 .. 3, one rank dies      pipeline B: 4 .. 5, done
    after   the new pipelines: 0 .. 3              B's sums are added where its layers lie now
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from everstep.pipeline._agree import Layout, Status
from everstep.pipeline._layer import Layer
from everstep.pipeline._tree import Node, nodes_of

TAG_RESCUE = 7 << 24
Parts = list[tuple[Node, torch.Tensor]]


@dataclass(frozen=True)
class Rescue:
    """Of one step, by pipelines of the layout before; the same on every rank but for what this rank has."""

    step: int = -1
    leaves: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # pipeline -> its microbatches
    owners: Mapping[tuple[int, int], int] = field(default_factory=dict)  # (pipeline, layer) -> rank that has it now
    parts: Mapping[int, Parts] = field(default_factory=dict)  # layer -> what this rank has
    losses: Mapping[int, float] = field(default_factory=dict)  # of this rank, for the vote
    used: Mapping[int, int] = field(default_factory=dict)  # likewise, of samples
    epoch: int = -1  # of the layout before

    @property
    def done(self) -> frozenset[int]:
        """Microbatches that nobody does again."""
        return frozenset(i for each in self.leaves.values() for i in each)

    def of(self, layer: int, rank: int) -> list[int]:
        """Microbatches of `layer` whose sums this rank has."""
        return [i for pipeline, each in self.leaves.items() if self.owners[pipeline, layer] == rank for i in each]


NOTHING = Rescue()


def whole_pipelines(statuses: Sequence[Status], step: int) -> dict[int, tuple[int, ...]]:
    """Pipeline -> ranks by stage, of those that are all there and have done their part of `step`."""
    epoch = _epoch(statuses)
    found: dict[int, dict[int, int]] = {}
    stages: dict[int, int] = {}
    for rank, status in enumerate(statuses):
        done = status.complete
        if done is not None and done.step == step and done.epoch == epoch:
            found.setdefault(done.pipeline, {})[done.stage] = rank
            stages[done.pipeline] = done.stages
    return {p: tuple(by_stage[i] for i in range(stages[p])) for p, by_stage in sorted(found.items())
            if len(by_stage) == stages[p]}


def _epoch(statuses: Sequence[Status]) -> int:
    return max((s.record.epoch for s in statuses if s.record is not None), default=-1)


def divide(layout: Layout, microbatches: int, done: frozenset[int]) -> list[list[int]]:
    """By pipeline, what is left to do of a step: in the plan's proportions, in order."""
    left = [i for i in range(microbatches) if i not in done]
    ends = [round(len(left) * end / microbatches) for _, end in layout.parts]
    return [left[begin:end] for begin, end in zip([0, *ends], ends)]


def take(statuses: Sequence[Status], step: int, layout: Layout, layers: Mapping[int, Layer], rank: int, own: Rescue,
         microbatches: int | None) -> Rescue:
    """Collective: what is rescued of `step` under the new layout. `layers`: of this rank's place; `own`: what it kept
    of its own pipeline (parts, losses, used); `microbatches`: of the tree, None: no tree."""
    pipelines = whole_pipelines(statuses, step)
    leaves: dict[int, tuple[int, ...]] = {}
    owners: dict[tuple[int, int], int] = {}
    works: list[tuple[Any, torch.Tensor]] = []
    parts: dict[int, Parts] = {}
    number = 0
    for pipeline, ranks in pipelines.items():
        for stage, source in enumerate(ranks):
            done = statuses[source].complete
            assert done is not None
            leaves[pipeline] = done.leaves
            nodes = [(-1, 0)] if microbatches is None else nodes_of(done.leaves, microbatches)
            for layer in range(*done.layers):
                holders = [layout.holder(p, layer) for p in range(len(layout.ranks))]
                owner = source if source in holders else holders[(pipeline + stage) % len(holders)]
                owners[pipeline, layer] = owner
                number += 1
                if rank not in (source, owner):
                    continue
                tag = TAG_RESCUE + number * 64
                if rank == source == owner:
                    parts.setdefault(layer, []).extend(own.parts.get(layer, []))
                elif rank == source:
                    works += [(dist.isend(flat, owner, tag=tag + k), flat)
                              for k, (_, flat) in enumerate(own.parts.get(layer, []))]
                elif layers[layer].parameters:
                    came = [(node, layers[layer].empty()) for node in nodes]
                    works += [(dist.irecv(flat, source, tag=tag + k), flat) for k, (_, flat) in enumerate(came)]
                    parts.setdefault(layer, []).extend(came)
    for work, _ in works:
        work.wait()
    if not leaves:
        return NOTHING
    kept = own if any(rank in ranks for ranks in pipelines.values()) else NOTHING
    return Rescue(step, leaves, owners, parts, kept.losses, kept.used, _epoch(statuses))
