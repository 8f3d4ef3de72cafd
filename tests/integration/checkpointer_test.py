"""everstep.Checkpointer over a real arena (everstep_arena_host holds it, as a node's keeper and agent do).

Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

import enum
import json
import math
import os
import random
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("EVERSTEP_BUILD", ROOT / "build/release"))
sys.path.insert(0, str(ROOT / "worker/python"))
os.environ.setdefault("EVERSTEP_LIBRARY", str(BUILD / "lib/libeverstep.so"))

import everstep
from everstep import _attach, _library, checkpointer
from everstep._files import FileTier
from everstep._table import Decoder, Encoder, Flattened

torch.set_num_threads(1)  # the same bits on every machine, and no fight for its cores


class Node:
    """One node's checkpoint plane."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "keeper.sock"
        self.process = subprocess.Popen([BUILD / "tests/everstep_arena_host", self.socket, "job"],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer()["ready"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the arena host is gone"
        return json.loads(line)

    def say(self, command: str) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        assert answer["ok"], answer["error"]
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.process.wait(10) == 0

    def steps(self, rank: int = 0) -> list[int]:
        return sorted(s["step"] for s in self.say("survey")["shards"] if s["rank"] == rank)

    def environment(self, generation: int, rank: int = 0, world: int = 1) -> dict[str, str]:
        return {"EVERSTEP_KEEPER": str(self.socket), "EVERSTEP_JOB": "job", "EVERSTEP_GENERATION": str(generation),
                "RANK": str(rank), "WORLD_SIZE": str(world)}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.close()


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVERSTEP_KEEPER", "EVERSTEP_JOB", "EVERSTEP_GENERATION", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    _attach._warned.clear()


def inside(monkeypatch: pytest.MonkeyPatch, node: Node, generation: int, rank: int = 0, world: int = 1) -> None:
    for name, value in node.environment(generation, rank, world).items():
        monkeypatch.setenv(name, value)


class GPT(nn.Module):
    """Small, with what real ones have: tied weights, dropout, a buffer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 64, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.token(x)).transpose(1, 2)).transpose(1, 2))


class Run:
    """A training run whose every step draws from all three random streams."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = GPT()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.01, total_steps=100)
        self.progress = {"epoch": 0, "seen": torch.zeros(3)}
        self.state = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
                      "progress": self.progress}

    def step(self, n: int) -> float:
        x = torch.randint(64, (2 + random.randrange(3), 8)) + np.random.randint(1)
        loss = nn.functional.cross_entropy(self.model(x).flatten(0, 1), x.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.progress["epoch"] = n // 4
        self.progress["seen"] += x.shape[0]
        return loss.item()

    def bits(self) -> list[bytes]:
        leaves = [*self.model.state_dict().values(), self.progress["seen"]]
        for values in self.optimizer.state_dict()["state"].values():
            leaves += values.values()
        return [t.detach().contiguous().numpy().tobytes() for t in leaves] + [
            repr(self.scheduler.state_dict()).encode(), repr(self.progress["epoch"]).encode(),
            repr((random.random(), np.random.random(), torch.rand(1).item())).encode()]


def undisturbed(steps: int) -> tuple[list[float], list[bytes]]:
    run = Run()
    return [run.step(n) for n in range(steps)], run.bits()


# --- in the node's memory ---


def test_a_new_process_goes_on_bit_for_bit(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, bits = undisturbed(10)
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    first = Run()
    with everstep.Checkpointer(first.state) as ck:
        assert ck.tier == "memory"
        assert ck.restore() == 0
        for n in range(6):
            assert first.step(n) == losses[n]
            assert ck.step(n)
        assert ck.stats().captured == 6
    assert node.steps() == [4, 5]

    node.say("activate 2 1 5 0")
    inside(monkeypatch, node, 2)
    second = Run(seed=99)
    with everstep.Checkpointer(second.state) as ck:
        assert ck.restore() == 6
        assert [second.step(n) for n in range(6, 10)] == losses[6:]
    assert second.bits() == bits


def test_what_was_captured_by_a_killed_process_is_restored(node: Node, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from checkpointer_test import Run, everstep
run = Run()
ck = everstep.Checkpointer(run.state)
for n in range(ck.restore(), 40):
    run.step(n)
    ck.step(n)
    print(n, flush=True)
print("bits", __import__("hashlib").sha256(b"|".join(run.bits())).hexdigest(), flush=True)
""")
    at, generation, killed, final = -1, 0, 0, ""
    while not final:
        generation += 1
        node.say(f"activate {generation} 1 {at} 0")
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, **node.environment(generation)})
        assert process.stdout
        said = -1
        for line in process.stdout:
            if line.startswith("bits"):
                final = line.split()[1]
                break
            assert int(line) == said + 1 or said == -1
            if said == -1:
                assert int(line) == at + 1
            said = int(line)
            if killed < 3 and said >= at + 7:
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
        process.stdout.close()
        process.wait(20)
        held = node.steps()
        assert held and held[-1] >= said
        at = held[-1]
        assert generation < 6
    import hashlib

    assert final == hashlib.sha256(b"|".join(undisturbed(40)[1])).hexdigest()


def test_a_larger_state_makes_the_arena_grow(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    state = {"data": {"a": torch.arange(10.0)}}
    with everstep.Checkpointer(state) as ck:
        ck.restore()
        for n in range(4):
            state["data"][f"more{n}"] = torch.full((1 << (10 + 3 * n),), float(n))
            assert ck.step(n)
    node.say("activate 2 1 3 0")
    inside(monkeypatch, node, 2)
    back: dict[str, Any] = {"data": {}}
    with everstep.Checkpointer(back) as ck:
        assert ck.restore() == 4
    assert torch.equal(back["data"]["more3"], state["data"]["more3"])
    assert list(back["data"]) == list(state["data"])


def test_a_flipped_bit_is_named_and_nothing_is_loaded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    weights = torch.ones(1000)
    with everstep.Checkpointer({"w": weights}) as ck:
        ck.restore()
        ck.step(0)
    node.say("activate 2 1 0 0")
    node.say("flip 0 0 70")
    inside(monkeypatch, node, 2)
    weights.zero_()
    with everstep.Checkpointer({"w": weights}) as ck:
        for load in (ck.view, ck.restore):
            with pytest.raises(everstep.EverstepError, match="chunk 0") as told:
                load()
            assert told.value.code == _library.ECORRUPT
    assert not weights.any()


def test_a_flipped_bit_between_two_tensors_is_found_while_they_are_loaded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> dict[str, torch.Tensor]:
        shared = torch.zeros(700_000)  # tied: the same bytes go to two places of a state that is not
        return {"a": torch.zeros(600_000), "b": shared, "c": shared[:1000], "n": torch.zeros(3, dtype=torch.int64), "t": shared}

    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    captured = state()
    for i, tensor in enumerate(captured.values()):
        tensor.copy_(torch.arange(tensor.numel()) % 1000 + i)
    with everstep.Checkpointer(captured) as ck:
        ck.step(0)
    node.say("activate 2 1 0 0")
    inside(monkeypatch, node, 2)
    loaded = {name: tensor.clone() for name, tensor in state().items()}
    with everstep.Checkpointer(loaded) as ck:
        assert ck.restore() == 1
        assert all(torch.equal(loaded[name], captured[name]) for name in captured)
        tied = state()
    with everstep.Checkpointer(tied) as ck:
        assert ck.restore() == 1
        assert all(torch.equal(tied[name], captured[name]) for name in captured)
    node.say(f"flip 0 0 {3 << 20}")  # far from the table, which is at the end
    with everstep.Checkpointer(loaded) as ck, pytest.raises(everstep.EverstepError, match="chunk 3 of") as told:
        ck.restore()
    assert told.value.code == _library.ECORRUPT
    assert loaded["a"].isnan().all() and loaded["t"].isnan().all() and not loaded["n"].any()  # nobody trains on these


def test_a_view_is_the_checkpoints_own_memory(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    state = {"w": torch.arange(1000.0), "seen": {"samples": 7}}
    with everstep.Checkpointer(state) as ck:
        assert ck.view() is None
        ck.step(4)
    node.say("activate 2 1 4 0")
    inside(monkeypatch, node, 2)
    state["w"].zero_()
    with everstep.Checkpointer(state) as ck:
        step, seen = ck.view()
        assert step == 4
        assert set(seen) == {"w", "seen"} and seen["seen"] == {"samples": 7}
        assert torch.equal(seen["w"], torch.arange(1000.0))
        assert not state["w"].any()  # looked at, not loaded
        seen["w"][3] = 5.0  # what nobody may do shows whose memory it is
        with pytest.raises(everstep.EverstepError, match="chunk 0"):
            ck.view()


def test_a_view_of_files(tmp_path: Path) -> None:
    state = {"w": torch.arange(10.0)}
    with everstep.Checkpointer(state, directory=tmp_path) as ck:
        ck.step(2)
        state["w"].zero_()
        step, seen = ck.view()
    assert step == 2 and torch.equal(seen["w"], torch.arange(10.0))


def test_a_process_of_an_old_generation_cannot_capture(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    with everstep.Checkpointer({"x": torch.zeros(1)}) as ck:
        ck.restore()
        assert ck.step(0)
        node.say("activate 2 1 0 0")
        with pytest.raises(everstep.StaleGenerationError, match="generation 1, the job is at 2"):
            ck.step(1)
    assert node.steps() == [0]
    with pytest.raises(everstep.StaleGenerationError):
        everstep.Checkpointer({"x": torch.zeros(1)})


def test_another_ranks_state_comes_with_random_streams_of_ones_own(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    with everstep.Checkpointer({"x": torch.arange(4)}) as ck:
        ck.restore()
        ck.step(0)
    drawn: dict[int, list[float]] = {}
    for generation in (2, 3):
        node.say(f"activate {generation} 3 0 0 1 2")
        for rank in range(3):
            inside(monkeypatch, node, generation, rank, 3)
            x = torch.zeros(4, dtype=torch.int64)
            with everstep.Checkpointer({"x": x}) as ck:
                assert ck.restore() == 1
            assert x.tolist() == [0, 1, 2, 3]
            draws = [torch.rand(1).item(), np.random.random(), random.random()]
            assert drawn.setdefault(rank, draws) == draws, "not the same each time"
    assert len({tuple(d) for d in drawn.values()}) == 3


def test_without_commits_the_committed_step_stays(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    with everstep.Checkpointer({"x": torch.zeros(1)}, commit_wait=0.05) as ck:
        ck.restore()
        assert ck.step(0)
        deadline = time.monotonic() + 10
        while ck.stats().committed_step < 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        node.say("commit off")
        for n in range(1, 9):
            ck.step(n)
        stats = ck.stats()
    assert 0 in node.steps()
    assert stats.replaced == 0, "a commit of the captured step may be under way"
    assert stats.skipped > 0
    assert stats.waited_seconds < 0.5, "it waits as long each time"


def test_restore_waits_for_the_agent_only_so_long(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    inside(monkeypatch, node, 1)
    with everstep.Checkpointer({"x": torch.zeros(1)}, restore_timeout=0.1) as ck, \
            pytest.raises(everstep.EverstepError, match="within 100 ms what generation 1 starts from"):
        ck.restore()


def test_more_than_memory_is_told_once_and_the_script_runs_on(
        node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    real = _library.Client.begin
    monkeypatch.setattr(_library.Client, "begin", lambda self, step, size, flags: real(self, step, 1 << 43, flags))
    with everstep.Checkpointer({"x": torch.zeros(1)}, directory=tmp_path / "files") as ck:
        ck.restore()
        with pytest.warns(RuntimeWarning, match=r"needs 8\.1 TiB of memory.*steps go to files"):
            assert ck.step(0)
        assert ck.tier == "files"
        assert ck.step(1)


def test_any_rank_whose_memory_does_not_suffice_says_so(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its copies no step is ever committed again, and rank 0 knows nothing of it."""
    node.say("activate 1 2 -1 1")
    inside(monkeypatch, node, 1, 1, 2)
    real = _library.Client.begin
    monkeypatch.setattr(_library.Client, "begin", lambda self, step, size, flags: real(self, step, 1 << 43, flags))
    with everstep.Checkpointer({"x": torch.zeros(1)}) as ck:
        ck.restore()
        with pytest.warns(RuntimeWarning, match="rank 1: needs .*nothing is checkpointed"):
            assert not ck.step(0)


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_fsdp2_shards_go_and_come_as_they_lie(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                              mode: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    inside(monkeypatch, node, 1)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
            torch.manual_seed(seed)
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
            model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
            fully_shard(model, mesh=mesh)
            return model, torch.optim.AdamW(model.parameters(), lr=0.1)

        def train(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> float:
            loss = model(torch.full((2, 8), float(n))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        node.say("activate 1 1 -1 0")
        model, optimizer = build(1)
        monkeypatch.setattr(checkpointer, "_OVERLAP_BYTES", 0)
        with everstep.Checkpointer({"model": model, "optimizer": optimizer}, mode=mode) as ck:
            ck.restore()
            for n in range(3):
                train(model, optimizer, n)
                assert ck.step(n)
            assert ck.stats().mode == mode
            assert mode == "blocking" or ck._plan is not None and ck._plan.late_bytes >= 3 * (8 * 16 + 16 * 4) * 4
        expected = [train(model, optimizer, n) for n in range(3, 6)]
        assert not node.say("survey")["shards"][0]["replicated"]
        node.say("activate 2 1 2 0")
        inside(monkeypatch, node, 2)
        model, optimizer = build(2)
        with everstep.Checkpointer({"model": model, "optimizer": optimizer}) as ck:
            assert ck.restore() == 3
            assert [train(model, optimizer, n) for n in range(3, 6)] == expected
    finally:
        dist.destroy_process_group()


# --- without an agent ---


def test_without_an_agent_it_warns_once_and_the_script_runs_on() -> None:
    run = Run()
    with pytest.warns(RuntimeWarning, match="not started by `everstep run`: nothing is checkpointed") as told:
        ck = everstep.Checkpointer(run.state)
        assert ck.restore() == 0
        assert [ck.step(n) for n in range(3)] == [False] * 3
        everstep.Checkpointer(run.state).close()
        ck.close()
    assert len(told) == 1
    assert ck.tier == "off"


def test_an_agent_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVERSTEP_KEEPER", str(tmp_path / "no.sock"))
    monkeypatch.setenv("EVERSTEP_JOB", "job")
    with pytest.warns(RuntimeWarning, match=r"keeper at .*no\.sock: connecting: No such file"):
        everstep.Checkpointer({"x": 1}).close()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_files_take_its_place_bit_for_bit(tmp_path: Path) -> None:
    losses, bits = undisturbed(10)
    first = Run()
    with everstep.Checkpointer(first.state, directory=tmp_path / "ck") as ck:
        assert ck.restore() == 0
        for n in range(6):
            first.step(n)
            assert ck.step(n)
        assert ck.stats().captured == 6
    assert len(list((tmp_path / "ck").iterdir())) == 2, "the two newest are kept"
    second = Run(seed=5)
    with everstep.Checkpointer(second.state, directory=tmp_path / "ck") as ck:
        assert ck.restore() == 6
        assert [second.step(n) for n in range(6, 10)] == losses[6:]
    assert second.bits() == bits


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "header"])
def test_a_damaged_file_is_passed_over(tmp_path: Path, damage: str) -> None:
    x = torch.zeros(10_000)
    with everstep.Checkpointer({"x": x}, directory=tmp_path) as ck:
        for n in range(2):
            x.fill_(n)
            ck.step(n)
    newest = max(tmp_path.glob("*.everstep"))
    data = bytearray(newest.read_bytes())
    if damage == "flip":
        data[20_000] ^= 1
    elif damage == "header":
        data[17] ^= 1
    newest.write_bytes({"cut": data[:-1], "empty": b""}.get(damage, data))
    (tmp_path / ".step-000000000009.rank-00000-of-00001.everstep.77.part").write_bytes(b"torn")
    x.fill_(-1)
    with everstep.Checkpointer({"x": x}, directory=tmp_path) as ck:
        assert ck.restore() == 1
    assert (x == 0).all()


def flat(value: Any) -> Flattened:
    return Encoder().finish(value, {})


def test_ranks_agree_on_the_newest_step_that_all_have(tmp_path: Path) -> None:
    for rank, steps in ((0, (3, 4)), (1, (2, 3))):
        for step in steps:
            FileTier(tmp_path, rank, 2).save(step, flat({"rank": rank}))
    for rank in (0, 1):
        loaded = FileTier(tmp_path, rank, 2).load(replicated=False)
        assert loaded and (loaded.step, loaded.rank) == (3, rank)
    alone = FileTier(tmp_path, 0, 3)  # another world: any rank's newest of a replicated state, else nothing
    loaded = alone.load(replicated=True)
    assert loaded and loaded.step == 4
    assert alone.load(replicated=False) is None


def test_a_full_disk_is_an_error_and_leaves_the_older_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = FileTier(tmp_path, 0, 1)
    tier.save(1, flat({"x": 1}))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        tier.save(2, flat({"x": 2}))
    assert [p.name[:17] for p in tmp_path.iterdir()] == ["step-000000000001"]


# --- what a state may hold ---


def round_trip(value: Any) -> Any:
    flattened = flat(value)
    payload = bytearray(flattened.payload_bytes)
    import ctypes

    for (address, size), offset in zip(flattened.pieces, flattened.offsets):
        payload[offset:offset + size] = ctypes.string_at(address, size)
    return Decoder(memoryview(payload), flattened.table).root()


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (
            a.contiguous().flatten().view(torch.uint8).tolist() == b.contiguous().flatten().view(torch.uint8).tolist()
            if a.numel() else True)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex):
        return struct.pack("<dd", a.real, a.imag) == struct.pack("<dd", b.real, b.imag)
    return bool(a == b)


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.complex64, torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
          torch.uint16, torch.uint32, torch.uint64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        raw = bytes(b & 1 for b in raw)
    base = torch.frombuffer(bytearray(raw or b"\0" * dtype.itemsize), dtype=torch.uint8).view(dtype)
    tensor = base.reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return tensor.transpose(0, -1) if draw(st.booleans()) and len(shape) > 1 else tensor


keys = st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False) | \
    st.tuples(st.integers(), st.text())
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary() | \
    tensors() | st.sampled_from(DTYPES) | st.just(torch.device("cpu"))
states = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
                      | st.dictionaries(keys, inner, max_size=4)
                      | st.dictionaries(keys, inner, max_size=4).map(OrderedDict), max_leaves=20)


@settings(max_examples=300, deadline=None)
@given(states)
def test_any_nested_state_comes_back_bit_for_bit(state: Any) -> None:
    assert same(round_trip(state), state)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 7))
def test_a_damaged_table_is_an_error_and_never_code(junk: bytes, at: int, bit: int) -> None:
    flattened = flat({"a": torch.zeros(3), "b": [1, 2.5, "x", None], "c": (1j, b"y")})
    for table in (junk, bytes(b ^ (1 << bit) if i == at else b for i, b in enumerate(flattened.table))):
        try:
            Decoder(memoryview(bytearray(flattened.payload_bytes)), table).root()
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, OverflowError, struct.error):
            pass  # a checksum keeps such tables away; what is left must not crash or run anything


class Sampler:
    """A Stateful of one's own: nested containers, numbers of every kind, streams of its own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.numpy = np.random.default_rng(seed)
        self.python = random.Random(seed)
        self.seen: dict[str, Any] = {"order": [torch.arange(seed), {"deep": (None, True, -0.0, math.inf, 1 << 90)}]}

    def state_dict(self) -> dict[str, Any]:
        return {"torch": self.generator.get_state(), "numpy": self.numpy.bit_generator.state, "python": self.python.getstate(),
                "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["torch"])
        self.numpy.bit_generator.state = state["numpy"]
        self.python.setstate(state["python"])
        self.seen = state["seen"]

    def draw(self) -> list[float]:
        return [torch.rand(1, generator=self.generator).item(), self.numpy.random(), self.python.random()]


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_a_stateful_with_streams_of_its_own_goes_on(node: Node, monkeypatch: pytest.MonkeyPatch, mode: Any) -> None:
    node.say("activate 1 1 -1 0")
    inside(monkeypatch, node, 1)
    first = Sampler(3)
    first.draw()
    with everstep.Checkpointer({"sampler": first}, mode=mode) as ck:
        ck.restore()
        assert ck.step(0)
    node.say("activate 2 1 0 0")
    inside(monkeypatch, node, 2)
    second = Sampler(9)
    with everstep.Checkpointer({"sampler": second}) as ck:
        assert ck.restore() == 1
    assert same(second.seen, first.seen)
    assert [second.draw() for _ in range(3)] == [first.draw() for _ in range(3)]


def test_numpy_counters_sizes_and_scalars_come_back() -> None:
    state = {"a": np.arange(6, dtype=">f4").reshape(2, 3), "s": np.float32(1.5), "c": Counter({"x": 2}),
             "z": torch.Size([1, 2]), "u": np.array(["ab", "c"])}
    back = round_trip(state)
    assert back["a"].dtype == np.dtype(">f4") and (back["a"] == state["a"]).all()
    assert back["s"] == np.float32(1.5) and type(back["s"]) is np.float32
    assert back["c"] == Counter({"x": 2}) and type(back["c"]) is Counter
    assert back["z"] == torch.Size([1, 2]) and type(back["z"]) is torch.Size
    assert back["u"].tolist() == ["ab", "c"]


def test_the_same_memory_lies_there_once() -> None:
    shared = torch.rand(1000)
    assert flat({"a": shared, "b": shared}).payload_bytes == 4000
    temporaries = {f"t{i}": torch.rand(10, 10).t() for i in range(20)}  # each contiguous copy is a temporary
    assert same(round_trip(temporaries), temporaries)


class Thing:
    """Nothing a checkpoint could keep."""


ITSELF: list[Any] = []
ITSELF.append({"again": ITSELF})


@pytest.mark.parametrize(("state", "path", "kind"), [
    ({"data": {"inner": [1, {"f": Thing()}]}}, r"data\['inner'\]\[1\]\['f'\]: ", "Thing"),
    ({"data": {1: lambda: 0}}, r"data\[1\]: ", "function"),
    ({"data": [{1, 2}]}, r"data\[0\]: ", "set"),
    ({"data": {Thing: 1}}, "data: .*key", "type"),
    ({"data": torch.zeros(2).to_sparse()}, "data: ", "sparse"),
    ({"data": torch.zeros(2, device="meta")}, "data: ", "meta"),
    ({"data": np.array([object()])}, "data: ", "object"),
    ({"data": torch.Generator()}, "data: ", "Generator"),
    ({"data": [np.random.default_rng()]}, r"data\[0\]: ", "Generator"),
    ({"data": enum.IntEnum("Color", "RED").RED}, "data: ", "Color"),
    ({"data": namedtuple("Pair", "a b")(1, 2)}, "data: ", "Pair"),
    ({"data": deque([1])}, "data: ", "deque"),
    ({"data": torch.ones(2).as_subclass(type("Mine", (torch.Tensor,), {}))}, "data: ", "Mine"),
    ({"data": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "data: ", "quantized Tensor"),
    ({"data": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "data: ", "nested Tensor"),
    ({"data": 1 << 20_000}, "data: ", "int of 20001 bits"),
    ({"data": ITSELF}, r"data.*\.\.\.: ", "contains itself"),
])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_cannot_be_kept_is_named_with_its_path(tmp_path: Path, state: Any, path: str, kind: str) -> None:
    with everstep.Checkpointer(state, directory=tmp_path) as ck, \
            pytest.raises(TypeError, match=f"^{path}cannot checkpoint.*{kind}" if "key" not in path else path):
        ck.step(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    with everstep.Checkpointer({"x": torch.ones(2), "m": nn.Linear(2, 3)}, directory=tmp_path) as ck:
        ck.step(0)
    x = torch.zeros(2)
    for state, told in (({"x": x, "m": nn.Linear(2, 4)}, r"m\.weight: .*\(3, 2\), this rank has .*\(4, 2\)"),
                        ({"x": x, "m": nn.Linear(2, 3, bias=False)}, r"m: .*has besides \['bias'\]"),
                        ({"x": x}, "it has besides 'm'"),
                        ({"x": x, "m": nn.Linear(2, 3).double()}, r"torch\.float32.*torch\.float64")):
        with everstep.Checkpointer(state, directory=tmp_path) as ck, pytest.raises(RuntimeError, match=told):
            ck.restore()
        assert not x.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_moments_keep_their_own_precision(tmp_path: Path) -> None:
    def build() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        return p, torch.optim.AdamW([p])

    p, optimizer = build()
    optimizer.state[p] = {"step": torch.tensor(3.0), "exp_avg": torch.rand(4), "exp_avg_sq": torch.rand(4)}
    with everstep.Checkpointer({"optimizer": optimizer}, directory=tmp_path) as ck:
        ck.step(0)
    q, other = build()
    with everstep.Checkpointer({"optimizer": other}, directory=tmp_path) as ck:
        ck.restore()
    for key, value in optimizer.state[p].items():
        assert same(other.state[q][key], value), key


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_steps_must_grow_and_arguments_make_sense(tmp_path: Path) -> None:
    with everstep.Checkpointer({"x": 1}, directory=tmp_path, every=2) as ck:
        assert [ck.step(n) for n in (0, 1, 2)] == [True, False, True]
        with pytest.raises(ValueError, match="steps must grow"):
            ck.step(2)
    with pytest.raises(RuntimeError, match="closed"):
        ck.step(3)
    for bad, error in (({}, TypeError), ([1], TypeError)):
        with pytest.raises(error):
            everstep.Checkpointer(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every"):
        everstep.Checkpointer({"x": 1}, every=0)
    with pytest.raises(ValueError, match="replicated must be"):
        everstep.Checkpointer({"x": 1}, replicated="parts")  # type: ignore[arg-type]


def test_importing_it_imports_no_torch() -> None:
    code = "import everstep, sys; assert 'torch' not in sys.modules; everstep.Checkpointer; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT / "worker/python")})


def test_capturing_does_not_change_the_run(tmp_path: Path) -> None:
    losses, bits = undisturbed(5)
    run = Run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ck = everstep.Checkpointer(run.state, directory=tmp_path)
    with ck:
        ck.restore()
        for n in range(5):
            assert run.step(n) == losses[n]
            ck.step(n)
    assert run.bits() == bits
