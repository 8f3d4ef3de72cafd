"""Which samples a rank trains on in a step: a function of (seed, step, rank, world) alone, without state.

The order of an epoch is a keyed permutation of 0 .. samples-1: a Feistel network of four rounds over the smallest
square power of two that holds them, walked until the result is below `samples` (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002, section 4: cycle walking). So nothing needs to be kept, skipped or handed over when
ranks come and go.
"""

from __future__ import annotations

from dataclasses import dataclass

_ROUNDS = 4
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Share:
    """A rank's part of one step's global batch."""

    epoch: int
    indices: list[int]  # into the dataset
    # Of the mean loss over `indices`: DistributedDataParallel averages gradients over ranks, and the average of
    # weighted means is the mean over the whole batch, however unequal the parts are.
    weight: float


def share(step: int, *, samples: int, batch: int, rank: int, world: int, seed: int = 0) -> Share:
    """`batch` consecutive places of the epoch's order, divided among the ranks as evenly as can be. The last
    samples % batch samples of an epoch's order are left out. Raises ValueError when a rank would get none."""
    if not world <= batch <= samples:
        raise ValueError(f"a global batch of {batch} must be at least the {world} ranks and at most the {samples} "
                         "samples there are")
    steps = samples // batch
    epoch, place = divmod(step, steps)
    first, last = batch * rank // world, batch * (rank + 1) // world
    begin = place * batch
    return Share(epoch, [permuted(begin + i, samples, seed, epoch) for i in range(first, last)],
                 (last - first) * world / batch)


def permuted(index: int, count: int, seed: int, epoch: int) -> int:
    """Where `index` of 0 .. count-1 comes to lie in the order of this seed and epoch."""
    if not 0 <= index < count:
        raise ValueError(f"index {index} is not among {count} samples")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = mix(mix(seed & _MASK) ^ (epoch & _MASK))
    while True:  # fewer than four turns on average: the domain is less than four times `count`
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(key ^ (number << 56) ^ right) & mask)
        index = left << half | right
        if index < count:
            return index


def mix(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
