"""everstep.dcp in worlds of several ranks: what N ranks saved, M load, from files and from memory.

The ranks are threads of this process, over PyTorch's threaded process group; stock dcp.save and dcp.load run in each.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpointer_test import outside  # noqa: F401
from everstep import _library
from everstep.dcp import StorageReader, StorageWriter, _arena, _plans
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed import multi_threaded_pg

try:
    from everstep._reshard import Range, Resharded, assemble
except ImportError:
    Range = Resharded = assemble = None  # type: ignore[assignment, misc]
by_ranges = pytest.mark.skipif(assemble is None, reason="this package restores nothing by ranges yet")

pytestmark = pytest.mark.filterwarnings("ignore")
WIDTHS = {"rows": (7, 5), "columns": (4, 9), "few": (2, 3), "one": (1,), "deep": (3, 5, 4)}


def ranks(world: int, act: Callable[[int], Any]) -> list[Any]:
    """What `act` answers on each of `world` ranks."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    store, answers, errors = dist.HashStore(), [None] * world, []

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
            answers[rank] = act(rank)
        except BaseException as error:
            errors.append(error)
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        if errors:
            raise errors[0]
        return answers
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        multi_threaded_pg.ProcessLocalGroup.reset()


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    yield
    _plans._tables.clear()
    _plans._plans.clear()


def whole(seed: int) -> dict[str, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)  # ranks are threads: torch's own is everybody's
    return {name: torch.rand(shape, generator=stream) for name, shape in WIDTHS.items()} | {
        "low": torch.rand(6, 4, generator=stream).bfloat16(), "int": torch.arange(11)}


def state(seed: int, world: int, rank: int, layout: str) -> dict[str, Any]:
    """The same tensors, divided by `layout`; a plain one, values, and one that every rank has for itself."""
    tensors = whole(seed)
    if layout == "two":  # two dimensions of the mesh: replicas of halves
        mesh = init_device_mesh("cpu", (world // 2, 2))
        placements: Any = [Replicate(), Shard(0)]
        divided = {k: distribute_tensor(v, mesh, placements) for k, v in tensors.items()}
    else:
        mesh = init_device_mesh("cpu", (world,))
        divided = {k: distribute_tensor(v, mesh, [Shard(v.dim() - 1 if layout == "last" else 0)]) for k, v in tensors.items()}
    return {"model": divided, "plain": torch.full((3,), float(seed)), "step": seed, "nested": [{"text": "é"}, (1, None)]}


def check(loaded: dict[str, Any], seed: int) -> None:
    for name, tensor in whole(seed).items():
        assert torch.equal(loaded["model"][name].full_tensor(), tensor), name
    assert loaded["plain"].tolist() == [seed] * 3
    assert loaded["step"] == seed and loaded["nested"] == [{"text": "é"}, (1, None)]


WORLDS = [(2, "first", 3, "first"), (4, "first", 3, "last"), (3, "last", 1, "first"), (1, "first", 4, "first"),
          (4, "two", 2, "first"), (3, "first", 4, "two"), (3, "first", 3, "first"), (2, "first", 2, "last")]


@pytest.mark.parametrize(("saved", "before", "loads", "after"), WORLDS)
def test_files_load_into_any_world(tmp_path: Path, saved: int, before: str, loads: int, after: str) -> None:
    def save(rank: int) -> None:
        dcp.save(state(5, saved, rank, before), checkpoint_id=tmp_path / "step-5", storage_writer=StorageWriter())

    def load(rank: int) -> None:
        blank = state(1, loads, rank, after)
        dcp.load(blank, storage_reader=StorageReader(tmp_path))
        check(blank, 5)

    ranks(saved, save)
    assert len(list((tmp_path / "step-5").glob("rank-*"))) == saved
    ranks(loads, load)


# --- memory: the arenas of a job, and what agents do for it ---


class Job:
    """All slots of a job, by rank, and the world that captured them: what keepers and agents hold and bring."""

    def __init__(self) -> None:
        self.slots: dict[int, list[tuple[_library.Slot, bytes]]] = {}
        self.catalogs = 0

    def client(self, rank: int, world: int) -> Client:
        return Client(self, rank, world)


class Client:
    """A rank's: the calls of everstep._library.Client that everstep.dcp makes, over bytes of this process."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        self.job, self.rank, self.world, self.attached = job, rank, world, True
        self.asked = not any(s.world_size != world and not s.flags for kept in job.slots.values() for s, _ in kept)
        self._begun: Any = None

    def close(self) -> None:
        self.attached = False

    def begin(self, step: int, size: int, flags: int) -> bool:
        self._begun = step, flags, bytearray()
        return True

    def write(self, array: Any, expected: list[int]) -> None:
        _, _, data = self._begun
        for piece, offset in zip(array, expected):
            data.extend(bytes(offset - len(data)))
            data.extend(ctypes.string_at(piece.data, piece.bytes))

    def commit(self, table: bytes) -> None:
        step, flags, data = self._begun
        data.extend(bytes(-len(data) % 64))
        self._put(step, flags, bytes(data), table)

    def _put(self, step: int, flags: int, data: bytes, table: bytes) -> None:
        slot = _library.Slot(step=step, generation=1, rank=self.rank, world_size=self.world, flags=flags,
                             payload_bytes=len(data) + len(table), table_offset=len(data), table_bytes=len(table))
        self.job.slots.setdefault(self.rank, []).append((slot, data + table))

    def stats(self) -> Any:
        return _library.RawStats(committed_step=1 << 40)

    def _mine(self) -> list[tuple[_library.Slot, bytes]]:
        mine = [(s, p) for s, p in self.job.slots.get(self.rank, []) if s.world_size == self.world or s.flags]
        return mine or [(s, p) for s, p in self.job.slots.get(0, []) if s.flags]

    def find(self, most: int) -> _library.Slot | None:
        return max((s for s, _ in self._mine() if s.step <= most), key=lambda s: s.step, default=None)

    def restore(self, timeout: float) -> _library.Slot | None:
        return self.find(1 << 60)

    def payload(self, slot: _library.Slot) -> memoryview:
        if slot.rank == -1:
            return memoryview(self._catalog()[1])
        return memoryview(bytearray(next(p for s, p in self._mine() if s is slot)))

    def _old(self) -> list[tuple[_library.Slot, bytes]]:
        newest = [max((e for e in kept if e[0].world_size != self.world), key=lambda e: e[0].step, default=None)
                  for _, kept in sorted(self.job.slots.items())]
        return [e for e in newest if e is not None]

    def _catalog(self) -> tuple[_library.Slot, bytes]:
        old = self._old()
        tables = [p[s.table_offset:] for s, p in old]
        at = 32 + 32 * len(old)
        head = struct.pack("<8sIIqQ", b"EVSCATLG", 1, len(old), old[0][0].step, 1)
        for rank, ((s, _), table) in enumerate(zip(old, tables)):
            head += struct.pack("<iIQQQ", rank, 0 if rank == self.rank else 1, s.payload_bytes, at, len(table))
            at += len(table)
        data = head + b"".join(tables)
        return _library.Slot(step=old[0][0].step, generation=1, rank=-1, payload_bytes=len(data)), data

    def catalog(self, timeout: float) -> _library.Slot | None:
        if self.asked:
            return None
        self.job.catalogs += 1
        return self._catalog()[0]

    def request(self, catalog: _library.Slot, listed: Sequence[Any], data_bytes: int, flags: int, table: bytes) -> None:
        old = self._old()
        part = Resharded([Range(*each) for each in listed], data_bytes, table)
        self.asked = True
        self._put(int(catalog.step), flags, bytes(assemble(part, [memoryview(p) for _, p in old])), table)


@by_ranges
@pytest.mark.parametrize(("saved", "before", "loads", "after"), WORLDS[:-1])
def test_memory_loads_into_any_world(monkeypatch: pytest.MonkeyPatch, saved: int, before: str, loads: int, after: str) -> None:
    job, local = Job(), threading.local()
    monkeypatch.setattr(_arena, "arena", lambda: (local.arena, ""))

    def attach(rank: int, world: int) -> None:
        local.arena = _arena.Arena(job.client(rank, world))  # type: ignore[arg-type]
        local.arena.rank, local.arena.world_size = rank, world

    def save(rank: int) -> None:
        attach(rank, saved)
        dcp.save(state(5, saved, rank, before), checkpoint_id="ck/step-5", storage_writer=StorageWriter())

    def go_on(rank: int) -> None:
        attach(rank, loads)
        blank, reader = state(1, loads, rank, after), StorageReader("ck")
        found = reader.newest()
        assert found is not None and (found.id, found.step, found.where) == ("ck/step-5", 5, "memory")
        dcp.load(blank, storage_reader=reader)
        check(blank, 5)
        again = state(2, loads, rank, after)
        dcp.load(again, storage_reader=StorageReader())  # what was put together lies there as any other
        check(again, 5)
        dcp.save(state(6, loads, rank, after), checkpoint_id="ck/step-6", storage_writer=StorageWriter())
        dcp.load(blank, checkpoint_id="ck/step-6", storage_reader=StorageReader())
        check(blank, 6)

    ranks(saved, save)
    ranks(loads, go_on)
    assert (job.catalogs > 0) == (saved != loads and saved != 1)


def test_another_layout_of_as_many_ranks_is_read_from_files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    job, local = Job(), threading.local()
    monkeypatch.setattr(_arena, "arena", lambda: (local.arena, ""))

    def both(rank: int) -> None:
        local.arena = _arena.Arena(job.client(rank, 2))  # type: ignore[arg-type]
        local.arena.rank, local.arena.world_size = rank, 2
        dcp.save(state(5, 2, rank, "first"), checkpoint_id="ck/1", storage_writer=StorageWriter())
        dcp.load(state(1, 2, rank, "last"), storage_reader=StorageReader())

    with pytest.raises(BaseException, match="rank 1 of the 2 that saved step 1 has this part.*--ckpt-dir"):
        ranks(2, both)


def test_ranks_that_found_different_steps_are_told(tmp_path: Path) -> None:
    for n in (1, 2):
        dcp.save({"x": torch.ones(1)}, checkpoint_id=tmp_path / f"step-{n}", storage_writer=StorageWriter(), no_dist=True)

    def load(rank: int) -> None:
        dcp.load({"x": torch.ones(1)}, checkpoint_id=tmp_path / f"step-{rank + 1}", storage_reader=StorageReader())

    with pytest.raises(BaseException, match="rank 0: step 1 .* rank 1: step 2"):
        ranks(2, load)
