"""A state captured by one world and put together for another: every byte from the right place, once.

Brute force beside it: the global tensors are known, each rank's part is cut from them by torch.chunk alone.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import sys
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

sys.path.insert(0, __file__.rsplit("/tests/", 1)[0] + "/worker/python")

from everstep import _reshard  # noqa: E402
from everstep._state import gather  # noqa: E402
from everstep._table import Decoder, Encoder, ShardedLeaf  # noqa: E402

WORLDS = 300


class Mesh:
    """As much of a DeviceMesh as a table needs."""

    def __init__(self, shape: tuple[int, ...], rank: int) -> None:
        self.shape = shape
        self.coordinate = list(itertools.product(*map(range, shape)))[rank]

    def get_coordinate(self) -> list[int]:
        return list(self.coordinate)

    def size(self, dim: int) -> int:
        return self.shape[dim]


class Part(torch.Tensor):
    """As much of a DTensor."""

    placements: Any
    device_mesh: Mesh
    local: torch.Tensor

    def to_local(self) -> torch.Tensor:
        return self.local


def part_of(whole: torch.Tensor, mesh: Mesh, placements: list[Any]) -> Part:
    local = whole
    for i, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = list(torch.chunk(local, mesh.size(i), placement.dim))
            empty = local.narrow(placement.dim, 0, 0)
            parts += [empty] * (mesh.size(i) - len(parts))
            local = parts[mesh.coordinate[i]]
    out = torch.empty(whole.shape, dtype=whole.dtype, device="meta").as_subclass(Part)
    out.placements, out.device_mesh, out.local = placements, mesh, local.contiguous()
    return out


def captured(rank: int, tier: int, state: dict[str, Any]) -> tuple[_reshard.Shard, bytes]:
    flat = Encoder().finish(gather(state, with_rng=False), {})
    payload = bytearray(flat.payload_bytes)
    for (address, size), offset in zip(flat.pieces, flat.offsets):
        payload[offset:offset + size] = ctypes.string_at(address, size)
    return _reshard.Shard(rank, tier, len(payload) + len(flat.table), flat.table), bytes(payload)


def put_together(part: _reshard.Resharded, payloads: list[bytes]) -> tuple[Any, list[int]]:
    """The state, and how many bytes came from each shard; no byte is written twice."""
    out, written, taken = bytearray(part.data_bytes), bytearray(part.data_bytes), [0] * len(payloads)
    for r in part.ranges:
        for i in range(r.times):
            source, dest = r.source + i * r.source_stride, r.dest + i * r.dest_stride
            assert source + r.size <= len(payloads[r.rank]) and dest + r.size <= len(out)
            assert not any(written[dest:dest + r.size]), "a byte from two places"
            out[dest:dest + r.size] = payloads[r.rank][source:source + r.size]
            written[dest:dest + r.size] = b"\1" * r.size
            taken[r.rank] += r.size
    assert len(written) - sum(written) < 64 * (1 + len(part.ranges)), "more than padding is left out"
    return Decoder(memoryview(out), part.table).root(), taken


def random_layout(rng: random.Random, dims: int) -> tuple[tuple[int, ...], list[Any]]:
    mesh = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 2)))
    return mesh, [Shard(rng.randrange(dims)) if dims and rng.random() < 0.8 else Replicate() for _ in mesh]


def test_every_byte_from_the_right_place_once() -> None:
    for seed in range(WORLDS):
        rng = random.Random(seed)
        dtypes = [torch.float32, torch.bfloat16, torch.uint8, torch.complex64]
        shapes = [[rng.randint(0, 7) for _ in range(rng.randint(0, 4))] for _ in range(3)]
        wholes = [(torch.arange(math.prod(shape)).reshape(shape) % 251).to(rng.choice(dtypes)) for shape in shapes]
        old_mesh = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 2)))
        new_mesh = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 2)))

        def layout(mesh: tuple[int, ...], rng: random.Random = rng, wholes: list[torch.Tensor] = wholes) -> list[Any]:
            return [[Shard(rng.randrange(w.dim())) if w.dim() and rng.random() < 0.8 else Replicate() for _ in mesh] for w in wholes]

        old, new = layout(old_mesh), layout(new_mesh)
        buffer = torch.arange(rng.randint(0, 5))
        shards, payloads = [], []
        for rank in range(math.prod(old_mesh)):
            state: dict[str, Any] = {f"t{i}": part_of(w, Mesh(old_mesh, rank), p) for i, (w, p) in enumerate(zip(wholes, old))}
            state |= {"plain": {"buffer": buffer.clone(), "epoch": 3, "rank": rank}}
            shard, payload = captured(rank, rng.randint(0, 2), state)
            shards.append(shard)
            payloads.append(payload)
        for rank in range(math.prod(new_mesh)):
            mine: dict[str, Any] = {f"t{i}": part_of(w, Mesh(new_mesh, rank), p) for i, (w, p) in enumerate(zip(wholes, new))}
            saved, _ = put_together(_reshard.reshard(shards, {**mine, "plain": {}}, rank), payloads)
            for name, part in mine.items():
                assert isinstance(saved[name], ShardedLeaf), (seed, name)
                assert saved[name].local.dtype == part.local.dtype and torch.equal(saved[name].local, part.local), (seed, rank, name)
                assert saved[name].shape == list(part.shape)
            assert torch.equal(saved["plain"]["buffer"], buffer)
            assert saved["plain"]["rank"] == rank % len(shards)


def test_a_whole_tensor_becomes_parts_and_parts_a_whole_one() -> None:
    whole = torch.arange(30.0).reshape(10, 3)
    mesh = [Mesh((4,), rank) for rank in range(4)]
    parts = [{"t": part_of(whole, m, [Shard(0)])} for m in mesh]
    shards, payloads = zip(*(captured(r, 1, p) for r, p in enumerate(parts)))
    saved, _ = put_together(_reshard.reshard(shards, {"t": torch.empty(10, 3)}, 0), list(payloads))
    assert torch.equal(saved["t"], whole)
    shard, payload = captured(0, 0, {"t": whole})
    for rank, part in enumerate(parts):
        saved, _ = put_together(_reshard.reshard([shard], part, rank), [payload])
        assert torch.equal(saved["t"].local, part["t"].local)


def test_the_nearest_first_and_equal_ones_in_turn() -> None:
    state = {f"t{i}": torch.zeros(1000) for i in range(64)}
    shards, payloads = zip(*(captured(r, 1, state) for r in range(8)))
    total = [0] * 8
    for rank in range(6):
        _, taken = put_together(_reshard.reshard(shards, state, rank), list(payloads))
        assert max(taken) <= 8 * 4000
        total = [a + b for a, b in zip(total, taken)]
    assert max(total) == min(total)
    near = [captured(r, _reshard.LOCAL if r == 5 else _reshard.PEER, state)[0] for r in range(8)]
    _, taken = put_together(_reshard.reshard(near, state, 0), list(payloads))
    assert taken == [0, 0, 0, 0, 0, 64 * 4000, 0, 0]


def refusal(states: list[dict[str, Any]], mine: dict[str, Any], **options: Any) -> str:
    shards = [captured(rank, 1, state)[0] for rank, state in enumerate(states)]
    try:
        _reshard.reshard(shards, mine, 0, **options)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def test_drift_between_ranks_is_named() -> None:
    whole = torch.zeros(4, 2)
    good = {"m": {"w": whole}}
    assert "m['w']: rank 0 and rank 1 captured float32 (4, 2) and float64 (4, 2)" in refusal([good, {"m": {"w": whole.double()}}], good)
    assert "m['w']: rank 0 and rank 1 captured float32 (4, 2) and float32 (4, 3)" in refusal([good, {"m": {"w": torch.zeros(4, 3)}}], good)
    assert 'm: rank 0 and rank 1 captured "b" on one of them only' in refusal([good, {"m": {"w": whole, "b": 1}}], good)
    assert "state: rank 0 and rank 1 captured n on one of them only" in refusal([good, {**good, "n": 1}], good)
    assert "m['w']: rank 0 and rank 1 captured other kinds of value" in refusal([good, {"m": {"w": 3}}], good)
    assert "m: rank 0 and rank 1 captured 1 and 2 items" in refusal([{"m": [1]}, {"m": [1, 2]}], {"m": []})
    assert "the checkpoint holds float32 (4, 2), this rank has torch.float32 (4, 3)" in refusal([{"w": whole}] * 2, {"w": torch.zeros(4, 3)})
    assert "captured with replicated=False" in refusal([{"w": whole}] * 2, {"w": whole}, alike=False)


def test_a_part_that_lies_nowhere_is_refused() -> None:
    part = part_of(torch.zeros(4, 2), Mesh((2,), 0), [Shard(0)])
    odd = part_of(torch.zeros(4, 2), Mesh((2,), 1), [Shard(0)])
    odd.local = torch.zeros(3, 2)  # no way of dividing 4 by 2 gives this
    assert "whose place in the whole is not known" in refusal([{"w": part}, {"w": odd}], {"w": part})
    assert "hold 4 of the 8 elements" in refusal([{"w": part}, {"w": part}], {"w": torch.zeros(4, 2)})


if __name__ == "__main__":
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print(f"ok {name}")
