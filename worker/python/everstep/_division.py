"""Who captures what of a state that is the same on every rank. Pure: names, shapes and the world in, parts out.

    w (4096, 1024)    rank 0  rows 0-1365 | rank 1  rows 1366-2730 | rank 2  rows 2731-4095
    b (10,)           rank 2 alone, which had least
    step ()           every rank

Every rank works it out for itself and must come to the same: nothing but names, shapes and the number of ranks goes
in. Large tensors are cut at their first dimension that is longer than 1, where a part lies in one run; what cannot
be cut evenly goes to who has least, the largest pieces first (Graham's LPT rule), so that no two ranks differ by
more than the largest piece: a row of a large tensor, or the whole of a small one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

_CUT_BYTES = 64 << 10  # a smaller tensor is not worth a piece on every rank


class Part(NamedTuple):
    """`length` of the tensor's dimension `dim`, from `begin` on; all of the others."""

    dim: int
    begin: int
    length: int

    def offsets(self, dims: int) -> list[int]:
        """Where the part begins in the whole."""
        return [self.begin if d == self.dim else 0 for d in range(dims)]


def divide(tensors: Mapping[str, tuple[Sequence[int], int]], rank: int, world: int) -> dict[str, Part]:
    """Rank `rank`'s part of each of `tensors` (name -> shape, bytes of an element), perhaps of length 0.

    What has no dimension or no element is left out: every rank keeps it.
    """
    load = [0] * world
    pieces = []
    for name, (shape, item) in tensors.items():
        if math.prod(shape) == 0 or not shape:
            continue
        dim = next((d for d, n in enumerate(shape) if n > 1), 0)
        size = math.prod(shape) * item
        rows = shape[dim] if size >= _CUT_BYTES else 1
        pieces.append((-size // rows, name, dim, rows))
    parts = {}
    for negative, name, dim, rows in sorted(pieces):
        each, rest = divmod(rows, world)
        counts = [each] * world
        for r in sorted(range(world), key=load.__getitem__)[:rest]:
            counts[r] += 1
            load[r] -= negative
        length = tensors[name][0][dim] // rows  # 1, or the whole of a small tensor
        parts[name] = Part(dim, sum(counts[:rank]) * length, counts[rank] * length)
    return parts
