"""Checkpointer: a training script's two lines."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from everstep import _library
from everstep._files import FileTier
from everstep._library import Client, EverstepError, StaleGenerationError
from everstep._state import RNG, apply, apply_rng, derive_rng, gather, unwrap
from everstep._table import ALIGNMENT, Decoder, Encoder, Flattened

_warned: set[str] = set()
_TABLE_ROOM = 64 << 10  # first guess of a table's size, for the memory taken ahead


@dataclass(frozen=True)
class Stats:
    """What a Checkpointer did since it was made."""

    mode: str  # "memory", "files" or "off"
    captured: int
    skipped: int  # steps not captured, since the one before was still on its way
    replaced: int  # captured steps that were never committed and gave way to newer ones
    waited_seconds: float  # in step(), for commits
    copy_seconds: float  # in step(), from the slot's tearing to its publication
    block_seconds: float  # in step(), all together
    committed_step: int  # newest that the agent reported as held by enough nodes; -1: none
    last_skip: str  # why the newest skip was one


class Checkpointer:
    """Keeps `state` alive beyond this process: in the node's memory, copied to peers by the agent.

    Args:
        state: name -> object. An object with state_dict() and load_state_dict() (module, optimizer,
            scheduler, sampler, any Stateful), a tensor, or plain nested data. DistributedDataParallel is
            looked through. Plain values are put back into this very mapping.
        directory: used when no agent is there (a run under torchrun, say): a file per rank and step, the two
            newest kept.
        every: captures each `every`-th call of step().
        replicated: every rank's state is the same but for random streams (data parallel), so any rank's copy
            serves any other, and the world may change its size. None: it is, unless some tensor is a DTensor.
            Say False when ranks hold different plain tensors (pipeline or hand-made tensor parallelism).
        rng: Python's, numpy's, torch's and CUDA's random streams are part of the state.
        restore_timeout: seconds that restore() waits for the agent.
        commit_wait: seconds that step() waits at most until the step before is held by enough nodes; then it
            skips or replaces it, and waits less the next time.

    Without an agent and without a directory it warns once and does nothing. Not thread-safe.
    """

    def __init__(self, state: Mapping[str, Any], *, directory: str | os.PathLike[str] | None = None,
                 every: int = 1, replicated: bool | None = None, rng: bool = True,
                 restore_timeout: float = 120.0, commit_wait: float = 2.0) -> None:
        if not isinstance(state, Mapping) or not state:
            raise TypeError("Checkpointer: state must be a mapping of names to objects, and not empty")
        if every < 1:
            raise ValueError(f"Checkpointer: every must be 1 or more, not {every}")
        self._state = state
        self._every = every
        self._replicated = replicated
        self._rng = rng
        self._restore_timeout = restore_timeout
        self._rank = _number("RANK", 0)
        self._world = max(_number("WORLD_SIZE", 1), self._rank + 1)
        self._last = -1
        self._captured = 0
        self._copy_seconds = 0.0
        self._block_seconds = 0.0
        self._reserving: threading.Thread | None = None
        self._closed = False
        self._files = FileTier(directory, self._rank, self._world) if directory is not None else None
        self._client = self._attach(commit_wait)

    def _attach(self, commit_wait: float) -> Client | None:
        keeper, job = os.environ.get("EVERSTEP_KEEPER"), os.environ.get("EVERSTEP_JOB")
        why = "this process was not started by `everstep run`"
        if keeper and job:
            try:
                return Client(keeper, job, self._rank, self._world, _number("EVERSTEP_GENERATION", 0), commit_wait)
            except StaleGenerationError:
                raise
            except (OSError, EverstepError) as error:
                why = str(error)
        self._fall_back(why)
        return None

    def _fall_back(self, why: str) -> None:
        then = (f"steps go to files in {self._files.directory}" if self._files is not None
                else "nothing is checkpointed; give Checkpointer a directory to have files at least")
        if self._rank == 0 and why not in _warned:  # one is enough
            _warned.add(why)
            warnings.warn(f"everstep: {why}: {then}", RuntimeWarning, stacklevel=4)

    @property
    def mode(self) -> str:
        """Where steps go: "memory", "files" or "off"."""
        if self._client is not None:
            return "memory"
        return "files" if self._files is not None else "off"

    def restore(self) -> int:
        """Loads the newest state that may be used and returns the step to do next; 0: start from nothing.

        Raises EverstepError when the agent cannot bring the bytes, RuntimeError when they are of another
        model. A torn or damaged state is never loaded.
        """
        self._open()
        if self._client is not None:
            slot = self._client.restore(self._restore_timeout)
            if slot is not None:
                payload = self._client.payload(slot)
                table = bytes(payload[slot.table_offset:slot.table_offset + slot.table_bytes])
                self._load(Decoder(payload, table), slot.rank)
                self._last = slot.step
                return int(slot.step) + 1
        if self._files is not None:
            loaded = self._files.load(self._replicated is not False)
            if loaded is not None:
                self._load(Decoder(loaded.payload, loaded.table), loaded.rank)
                self._last = loaded.step
                return loaded.step + 1
        self._reserve_ahead()
        return 0

    def _load(self, decoder: Decoder, captured_by: int) -> None:
        saved = decoder.root()
        if not isinstance(saved, dict):
            raise ValueError("a state table whose root is no dict")
        apply(self._state, saved)
        if self._rng and RNG in saved:
            if captured_by == self._rank:
                apply_rng(saved[RNG])
            else:
                derive_rng(saved[RNG], self._rank)

    def step(self, n: int) -> bool:
        """Captures the state after step `n` (0, 1, 2, ...; it must grow). False: not captured this time.

        Raises TypeError, with its path, for a part of the state that cannot be kept.
        """
        self._open()
        if n <= self._last:
            raise ValueError(f"Checkpointer.step({n}): the step before was {self._last}; steps must grow (use the "
                             "global step, not one that starts again each epoch)")
        self._last = n
        if self.mode == "off":
            return False
        began = time.monotonic()
        try:
            if n % self._every != 0:
                if self._client is not None:
                    self._client.report_step(n)
                return False
            return self._capture(n)
        finally:
            self._block_seconds += time.monotonic() - began

    def _capture(self, n: int) -> bool:
        encoder = Encoder()
        with torch.no_grad():
            flat = encoder.finish(gather(self._state, self._rng), {"step": n, "torch": torch.__version__})
        if self._client is not None:
            try:
                return self._to_memory(n, flat)
            except EverstepError as error:
                if isinstance(error, StaleGenerationError) or error.code != _library.ENOMEM:
                    raise
                self._client.close()
                self._client = None
                self._fall_back(str(error))
        if self._files is None:
            return False
        began = time.monotonic()
        self._files.save(n, flat)
        self._copy_seconds += time.monotonic() - began
        self._captured += 1
        return True

    def _to_memory(self, n: int, flat: Flattened) -> bool:
        assert self._client is not None
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        replicated = self._replicated if self._replicated is not None else not flat.sharded
        flags = _library.REPLICATED_LAYOUT if replicated else 0
        size = flat.payload_bytes + 2 * ALIGNMENT + len(flat.table)
        if not self._client.begin(n, size, flags):
            return False
        try:
            if self._client.write(flat.pieces) != flat.offsets:
                raise EverstepError(_library.EINTERNAL, "libeverstep.so laid the state out in another way than its "
                                    "table says; build it and this package from the same release")
            self._client.commit(flat.table)
        except BaseException:
            self._client.abort()
            raise
        return True

    def _reserve_ahead(self) -> None:
        """Takes the arena's memory while the script prepares its first step."""
        if self._client is None:
            return
        size = _TABLE_ROOM
        for value in map(unwrap, self._state.values()):
            if isinstance(value, torch.nn.Module):
                size += sum(_local_bytes(t) for t in value.state_dict().values() if isinstance(t, torch.Tensor))
            elif isinstance(value, torch.optim.Optimizer):
                for group in value.param_groups:
                    moments = 2 if "betas" in group else 1 if group.get("momentum") else 0
                    size += moments * sum(_local_bytes(p) for p in group["params"] if p.requires_grad)
        client = self._client

        def reserve() -> None:
            with contextlib.suppress(EverstepError):  # the first capture meets it again and tells
                client.reserve(size + size // 64)

        self._reserving = threading.Thread(target=reserve, name="everstep-reserve", daemon=True)
        self._reserving.start()

    def stats(self) -> Stats:
        """Counts and times so far."""
        if self._client is None:
            return Stats(self.mode, self._captured, 0, 0, 0.0, self._copy_seconds, self._block_seconds, -1, "")
        raw = self._client.stats()
        return Stats("memory", raw.captured, raw.skipped, raw.replaced, raw.waited_ns / 1e9, raw.copy_ns / 1e9,
                     self._block_seconds, raw.committed_step, raw.last_skip.decode())

    def close(self) -> None:
        """Detaches. What was captured stays with the node. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        if self._client is not None:
            self._client.close()

    def _open(self) -> None:
        if self._closed:
            raise RuntimeError("this Checkpointer is closed")

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.lstrip("-").isdigit() else default


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") and hasattr(tensor, "placements") else tensor
    return int(local.numel() * local.element_size())
