"""A state that is the same on N ranks, captured in shares: who has what, and that all of it comes back to N or any N' ranks.

Brute force beside it: each rank's objects are known, and what is restored is compared with them to the last bit.
"""

from __future__ import annotations

import ctypes
import math
import random
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, __file__.rsplit("/tests/", 1)[0] + "/worker/python")

from everstep import _alike, _reshard  # noqa: E402
from everstep._alike import LEAST_BYTES, PERIOD, Sameness  # noqa: E402
from everstep._division import Part, divide  # noqa: E402
from everstep._plan import Plan, Step  # noqa: E402
from everstep._shards import Facts, write_manifest, write_shard  # noqa: E402
from everstep._state import apply  # noqa: E402
from everstep._table import Decoder, Encoder  # noqa: E402
from everstep.export import read_checkpoint  # noqa: E402

DIVISIONS, WORLDS = 200, 12
CUT = 64 << 10


def random_shapes(rng: random.Random) -> dict[str, tuple[list[int], int]]:
    def shape() -> list[int]:
        kind = rng.random()
        if kind < 0.15:
            return rng.choice([[], [0], [3, 0, 2], [1], [1, 1]])
        if kind < 0.6:
            return [rng.randint(1, 40) for _ in range(rng.randint(1, 3))]
        return [1] * rng.randint(0, 1) + [rng.randint(1, 3000), rng.randint(100, 400)]

    return {f"t{i}": (shape(), rng.choice([1, 2, 4, 8])) for i in range(rng.randint(1, 30))}


def test_every_element_has_one_rank_and_no_rank_much_more_than_another() -> None:
    for seed in range(DIVISIONS):
        rng = random.Random(seed)
        tensors, world = random_shapes(rng), rng.randint(1, 9)
        parts = [divide(tensors, rank, world) for rank in range(world)]
        shuffled = list(tensors.items())
        rng.shuffle(shuffled)
        assert divide(dict(shuffled), world - 1, world) == parts[-1], "the order of names goes in"
        bytes_of, largest = [0] * world, 0
        for name, (shape, item) in tensors.items():
            if not shape or 0 in shape:
                assert all(name not in mine for mine in parts)
                continue
            dims = {mine[name].dim for mine in parts}
            (dim,) = dims
            assert all(n == 1 for n in shape[:dim]), "a part does not lie in one run"
            end = 0
            for rank, mine in enumerate(parts):
                part = mine[name]
                assert part.begin == end and part.length >= 0, (seed, name, rank)
                end += part.length
                bytes_of[rank] += part.length * math.prod(shape) // shape[dim] * item
            assert end == shape[dim], (seed, name)
            size = math.prod(shape) * item
            largest = max(largest, size // shape[dim] if size >= CUT else size)
        assert max(bytes_of) - min(bytes_of) <= largest, (seed, bytes_of)


def test_small_tensors_are_dealt_and_large_ones_cut() -> None:
    tensors = {"w": ([4096, 1024], 4), "b": ([10], 4), "one": ([1, 40000], 4), "step": ([], 4)}
    parts = [divide(tensors, rank, 3) for rank in range(3)]
    assert [p["w"] for p in parts] == [Part(0, 0, 1366), Part(0, 1366, 1365), Part(0, 2731, 1365)]
    assert [p["one"].dim for p in parts] == [1, 1, 1] and sum(p["one"].length for p in parts) == 40000
    assert sorted(p["b"].length for p in parts) == [0, 0, 10] and parts[0]["b"].length == 0, "rank 0 has a row more"
    assert all("step" not in p for p in parts)


class Model(nn.Module):
    """Large and small, tied, transposed, half precision, a buffer that differs between ranks."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.wide = nn.Linear(130, 257)
        self.tied = nn.Linear(130, 257)
        self.tied.weight = self.wide.weight
        self.turned = nn.Parameter(torch.randn(90, 301).t())
        self.bf16 = nn.Parameter(torch.randn(300, 200).to(torch.bfloat16))
        self.flat = nn.Parameter(torch.randn(1, 20011))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.norm = nn.BatchNorm1d(6)
        self.norm.running_mean += rank  # every rank's own

    def train_once(self, optimizer: torch.optim.Optimizer) -> None:
        for i, p in enumerate(self.parameters()):
            p.grad = torch.full_like(p, 0.01 * (i + 1))
        optimizer.step()


def job(rank: int, seed: int, fused: bool = False) -> dict[str, Any]:
    model = Model(rank, seed)
    kind: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if fused else torch.optim.AdamW(model.parameters(), lr=0.1)
    return {"model": model, "optimizer": kind, "epoch": rank + 7, "weights": {"ema": torch.arange(5.0)}}


def written(plan: Plan, step: Step, rank: int, tier: int) -> tuple[_reshard.Shard, bytes]:
    payload = bytearray(step.payload_bytes)
    for piece, offset in zip([*plan.late, *step.early], step.expected):
        payload[offset:offset + piece.bytes] = ctypes.string_at(piece.data, piece.bytes)
    return _reshard.Shard(rank, tier, len(payload) + len(step.table), step.table), bytes(payload)


def put_together(part: _reshard.Resharded, payloads: list[bytes]) -> tuple[Any, list[int]]:
    """The state, and how many bytes came from each shard; no byte is written twice."""
    taken, lies = [0] * len(payloads), []
    for r in part.ranges:
        taken[r.rank] += r.times * r.size
        lies += [(r.dest + i * r.dest_stride, r.size) for i in range(r.times)]
    lies.sort()
    assert all(at + size <= following for (at, size), (following, _) in zip(lies, lies[1:])), "a byte from two places"
    payload = _reshard.assemble(part, [memoryview(p) for p in payloads])
    return Decoder(payload, part.table).root(), taken


def values(state: dict[str, Any]) -> list[torch.Tensor]:
    """All that is to be the same on every rank."""
    out = [t.detach() for t in state["model"].parameters()]
    for p in state["model"].parameters():
        out += [v for _, v in sorted(state["optimizer"].state[p].items()) if v is not None]
    return [*out, state["weights"]["ema"]]


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def test_what_n_ranks_captured_any_number_of_ranks_restores() -> None:
    for seed in range(WORLDS):
        rng = random.Random(seed)
        old, new = rng.randint(2, 5), rng.randint(1, 6)
        new = old if seed % 3 == 0 else new
        states = [job(rank, seed, seed % 2 == 0) for rank in range(old)]
        shards, payloads = [], []
        for rank, state in enumerate(states):
            state["model"].train_once(state["optimizer"])
            plan = Plan(state, with_rng=True, share=(rank, old))
            assert plan.shared and plan.reusable and not plan.sharded
            shard, payload = written(plan, plan.step({"step": 1}), rank, rng.randint(0, 2))
            shards.append(shard)
            payloads.append(payload)
        whole = Plan(states[0], with_rng=True)
        each = sum(p.bytes for p in whole.late) / old
        for payload in payloads:
            assert abs(len(payload) - each) < 60_000, (seed, len(payload), each)  # buffers, streams, step counts
        for rank in range(new):
            state = job(rank + 100, seed + 1000, seed % 2 == 0)
            saved, taken = put_together(_reshard.reshard(shards, state, rank), payloads)
            saved.pop("__rng__")
            apply(state, saved)
            of = states[rank % old]
            assert all(map(equal, values(state), values(of))), (seed, rank)
            assert equal(state["model"].norm.running_mean, of["model"].norm.running_mean), "another rank's buffer"
            assert state["epoch"] == of["epoch"] and state["model"].tied.weight is state["model"].wide.weight
            assert sum(taken) < sum(p.bytes for p in whole.late) + 60_000, "a tied tensor was read twice"


def test_a_plan_of_shares_is_used_again_and_allocates_nothing() -> None:
    state = job(0, 3)
    state["model"].train_once(state["optimizer"])
    plans = [Plan(state, with_rng=False, share=(rank, 3)) for rank in range(3)]
    first = [plan.step({}) for plan in plans]
    before = [[(p.data, p.bytes) for p in plan.late] for plan in plans]
    for number in (2, 3):
        state["model"].train_once(state["optimizer"])
        assert all(plan.fits() for plan in plans)
        steps = [plan.step({}) for plan in plans]
        assert [[(p.data, p.bytes) for p in plan.late] for plan in plans] == before
        shards, payloads = zip(*(written(plan, step, r, 1) for r, (plan, step) in enumerate(zip(plans, steps))))
        other = job(1, 4)
        saved, _ = put_together(_reshard.reshard(shards, other, 0), list(payloads))
        apply(other, saved)
        assert all(map(equal, values(other), values(state))), f"step {number} holds an older one's bytes"
    assert [step.expected for step in first] == [step.expected for step in steps]
    with torch.no_grad():  # what overlapped captures rely on: a change is seen, also in a part that begins elsewhere
        for plan in plans:
            versions = plan.versions()
            state["model"].wide.weight.add_(1)
            named = [name for name, _ in plan.changed(versions)]
            assert named == ["model['wide.weight']"] or named == ["model['tied.weight']"]
    state["model"].wide.weight.data = state["model"].wide.weight.data.clone()
    assert not any(plan.fits() for plan in plans)


def test_optimizer_state_in_shares_goes_where_its_parameter_does_not() -> None:
    """State whose shape is not its parameter's (factored moments) is put together whole."""
    shards, payloads = [], []
    for rank in range(2):
        p = nn.Parameter(torch.ones(300, 300))
        optimizer = torch.optim.SGD([p], lr=0.1)
        optimizer.state[p] = {"row": torch.arange(40_000.0), "both": torch.arange(90_000.0).reshape(300, 300)}
        plan = Plan({"optimizer": optimizer}, with_rng=False, share=(rank, 2))
        shard, payload = written(plan, plan.step({}), rank, 1)
        shards.append(shard)
        payloads.append(payload)
    saved, taken = put_together(_reshard.reshard(shards, {"optimizer": optimizer}, 0), payloads)
    assert torch.equal(saved["optimizer"]["state"][0]["row"], torch.arange(40_000.0)) and min(taken) == max(taken)


def test_ranks_that_disagree_are_named() -> None:
    def captured(rank: int, width: int, extra: bool = False) -> tuple[_reshard.Shard, bytes]:
        model = nn.Sequential(nn.Linear(200, width), nn.Linear(width, 2))
        if extra:
            model.append(nn.Linear(2, 2))
        plan = Plan({"model": model}, with_rng=False, share=(rank, 2))
        return written(plan, plan.step({}), rank, 1)

    def refusal(*ranks: tuple[_reshard.Shard, bytes]) -> str:
        try:
            _reshard.reshard([shard for shard, _ in ranks], {"model": nn.Linear(1, 1)}, 0)
        except RuntimeError as error:
            return str(error)
        raise AssertionError("nothing was refused")

    said = refusal(captured(0, 300), captured(1, 301))
    assert "model['0.weight']: rank 0 and rank 1 captured a part of float32 (300, 200) and a part of float32 (301, 200)" in said
    assert "on one of them only" in refusal(captured(0, 300), captured(1, 300, extra=True))
    model = nn.Sequential(nn.Linear(200, 300))
    twice = Plan({"model": model}, with_rng=False, share=(0, 2))
    said = refusal(written(twice, twice.step({}), 0, 1), written(twice, twice.step({}), 1, 1))
    assert "elements" in said, "rank 0's share stands in for rank 1's"


def test_an_export_puts_shares_together_or_says_what_lacks(tmp_path: Path) -> None:
    state = {"model": {"w": torch.randn(700, 31), "b": torch.arange(10.0), "buffer": torch.zeros(3)}, "epoch": 3}
    shapes = {f"model[{key!r}]": (list(value.shape), 4) for key, value in state["model"].items() if key != "buffer"}
    facts = [Facts("j", 1, 5, rank, 3, False) for rank in range(3)]

    def write(folder: Path, ranks: tuple[int, ...]) -> Path:
        folder.mkdir()
        entries = []
        for fact, of in zip(facts, ranks):
            flat = Encoder(parts=divide(shapes, of, 3)).finish(state, {"step": 5})
            entries.append(write_shard(folder / f"rank-{fact.rank:05}-of-00003.safetensors", flat, fact))
        write_manifest(folder, facts[0], entries)
        return folder

    whole = read_checkpoint(write(tmp_path / "good", (0, 1, 2)))
    assert all(torch.equal(whole["model"][key], value) for key, value in state["model"].items()) and whole["epoch"] == 3
    try:
        read_checkpoint(write(tmp_path / "bad", (0, 1, 1)))
        raise AssertionError("a part that nobody has was not missed")
    except SystemExit as error:
        assert "model.w: of its 21700 elements no rank's share holds the one at 14477, or two do" in str(error), error


def looks(store: torch.distributed.Store, all_of: list[Sameness], n: int, states: list[Any]) -> list[bool]:
    """What each rank comes to, all asking at step `n` at once."""
    def ask(rank: int) -> None:
        assert all_of[rank].due(n)
        all_of[rank].look(n, states[rank])

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(all_of))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [same.divides(state) for same, state in zip(all_of, states)]


def test_all_ranks_come_to_the_same_and_name_what_differs(monkeypatch: Any) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(_alike, "_store", lambda: store)
    monkeypatch.setattr(_alike, "_WAIT", timedelta(seconds=20))
    big = torch.rand(LEAST_BYTES // 4)

    def states(world: int = 3) -> list[list[tuple[str, torch.Tensor]]]:
        return [[("big", big.clone()), ("turned", torch.arange(6.0).reshape(2, 3).t()), ("step", torch.tensor(3.0))] for _ in range(world)]

    ranks, held = [Sameness(rank, 3) for rank in range(3)], states()
    assert looks(store, ranks, 5, held) == [True] * 3 and {r.same for r in ranks} == {True}
    assert not any(r.due(PERIOD - 1) for r in ranks), "looked at again within a period"
    for state in held:
        state[0][1].add_(1)
    assert all(r.divides(state) for r, state in zip(ranks, held)), "values alone undo what was found"
    assert not ranks[0].divides(held[0][:2]), "a layout that nobody compared"
    held[2][1][1][1, 0] += 1e-6
    assert looks(store, ranks, PERIOD, held) == [False] * 3
    assert {r.why for r in ranks} == {"turned has other values on rank 2 than on rank 0"}
    assert not any(r.due(2 * PERIOD) for r in ranks), "what was found to differ once is trusted again"

    for n, (change, said) in enumerate([
            (lambda s: s.append(("more", torch.zeros(1))), "more is on one of the ranks 0 and 1 only"),
            (lambda s: s.__setitem__(2, ("step", torch.tensor(3))), "step is float32 () on rank 0 and int64 () on rank 1")]):
        ranks, held = [Sameness(rank, 2) for rank in range(2)], states(2)
        change(held[1])
        assert looks(store, ranks, 100_000 + n, held) == [False] * 2 and {r.why for r in ranks} == {said}
    ranks = [Sameness(rank, 2) for rank in range(2)]
    assert looks(store, ranks, 200_000, [state[1:] for state in states(2)]) == [False] * 2
    assert all(r.same and f"under {LEAST_BYTES}" in r.why for r in ranks), "a small state is the same, and captured whole"
    assert not Sameness(0, 1).due(0), "one rank has nobody to ask"


def test_a_rank_that_does_not_come_and_nodes_without_copies_mean_whole_states(monkeypatch: Any) -> None:
    state = [("big", torch.zeros(LEAST_BYTES // 4))]
    monkeypatch.setattr(_alike, "_WAIT", timedelta(milliseconds=200))
    monkeypatch.setattr(_alike, "_store", lambda: torch.distributed.HashStore())
    alone = Sameness(0, 2)
    alone.look(0, state)
    assert alone.same is None and "could not compare" in alone.why and not alone.divides(state) and not alone.due(PERIOD)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("EVERSTEP_HOLDERS", "1")
    lonely = Sameness(0, 2)
    lonely.look(0, state)
    assert lonely.same is None and "takes its shares along" in lonely.why and not lonely.due(PERIOD)
