"""This process's arena, shared by every writer and reader in it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from everstep._attach import attach, number
from everstep._library import Client, Slot

_COMMIT_WAIT = 5.0  # seconds for the save before; saves are rare, so it is nearly always long committed
_RESTORE_TIMEOUT = 120.0
_MAX_STEP = (1 << 63) - 1


class Arena:
    """The client and what the process knows of its steps. Hold `lock` around what must not be torn apart."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.lock = threading.RLock()  # async_save writes from a thread of its own
        self.rank = number("RANK", 0)
        self.world_size = max(number("WORLD_SIZE", 1), self.rank + 1)
        self.pid = os.getpid()
        self._last: int | None = None  # of the save or restore before
        self._saved = False

    def newest(self) -> Slot | None:
        """What a load takes now: the newest save of this process, else what its generation starts from."""
        with self.lock:
            slot = self.client.find(_MAX_STEP) if self._saved else self.client.restore(_RESTORE_TIMEOUT)
            if self._last is None:
                self._last = -1 if slot is None else int(slot.step)
            return slot

    def before(self, step: int) -> Slot | None:
        """The other slot, when it is older."""
        with self.lock:
            return self.client.find(step - 1)

    def next_step(self, named: int | None) -> int:
        """The number of the next save: the one that its id ends with, if steps grow with it. The same on every
        rank without asking, since all begin with the same step and save in the same order."""
        with self.lock:
            if self._last is None and self.catalog() is None:
                self.newest()
            assert self._last is not None
            self._last = named if named is not None and named > self._last else self._last + 1
            return self._last

    def saved(self) -> None:
        """A slot was written."""
        self._saved = True

    def catalog(self) -> Slot | None:
        """What another number of ranks saved, all their tables, until this rank has asked for its part."""
        ask: Callable[[float], Slot | None] | None = getattr(self.client, "catalog", None)
        with self.lock:
            found = None if ask is None or self._saved else ask(_RESTORE_TIMEOUT)
            if found is not None and self._last is None:
                self._last = int(found.step)
            return found

    def take(self, catalog: Slot, part: Any, table: bytes) -> Slot | None:
        """Has the agent bring this rank's part. None: it offers other shards by now, since some are gone."""
        client: Any = self.client
        with self.lock:
            client.request(catalog, part.ranges, part.data_bytes, 0, table)
            return None if self.catalog() is not None else self.client.restore(_RESTORE_TIMEOUT)


_arena: Arena | None = None
_lock = threading.Lock()


def arena() -> tuple[Arena | None, str]:
    """The process's arena; None and why there is none."""
    global _arena
    with _lock:
        if _arena is not None and _arena.pid == os.getpid() and _arena.client.attached:
            return _arena, ""
        client, why = attach("everstep.dcp", _COMMIT_WAIT)
        _arena = None if client is None else Arena(client)
        return _arena, why


def close() -> None:
    """Detaches; what was saved stays with the node. For tests and for who goes on with a Checkpointer."""
    global _arena
    with _lock:
        if _arena is not None and _arena.pid == os.getpid():
            _arena.client.close()
        _arena = None
