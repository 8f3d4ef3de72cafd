"""The capture that runs while the trainer computes: who waits for it, and who publishes it.

The library's thread copies without the interpreter. A capture is published only when every byte is copied and no
late tensor was changed meanwhile, by whoever finds that first: this module's thread, optimizer.step() (a hook that
PyTorch calls before every optimizer's step), or the next call on the Checkpointer.

What a device copies itself (_staging.py) comes first: optimizer.step() has the device wait for those copies and looks
there and then whether a late tensor was changed; a second thread waits for them and gives the library what landed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from everstep._library import Client, EverstepError, StaleGenerationError, pieces
from everstep._plan import Plan, Step
from everstep._staging import StagingError, Transfer


class _Pending:
    def __init__(self, number: int, step: Step, versions: list[int], transfer: Transfer | None = None) -> None:
        self.number = number
        self.plan: Plan = step.plan  # owns the memory that is read
        self.step = step
        self.versions = versions
        self.transfer = transfer  # the device's copies, until they have landed
        self.staged = transfer is not None  # afterwards late tensors may change
        self.gated = False  # what changes late tensors from here on comes behind the device's copies
        self.changed: list[tuple[str, int]] = []  # before that


class Overlap:
    """Captures of one Client that end while the trainer computes. Thread-safe."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pending: _Pending | None = None
        self._ending = False
        self._error: EverstepError | None = None
        self._failed: list[tuple[int, StagingError]] = []
        self._spoiled: list[tuple[int, list[tuple[str, int]]]] = []
        self.waited_seconds = 0.0  # by optimizer.step(), for copies that were not done
        self._thread: threading.Thread | None = None
        self._follower: threading.Thread | None = None  # waits for the device's copies
        self._follow = threading.Event()
        me = weakref.ref(self)

        def before_step(*_: Any) -> None:
            overlap = me()
            if overlap is not None and overlap._pending is not None:
                began = time.perf_counter()
                overlap._before_step()
                overlap.waited_seconds += time.perf_counter() - began

        self._hook = register_optimizer_step_pre_hook(before_step)

    def start(self, number: int, step: Step) -> None:
        """Begins to copy. REQUIRES: the client's slot is begun and nothing is under way."""
        plan = step.plan
        versions = plan.versions()
        self._client.start(plan.late, step.early, step.table, step.expected if plan.first else None)
        self._pending = _Pending(number, step, versions)
        self._publisher()

    def start_staged(self, number: int, step: Step, transfer: Transfer) -> None:
        """Goes on when the device's copies, which are issued, have landed. REQUIRES: as start()."""
        self._pending = _Pending(number, step, step.plan.versions(), transfer)
        if self._follower is None:
            self._follower = threading.Thread(target=self._run_follower, name="everstep-staging", daemon=True)
            self._follower.start()
        self._follow.set()

    def _publisher(self) -> None:
        if self._thread is None:  # the library has something to watch now
            self._thread = threading.Thread(target=self._run, name="everstep-publish", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Waits until nothing is under way: from then on the late tensors may change."""
        pending = self._pending
        if pending is None or os.getpid() != self._pid:
            return
        if pending.transfer is not None:
            self._landed(pending, pending.transfer)
        if self._pending is pending:
            while not self._client.wait(60.0):
                pass  # memory is copied; it ends
            self._finish(pending)

    def _before_step(self) -> None:
        """Late tensors are about to change."""
        pending = self._pending
        if pending is None or os.getpid() != self._pid:
            return
        if not pending.staged:
            self.settle()
            return
        with self._lock:
            if self._pending is not pending or pending.transfer is None:
                return
            if not pending.gated:
                pending.gated, pending.changed = True, pending.plan.changed(pending.versions)
            try:
                pending.transfer.gate()
            except StagingError as error:
                self._give_up(pending, error)

    def _landed(self, pending: _Pending, transfer: Transfer) -> None:
        """Waits for the device's copies, then has the library take what landed; any thread. Failed: gives it up."""
        try:
            transfer.sync()
        except StagingError as error:
            with self._lock:
                if self._pending is pending and pending.transfer is not None:
                    self._give_up(pending, error)
            return
        with self._lock:
            if self._pending is not pending or pending.transfer is None:
                return
            if not pending.gated:  # nobody waited for the device: it is known here alone that nothing was changed
                pending.gated, pending.changed = True, pending.plan.changed(pending.versions)
            transfer.finished()
            try:
                self._client.start(transfer.piece(0, pending.step.payload_bytes), pieces([]), pending.step.table)
                pending.transfer = None  # not sooner: until the library has begun it has nothing to wait for
            except EverstepError as error:
                self._error = error
                self._client.abort()
                self._pending = None
                return
            self._publisher()

    def _give_up(self, pending: _Pending, error: StagingError) -> None:
        """Holds the lock."""
        self._failed.append((pending.number, error))
        self._client.abort()
        self._pending = None

    def take_error(self) -> EverstepError | None:
        """What went wrong when a capture was published since the last call."""
        error, self._error = self._error, None
        return error

    def take_failed(self) -> list[tuple[int, StagingError]]:
        """Captures given up since the last call, since the device did not copy."""
        failed, self._failed = self._failed, []
        return failed

    def take_spoiled(self) -> list[tuple[int, list[tuple[str, int]]]]:
        """Captures given up since the last call: step, and (name, address) of what was changed meanwhile."""
        spoiled, self._spoiled = self._spoiled, []
        return spoiled

    def close(self) -> None:
        """Ends what is under way, then the thread. Idempotent."""
        self.settle()
        self._hook.remove()
        if os.getpid() != self._pid:
            return
        self._ending = True
        if self._follower is not None:
            self._follow.set()
            self._follower.join()
            self._follower = None
        if self._thread is not None:
            self._client.abort()  # nothing is under way: it wakes the thread
            self._thread.join()
            self._thread = None

    def _finish(self, pending: _Pending) -> None:
        with self._lock:
            if self._pending is not pending or pending.transfer is not None:
                return
            try:
                changed = pending.changed if pending.gated else pending.plan.changed(pending.versions)
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
            if pending is not None and pending.transfer is None and self._client.wait(0.0):
                with contextlib.suppress(Exception):  # never in the trainer's way; what matters is kept in _error
                    self._finish(pending)

    def _run_follower(self) -> None:
        while not self._ending:
            self._follow.wait()
            self._follow.clear()
            pending = self._pending
            if pending is not None and pending.transfer is not None:
                with contextlib.suppress(Exception):  # as above
                    self._landed(pending, pending.transfer)
