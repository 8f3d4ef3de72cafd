"""everstep._samples: the same global batches in the same order, however many ranks divide them."""

from __future__ import annotations

import random
import sys

import pytest

sys.path.insert(0, __file__.rsplit("/tests/", 1)[0] + "/worker/python")

from everstep._samples import permuted, share  # noqa: E402


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4096, 4097])
def test_an_epochs_order_is_a_permutation(count: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (7, 0), (-1, 12), (1 << 70, 3)):
        assert sorted(permuted(i, count, seed, epoch) for i in range(count)) == list(range(count))


def test_orders_differ_by_seed_and_epoch_and_look_drawn() -> None:
    count = 1000
    orders = {(s, e): [permuted(i, count, s, e) for i in range(count)] for s in range(3) for e in range(3)}
    assert len({tuple(order) for order in orders.values()}) == 9
    for order in orders.values():
        fixed = sum(i == p for i, p in enumerate(order))  # Poisson, mean 1
        rising = sum(a < b for a, b in zip(order, order[1:]))  # mean 500, deviation 9
        assert fixed < 10 and 440 < rising < 560


def test_any_number_of_ranks_makes_up_the_same_batches() -> None:
    draw = random.Random(1)
    for _ in range(200):
        batch = draw.randint(1, 40)
        samples = draw.randint(batch, 300)
        seed, step = draw.randint(0, 99), draw.randint(0, 3 * (samples // batch))
        whole = share(step, samples=samples, batch=batch, rank=0, world=1, seed=seed)
        assert len(set(whole.indices)) == batch and whole.weight == 1.0
        world = draw.randint(1, batch)
        parts = [share(step, samples=samples, batch=batch, rank=r, world=world, seed=seed) for r in range(world)]
        assert [i for part in parts for i in part.indices] == whole.indices
        assert max(len(p.indices) for p in parts) - min(len(p.indices) for p in parts) <= 1
        # What DistributedDataParallel makes of it: the average over ranks of weighted means is the whole's mean.
        value = [draw.random() for _ in range(samples)]
        mean = sum(value[i] for i in whole.indices) / batch
        averaged = sum(p.weight * sum(value[i] for i in p.indices) / len(p.indices) for p in parts) / world
        assert averaged == pytest.approx(mean, rel=1e-12)


def test_each_sample_of_an_epoch_is_used_once() -> None:
    samples, batch = 103, 10
    used = [i for step in range(10) for i in share(step, samples=samples, batch=batch, rank=0, world=1).indices]
    assert len(set(used)) == 100
    assert share(10, samples=samples, batch=batch, rank=0, world=1).epoch == 1


@pytest.mark.parametrize(("samples", "batch", "world"), [(10, 3, 4), (10, 11, 1)])
def test_batches_that_cannot_be_divided_are_refused(samples: int, batch: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"a global batch of {batch} must be at least the {world} ranks"):
        share(0, samples=samples, batch=batch, rank=0, world=world)
