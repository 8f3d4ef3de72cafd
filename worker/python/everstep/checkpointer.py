"""Checkpointer: a training script's two lines."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

import torch

from everstep import _library
from everstep._alike import LEAST_BYTES, PERIOD, Sameness
from everstep._attach import attach, number, warn
from everstep._files import FileTier
from everstep._interval import Meter, best_interval, explain
from everstep._library import Client, EverstepError, Slot, StaleGenerationError, address_of
from everstep._overlap import Overlap
from everstep._plan import Plan
from everstep._reshard import FILE, Shard, assemble, is_divided, is_shared, read_catalog, reshard
from everstep._sizes import guess_bytes
from everstep._staging import Staging, StagingError, choose
from everstep._state import RNG, Loader, apply, apply_rng, derive_rng, gather
from everstep._stats import Stats
from everstep._table import ALIGNMENT, Decoder, Encoder

_log = logging.getLogger("everstep")
_OVERLAP_BYTES = 1 << 20  # late bytes under which copying at once is quicker than waking a thread
_DECIDE_STEPS = 32  # between two looks at the interval
_AGREE_SECONDS = 60.0  # for rank 0's choice of it


class _Parts:
    """What must be ended in order when a Checkpointer goes, or the interpreter."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self.overlap: Overlap | None = None
        self.staging: Staging | None = None
        self.reserving: threading.Thread | None = None

    def close(self) -> None:
        if self.reserving is not None:
            self.reserving.join()
            self.reserving = None
        if self.overlap is not None:
            self.overlap.close()
            self.overlap = None
        if self.staging is not None:
            self.staging.close()
            self.staging = None
        if self.client is not None:
            self.client.close()
            self.client = None


class Checkpointer:
    """Keeps `state` alive beyond this process: in the node's memory, copied to peers by the agent.

    Args:
        state: name -> object. An object with state_dict() and load_state_dict() (module, optimizer,
            scheduler, sampler, any Stateful), a tensor, or plain nested data. DistributedDataParallel is
            looked through. Plain values are put back into this very mapping.
        directory: used when no agent is there (a run under torchrun, say): a file per rank and step, the two
            newest kept.
        mode: "blocking": step() returns when all is copied. "overlapped": step() copies what the next forward
            may change (buffers, random streams, counters, plain values); parameters and optimizer state are
            copied while the next forward and backward run, and optimizer.step() of any PyTorch optimizer waits
            for what is not yet copied. Whoever changes parameters elsewhere calls wait() before; a capture
            during which they were changed nevertheless is given up, counted and named. "auto": overlapped
            while the state has an optimizer of PyTorch's kind and no capture was spoiled, else blocking. All
            keep the same bytes. Tensors on a CUDA device are copied by the device, beside training's stream.
        every: captures each `every`-th call of step(); "auto": the interval that loses least time, from the
            measured stall, step time and interruptions, looked at every 32 steps, rank 0's for all.
        replicated: every rank's state is the same but for random streams (data parallel), so any rank's copy
            serves any other. None: it is, unless some tensor is a DTensor. The world may change its size either
            way: parts of DTensors are put together anew from the parts that the old ranks held, all else is taken
            to be the same on every rank. Say False when ranks hold different plain tensors (pipeline or hand-made
            tensor parallelism): those are restored by as many ranks as captured them only. "shares": it is the
            same, and the ranks capture it once together: of each parameter and its optimizer state a rank keeps its
            share, 1/N of the memory, of the copying and of what goes to peers; buffers and all else stay whole. The
            price: every restore, also of this rank alone, reads the shares of all ranks over the network, and a step
            survives while each share does, not while any rank's copy does. Files of `directory` stay whole. "auto":
            in shares where it is found to be the same, by a checksum of every rank's parameters and optimizer state
            at a start and every 32 steps, where it is 16 MiB or more, and where other nodes keep copies (or there is
            one node); else whole, and said to differ where it does: it is then restored as with False.
        rng: Python's, numpy's, torch's and CUDA's random streams are part of the state.
        restore_timeout: seconds that restore() waits for the agent, and 10 more for each GB that is on its way.
        commit_wait: seconds that step() waits at most until the step before is held by enough nodes; then it
            skips or replaces it, and waits less the next time.

    Without an agent and without a directory it warns once and does nothing. Not thread-safe.
    """

    def __init__(self, state: Mapping[str, Any], *, directory: str | os.PathLike[str] | None = None,
                 mode: Literal["blocking", "overlapped", "auto"] = "blocking", every: int | Literal["auto"] = 1,
                 replicated: bool | Literal["shares", "auto"] | None = None, rng: bool = True,
                 restore_timeout: float = 120.0, commit_wait: float = 2.0) -> None:
        if not isinstance(state, Mapping) or not state:
            raise TypeError("Checkpointer: state must be a mapping of names to objects, and not empty")
        if mode not in ("blocking", "overlapped", "auto"):
            raise ValueError(f"Checkpointer: mode must be 'blocking', 'overlapped' or 'auto', not {mode!r}")
        if every != "auto" and (not isinstance(every, int) or every < 1):
            raise ValueError(f"Checkpointer: every must be 1 or more, or 'auto', not {every!r}")
        if replicated not in (None, True, False, "shares", "auto"):
            raise ValueError("Checkpointer: replicated must be None, True, False, 'shares' or 'auto', not "
                             f"{replicated!r}")
        self._state = state
        self._mode = mode
        self._auto_every = every == "auto"
        self._every = 1 if every == "auto" else every
        self._why = ""
        self._replicated = replicated
        self._rng = rng
        self._restore_timeout = restore_timeout
        self._rank = number("RANK", 0)
        self._world = max(number("WORLD_SIZE", 1), self._rank + 1)
        self._share = (self._rank, self._world) if replicated == "shares" and self._world > 1 else None
        self._sameness = Sameness(self._rank, self._world) if replicated == "auto" else None
        self._last = -1
        self._captured = 0
        self._bytes = 0
        self._copy_seconds = 0.0
        self._block_seconds = 0.0
        self._meter = Meter()
        self._stepped_at: float | None = None
        self._plan: Plan | None = None
        self._layouts = 0
        self._spoilers: dict[int, int] = {}  # address of a late tensor -> captures that its change spoiled
        self._spoiled = 0
        self._staged = False  # some tensor lies on a device that copies by itself
        self._failed = 0
        self._closed = False
        self._assembled = False  # what restore() found was put together for this rank alone
        self._files = FileTier(directory, self._rank, self._world) if directory is not None else None
        self._parts = _Parts()
        self._parts.client = self._attach(commit_wait)
        if self._parts.client is not None:
            device, may_register = choose()
            if device is not None:
                self._parts.staging = Staging(self._parts.client, device, may_register)
        self._finalizer = weakref.finalize(self, self._parts.close)  # also when the script ends without close()

    @property
    def _client(self) -> Client | None:
        return self._parts.client

    def _attach(self, commit_wait: float) -> Client | None:
        client, why = attach("Checkpointer", commit_wait)
        if client is None:
            self._fall_back(why)
        return client

    def _fall_back(self, why: str) -> None:
        then = (f"steps go to files in {self._files.directory}" if self._files is not None
                else "nothing is checkpointed; give Checkpointer a directory to have files at least")
        # Of a rank that has a keeper the others know nothing: each speaks for itself.
        if self._rank == 0 or "EVERSTEP_KEEPER" in os.environ:
            warn(f"{why}: {then}")

    @property
    def tier(self) -> str:
        """Where steps go: "memory", "files" or "off"."""
        if self._client is not None:
            return "memory"
        return "files" if self._files is not None else "off"

    def restore(self) -> int:
        """Loads the newest state that may be used and returns the step to do next; 0: start from nothing.

        A sharded state (FSDP2, any DTensor) that another number of ranks captured is put together in this
        world's layout, each rank reading the ranges of bytes it lacks from wherever they lie. Optimizers must
        hold their parameters by then. So is a state that was captured in shares, which is then captured anew,
        each rank its share, so that it has its copies again.

        Raises EverstepError when the agent cannot bring the bytes, RuntimeError when they are of another
        model, or when the old ranks did not hold the same tensors; it names them. A torn or damaged state is
        never loaded: every byte is checked while it is copied, and when one is wrong restore() raises and fills
        what it had begun to load with NaN (integers with 0).
        """
        began = time.monotonic()
        found = self._newest(at_load=True)
        if found is None:
            size = guess_bytes(self._state)
            divided = self._share is not None or (self._sameness is not None and size >= LEAST_BYTES)
            self._reserve_ahead(size // self._world if divided else size)
            return 0
        decoder, step, rank, size, load = found
        self._load(decoder, rank, began, load)
        self._last = step
        if self._assembled:
            self._capture(step, at_once=True)
            return step + 1
        self._reserve_ahead(size // (1 if self._share is None else self._world))
        return step + 1

    def view(self) -> tuple[int, dict[str, Any]] | None:
        """What restore() would load, where it lies: its step, and name -> saved state. None: there is none.

        Every byte is checked, none is copied: tensors are the checkpoint's own memory (of a DTensor, the `local`
        part). Read them only, and not after the next step() or close(). Raises EverstepError as restore() does.
        """
        found = self._newest()
        if found is None:
            return None
        decoder, step, *_ = found
        return step, {name: value for name, value in self._saved(decoder).items() if name != RNG}

    def _newest(self, at_load: bool = False) -> tuple[Decoder, int, int, int, Loader | None] | None:
        """The newest state that may be used: itself, its step, the rank that captured it, its bytes, and a loader.
        With `at_load` its tensors are checked by that loader, where there is one; else they are checked."""
        self._open()
        self.wait()
        if self._client is not None:
            began = time.monotonic()
            if self._parts.staging is not None:
                self._parts.staging.release()  # the agent may have made the slots anew
            self._reshard(self._client, began)
            slot = self._client.restore(max(0.0, self._restore_timeout - (time.monotonic() - began)), at_load)
            self._assembled = slot is not None and bool(slot.flags & _library.ASSEMBLED)
            if slot is not None:
                if slot.flags & _library.SHARE:
                    raise RuntimeError(f"step {slot.step} lies here as this rank's share alone: shares are put "
                                       "together when a process starts, before its first step()")
                payload = self._client.payload(slot)
                table = bytes(payload[slot.table_offset:slot.table_offset + slot.table_bytes])
                load = self._loader(self._client, slot, payload) if at_load else None
                return Decoder(payload, table), int(slot.step), int(slot.rank), int(slot.payload_bytes), load
        if self._files is not None:
            loaded = self._files.load(False)
            parts = self._from_shards(self._files, -1 if loaded is None else loaded.step)
            if parts is not None:
                return parts
            loaded = loaded or self._files.load(self._replicated is not False)
            if loaded is not None:
                return Decoder(loaded.payload, loaded.table), loaded.step, loaded.rank, len(loaded.payload), None
        return None

    def _reshard(self, client: Client, began: float) -> None:
        """Asks the agent for this rank's part, when what there is was captured in shares or by another number of
        ranks."""
        while True:  # it may ask anew
            catalog = client.catalog(max(0.0, self._restore_timeout - (time.monotonic() - began)))
            if catalog is None:
                return
            shards = read_catalog(client.payload(catalog))
            _log.info("everstep: rank %d of %d takes its part of step %d from %d shards", self._rank, self._world,
                      catalog.step, len(shards))
            part = reshard(shards, self._state, self._rank, self._replicated is not False)
            shares = self._share is not None or (self._sameness is not None and self._world > 1
                                                 and any(map(is_shared, shards)))
            flags = _library.ASSEMBLED if shares else 0
            client.request(catalog, part.ranges, part.data_bytes, flags, part.table)

    def _from_shards(self, files: FileTier, after: int) -> tuple[Decoder, int, int, int, None] | None:
        """As _newest(): this rank's part of what another number of ranks left in files, when they divided it."""
        found = files.shards(after)
        if found is None:
            return None
        shards = [Shard(f.rank, FILE, len(f.payload), f.table) for f in found]
        if not any(map(is_divided, shards)):
            return None
        part = reshard(shards, self._state, self._rank, self._replicated is not False)
        payload = assemble(part, [f.payload for f in found])
        return Decoder(payload, part.table), found[0].step, self._rank, len(payload), None

    @staticmethod
    def _loader(client: Client, slot: Slot, payload: memoryview) -> Loader:
        base = address_of(payload)
        return lambda parts: client.load(slot, [(source - base, size, to) for to, source, size in parts])

    @staticmethod
    def _saved(decoder: Decoder) -> dict[str, Any]:
        if "dcp" in decoder.meta:
            raise RuntimeError("this rank's memory holds what everstep.dcp saved: load it with "
                               "torch.distributed.checkpoint.load(..., storage_reader=everstep.dcp.StorageReader()), "
                               "or start the job under another --name")
        saved = decoder.root()
        if not isinstance(saved, dict):
            raise ValueError("a state table whose root is no dict")
        return saved

    def _load(self, decoder: Decoder, captured_by: int, began: float, load: Loader | None) -> None:
        saved = self._saved(decoder)
        apply(self._state, saved, load, self._parts.staging)
        if self._rng and RNG in saved:
            if decoder.meta.get("streams_of", captured_by) == self._rank:
                apply_rng(saved[RNG])
            else:
                derive_rng(saved[RNG], self._rank)
        self._meter.restored(decoder.meta, time.monotonic() - began)

    def step(self, n: int) -> bool:
        """Captures the state after step `n` (0, 1, 2, ...; it must grow). False: not captured this time.

        In overlapped mode True means that the capture has begun. Raises TypeError, with its path, for a part of
        the state that cannot be kept.
        """
        self._open()
        if n <= self._last:
            raise ValueError(f"Checkpointer.step({n}): the step before was {self._last}; steps must grow (use the "
                             "global step, not one that starts again each epoch)")
        self._last = n
        if self.tier == "off":
            return False
        began = time.monotonic()
        since = None if self._stepped_at is None else began - self._stepped_at
        self._stepped_at = began
        stood = self._stood()
        captured = False
        try:
            self.wait()
            self._choose_interval(n)
            if n % self._every == 0:
                captured = self._capture(n)
            elif self._client is not None:
                self._client.report_step(n)
            return captured
        finally:
            self._block_seconds += time.monotonic() - began
            self._meter.stepped(since, self._stood() - stood if captured else None)

    def wait(self) -> None:
        """Returns when nothing is being copied: call it before changing parameters or optimizer state outside of
        optimizer.step() in overlapped mode. Raises what went wrong when the capture was published."""
        overlap = self._parts.overlap
        if overlap is None:
            return
        overlap.settle()
        for captured, changed in overlap.take_spoiled():
            self._spoiled += 1
            names = ", ".join(name for name, _ in changed[:3]) + (", ..." if len(changed) > 3 else "")
            warn(f"{names} changed outside of optimizer.step() while step {captured} was being copied: the step is "
                 "not kept; call Checkpointer.wait() before such changes, or use mode='blocking'")
            for _, address in changed:
                self._spoilers[address] = self._spoilers.get(address, 0) + 1
            self._plan = None
        for captured, failure in overlap.take_failed():
            self._fail(captured, failure)
        error = overlap.take_error()
        if error is not None:
            raise error

    def _fail(self, captured: int, failure: StagingError) -> None:
        self._failed += 1
        warn(f"step {captured} is not kept, the one before is: {failure}")

    def _stood(self) -> float:
        overlap = self._parts.overlap
        return self._block_seconds + (overlap.waited_seconds if overlap is not None else 0.0)

    def _overlaps(self, plan: Plan) -> bool:
        if self._mode == "blocking" or plan.late_bytes < _OVERLAP_BYTES:
            return False
        return self._mode == "overlapped" or self._spoiled == 0

    def _choose_interval(self, n: int) -> None:
        if not self._auto_every or n % _DECIDE_STEPS != 0:
            return
        measured = self._meter.measured()
        choice = 1 if measured is None else best_interval(measured)
        if self._world > 1:
            try:
                choice = _from_rank_0(f"everstep/every/{number('EVERSTEP_GENERATION', 0)}/{n}", self._rank, choice)
            except RuntimeError as error:
                choice, measured = self._every, None
                self._why = f"ranks could not agree on an interval: {error}"
        if measured is not None:
            self._why = explain(measured, choice)
        if choice != self._every:
            _log.info("everstep: rank %d captures %s", self._rank, self._why)
        self._every = choice

    def _capture(self, n: int, at_once: bool = False) -> bool:
        meta = {"step": n, "torch": torch.__version__, **self._meter.meta()}
        if self._client is not None:
            try:
                return self._to_memory(n, meta, at_once)
            except EverstepError as error:
                if isinstance(error, StaleGenerationError) or error.code != _library.ENOMEM:
                    raise
                self._plan = None
                self._parts.close()
                self._fall_back(str(error))
        if self._files is None:
            return False
        with torch.no_grad():
            flat = Encoder().finish(gather(self._state, self._rng), meta)
        self._bytes = flat.payload_bytes + len(flat.table)
        began = time.monotonic()
        self._files.save(n, flat)
        self._copy_seconds += time.monotonic() - began
        self._captured += 1
        return True

    def _to_memory(self, n: int, meta: dict[str, object], at_once: bool) -> bool:
        client = self._parts.client
        assert client is not None
        with torch.no_grad():
            if self._plan is None or not self._plan.fits():
                self._lay_out()
            if self._sameness is not None:
                meta |= self._compare(n, self._sameness)
            plan = self._plan
            assert plan is not None
            step = plan.step(meta)
        if self._parts.reserving is not None:
            self._parts.reserving.join()
            self._parts.reserving = None
        replicated = not plan.sharded and "alike" not in meta
        if isinstance(self._replicated, bool):
            replicated = self._replicated
        flags = _library.SHARE if plan.shared else _library.REPLICATED_LAYOUT if replicated else 0
        size = step.payload_bytes + 2 * ALIGNMENT + len(step.table)
        staging = self._parts.staging if step.placed is not None else None
        try:
            if staging is not None:
                staging.prepare(size, flags, reserve=plan.first)
            if not client.begin(n, size, flags):
                return False
        except StagingError as error:
            self._fail(n, error)
            return False
        self._bytes = step.payload_bytes + len(step.table)
        overlaps = self._overlaps(plan) and not at_once
        try:
            if overlaps and self._parts.overlap is None:
                self._parts.overlap = Overlap(client)
            self._staged = staging is not None
            if staging is not None:
                transfer = staging.send(step, size, flags, overlaps)
                if overlaps:
                    assert self._parts.overlap is not None
                    self._parts.overlap.start_staged(n, step, transfer)
                    return True
                transfer.write()
                client.commit(step.table)
            elif overlaps:
                assert self._parts.overlap is not None
                self._parts.overlap.start(n, step)
            else:
                late = len(plan.late)
                client.write(plan.late, step.expected[:late] if plan.first else None)
                client.write(step.early, step.expected[late:] if plan.first else None)
                client.commit(step.table)
        except StagingError as error:
            client.abort()
            self._fail(n, error)
            return False
        except BaseException:
            client.abort()
            raise
        return True

    def _lay_out(self) -> None:
        self._plan = None  # gives the old one's tensors back first
        if self._parts.staging is not None:
            self._parts.staging.forget()
        self._plan = Plan(self._state, self._rng, frozenset(a for a, n in self._spoilers.items() if n > 1),
                          self._share, find_common=self._sameness is not None,
                          owns=None if self._parts.staging is None else self._parts.staging.device.owns)
        self._layouts += 1

    def _compare(self, n: int, sameness: Sameness) -> dict[str, object]:
        """Lays the state out in shares while it is the same on every rank, else whole; what a capture says of it."""
        assert self._plan is not None
        if sameness.due(n):
            was = sameness.same
            sameness.look(n, self._plan.common)
            if sameness.why:
                _log.info("everstep: rank %d captures its whole state: %s", self._rank, sameness.why)
            if was and sameness.same is False:
                warn(f"step {n}: {sameness.why}, and {PERIOD} steps before all were the same; data parallelism keeps "
                     "them equal, so look at this rank's memory and at what changes parameters on one rank alone")
        share = (self._rank, self._world) if sameness.divides(self._plan.common) else None
        if share != self._share:
            self._share = share
            self._lay_out()
        return {"alike": False} if sameness.same is False else {}

    def _reserve_ahead(self, size: int) -> None:
        """Takes the arena's memory while the script prepares its next step."""
        client = self._client
        if client is None or self._parts.reserving is not None:
            return

        def reserve() -> None:
            with contextlib.suppress(EverstepError):  # the first capture meets it again and tells
                client.reserve(size)

        self._parts.reserving = threading.Thread(target=reserve, name="everstep-reserve", daemon=True)
        self._parts.reserving.start()

    def stats(self) -> Stats:
        """Counts and times so far."""
        plan = self._plan
        mode = "overlapped" if self._client is not None and plan is not None and self._overlaps(plan) else "blocking"
        more: dict[str, Any] = {"mode": mode, "every": self._every, "why": self._why, "spoiled": self._spoiled,
                "layouts": self._layouts, "bytes": self._bytes, "shares": plan is not None and plan.shared,
                "staging": self._parts.staging.kind if self._parts.staging is not None and self._staged else "host",
                "failed": self._failed}
        if self._client is None:
            return Stats(self.tier, self._captured, 0, 0, 0.0, self._copy_seconds, self._block_seconds, -1, "",
                         **more)
        raw = self._client.stats()
        return Stats("memory", raw.captured, raw.skipped, raw.replaced, raw.waited_ns / 1e9, raw.copy_ns / 1e9,
                     self._stood(), raw.committed_step, raw.last_skip.decode(), **more)

    def close(self) -> None:
        """Ends the capture under way and detaches. What was captured stays with the node. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._plan = None
            self._finalizer()

    def _open(self) -> None:
        if self._closed:
            raise RuntimeError("this Checkpointer is closed")

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _from_rank_0(key: str, rank: int, value: int) -> int:
    """Rank 0's value for all, through the store of the process group. Raises RuntimeError."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed has no process group")
    store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store.set(key, str(value))
        return value
    store.wait([key], timedelta(seconds=_AGREE_SECONDS))
    return int(store.get(key))
