"""The capture that runs while the trainer computes: who waits for it, and who publishes it.

The library's thread copies without the interpreter. A capture is published only when every byte is copied and no
late tensor was changed meanwhile, by whoever finds that first: this module's thread, optimizer.step() (a hook that
PyTorch calls before every optimizer's step), or the next call on the Checkpointer.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from everstep._library import Client, EverstepError, StaleGenerationError
from everstep._plan import Plan, Step


class _Pending:
    def __init__(self, number: int, plan: Plan, versions: list[int]) -> None:
        self.number = number
        self.plan = plan  # owns the memory that is read
        self.versions = versions


class Overlap:
    """Captures of one Client that end while the trainer computes. Thread-safe."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pending: _Pending | None = None
        self._ending = False
        self._error: EverstepError | None = None
        self._spoiled: list[tuple[int, list[tuple[str, int]]]] = []
        self.waited_seconds = 0.0  # by optimizer.step(), for copies that were not done
        self._thread: threading.Thread | None = None
        me = weakref.ref(self)

        def before_step(*_: Any) -> None:
            overlap = me()
            if overlap is not None and overlap._pending is not None:
                began = time.perf_counter()
                overlap.settle()
                overlap.waited_seconds += time.perf_counter() - began

        self._hook = register_optimizer_step_pre_hook(before_step)

    def start(self, number: int, step: Step) -> None:
        """Begins to copy. REQUIRES: the client's slot is begun and nothing is under way."""
        plan = step.plan
        versions = plan.versions()
        self._client.start(plan.late, step.early, step.table, step.expected if plan.first else None)
        self._pending = _Pending(number, plan, versions)
        if self._thread is None:  # the library has something to watch now
            self._thread = threading.Thread(target=self._run, name="everstep-publish", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Waits until nothing is under way: from then on the late tensors may change."""
        pending = self._pending
        if pending is None or os.getpid() != self._pid:
            return
        while not self._client.wait(60.0):
            pass  # memory is copied; it ends
        self._finish(pending)

    def take_error(self) -> EverstepError | None:
        """What went wrong when a capture was published since the last call."""
        error, self._error = self._error, None
        return error

    def take_spoiled(self) -> list[tuple[int, list[tuple[str, int]]]]:
        """Captures given up since the last call: step, and (name, address) of what was changed meanwhile."""
        spoiled, self._spoiled = self._spoiled, []
        return spoiled

    def close(self) -> None:
        """Ends what is under way, then the thread. Idempotent."""
        self.settle()
        self._hook.remove()
        if self._thread is not None and os.getpid() == self._pid:
            self._ending = True
            self._client.abort()  # nothing is under way: it wakes the thread
            self._thread.join()
            self._thread = None

    def _finish(self, pending: _Pending) -> None:
        with self._lock:
            if self._pending is not pending:
                return
            try:
                changed = pending.plan.changed(pending.versions)
                if changed:
                    self._spoiled.append((pending.number, changed))
                    self._client.abort()
                else:
                    self._client.publish()
            except EverstepError as error:
                self._error = error
                if not isinstance(error, StaleGenerationError):
                    self._client.abort()
            finally:
                self._pending = None

    def _run(self) -> None:
        ended = 0
        while not self._ending:
            # Asleep in the library until a copy has ended: beginning one wakes nobody in the interpreter.
            ended = self._client.watch(ended, 60.0)
            pending = self._pending
            if pending is not None and self._client.wait(0.0):
                with contextlib.suppress(Exception):  # never in the trainer's way; what matters is kept in _error
                    self._finish(pending)
