"""Layers reach the ranks that a new plan gives them to while the plan before still trains.

A copy of a layer is of no use a step later, since every step changes it. So it sets off at the beginning of a step,
whose forward and backward passes change nothing, and the step's gradient follows it: whoever has the layer then takes
the same step with it as its holders do. From there on a gradient a step keeps it as new as theirs.

    step    holders, by the plan before                       a rank that will hold layers 4 and 5
     s      copy 4 ->   forward, backward, sums   gradient 4 ->        receives 4;  steps with 4
     s+1    copy 5 ->   forward, backward, sums   gradients 4, 5 ->    receives 5;  steps with 4 and 5
     s+2    the new plan takes effect, and nothing is left to move

Nobody waits for these bytes before the end of the step that they travel beside; a wave is what a step has time for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from everstep.pipeline._agree import Layout, Move
from everstep.pipeline._layer import Bundle, Layer
from everstep.pipeline._switch import Arrival, send

TAG_FILL, TAG_FOLLOW = 8 << 24, 9 << 24
_AT_ONCE = 0.1  # of a step: what takes no longer moves between two steps
_BESIDE = 0.5  # of a step: so long a wave may take


def most(moves: Sequence[Move], sizes: Sequence[int]) -> int:
    """Bytes that the busiest rank sends or receives."""
    load: Counter[tuple[str, int]] = Counter()
    for move in moves:
        load["sends", move.source] += sizes[move.layer]
        load["receives", move.target] += sizes[move.layer]
    return max(load.values(), default=0)


def waves(moves: Sequence[Move], sizes: Sequence[int], seconds: float, rate: float) -> list[list[Move]]:
    """The moves of one step after the other, of steps that usually take `seconds`; `rate`: bytes a second of a rank's
    link. Empty: they take too little time to bother. A layer that is larger than a step has time for goes alone."""
    if not moves or most(moves, sizes) <= rate * seconds * _AT_ONCE:
        return []
    out: list[list[Move]] = []
    for move in moves:
        for wave in out:
            if most([*wave, move], sizes) <= rate * seconds * _BESIDE:
                wave.append(move)
                break
        else:
            out.append([move])
    return out


class Fill:
    """From one plan to the next. REQUIRES that all ranks make one of the same arguments and call the same methods."""

    def __init__(self, waves: Sequence[Sequence[Move]], epoch: int, before: Layout, after: Layout, rank: int,
                 build: Callable[[int], Layer]) -> None:
        """`epoch`: of the plan `before`, which trains meanwhile; `build(layer)`: one with a fresh optimizer."""
        self.epoch = epoch
        self.before, self.after = before, after
        self._left = list(waves)
        self._rank = rank
        self._build = build
        self._following: list[Move] = []  # of all ranks
        self._mine: dict[int, Layer] = {}  # what this rank follows
        self._damaged: set[int] = set()
        self._sends: list[tuple[Any, torch.Tensor]] = []
        self._coming: list[tuple[int, Arrival]] = []

    @property
    def left(self) -> int:
        """Steps that waves are to travel beside."""
        return len(self._left)

    @property
    def over(self) -> bool:
        """Everything is where the new plan wants it, but for what came damaged."""
        return not self._left

    @property
    def followed(self) -> list[Layer]:
        """Layers that this rank has beside those that it computes."""
        return [layer for index, layer in sorted(self._mine.items()) if index not in self._damaged]

    def begin(self, pack: Callable[[int], Bundle]) -> None:
        """A step: its wave sets off. Waits until the sources have copied it."""
        wave = self._left.pop(0)
        packed: dict[int, Bundle] = {}
        for number, move in enumerate(wave):
            if move.source == self._rank:
                if move.layer not in packed:
                    packed[move.layer] = pack(move.layer)
                self._sends += send(packed[move.layer], move.target, TAG_FILL + 3 * number)
            elif move.target == self._rank:
                self._coming.append((move.layer, Arrival(move.source, TAG_FILL + 3 * number)))
        for _, arrival in self._coming:
            arrival.open()
        self._following += wave

    def arrive(self, version: int) -> dict[int, Layer]:
        """Waits for what is on its way to this rank; the layers that came undamaged, at `version`."""
        came: dict[int, Layer] = {}
        for index, arrival in self._coming:
            bundle, whole = arrival.take()
            self._mine[index] = layer = self._build(index)
            if whole:
                layer.unpack(bundle, version)
                came[index] = layer
            else:
                self._damaged.add(index)  # it is fetched anew in the end
        self._coming.clear()
        return came

    def follow(self, totals: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Gives the step's gradients to who follows a layer; returns those that this rank was given."""
        came: dict[int, torch.Tensor] = {}
        waits: list[Any] = []
        for move in self._following:
            holders = [self.before.holder(p, move.layer) for p in range(len(self.before.ranks))]
            source = holders[(move.layer + move.target) % len(holders)]
            if source == self._rank and move.layer in totals:
                flat = totals[move.layer]
                self._sends.append((dist.isend(flat, move.target, tag=TAG_FOLLOW + move.layer), flat))
            elif move.target == self._rank and self._mine[move.layer].parameters:
                came[move.layer] = self._mine[move.layer].empty()
                waits.append(dist.irecv(came[move.layer], source, tag=TAG_FOLLOW + move.layer))
        for wait in [*waits, *(work for work, _ in self._sends)]:
            wait.wait()
        self._sends.clear()
        return {index: flat for index, flat in came.items() if index not in self._damaged}
