"""The plans for the loss of any one rank, made while the job trains: at a loss the plan is looked up.

A thread of the lowest priority makes them, one call of the planner a plan, without the interpreter's lock; it ends by
itself after some seconds, whatever it has. What is not in the book (two losses at once, a plan that is not made yet)
is made at the loss, with the book's templates. Every answer is the one that `_planner.ask` gives.
"""

from __future__ import annotations

import contextlib
import ctypes as c
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from everstep.pipeline._planner import Plan, PlanRefusedError, answered, ask, load, request

_AFTER = 0.1  # seconds: the first step of the new plan has begun
_LONGEST = 20.0  # seconds
_LEAST_PRIORITY = 19
_HOW = ("made anew", "made with the book's templates", "from the book")


@dataclass(frozen=True)
class Job:
    """The plan that ranks might be lost from."""

    profile: str
    plan: Plan
    nodes: Sequence[int]  # of the plan
    newcomer: int  # the number that the next newcomer gets
    most_nodes: int
    microbatches: int
    faults: int
    horizon_ms: int


class _Pages:
    """The plans for one number of faults; libeverstep_plan.so owns them."""

    def __init__(self, text: bytes) -> None:
        self._library = load()
        error = c.create_string_buffer(1 << 12)
        self._book = self._library.everstep_plan_book_open(text, len(text), error, len(error))
        if self._book is None:
            raise PlanRefusedError(error.value.decode(errors="replace"))
        # Not when the interpreter ends: a thread may still be at it.
        weakref.finalize(self, self._library.everstep_plan_book_close, self._book).atexit = False

    def make(self) -> int:
        """One more; returns how many are left."""
        return int(self._library.everstep_plan_book_make(self._book, 1))

    def ask(self, text: bytes) -> tuple[Plan, str]:
        """The plan, and which way it came. Raises PlanRefusedError."""
        how = c.c_uint32()
        plan = answered(lambda answer, room: int(self._library.everstep_plan_book_ask(
            self._book, text, len(text), answer, room, c.byref(how))))
        return plan, _HOW[how.value]


class Book:
    """Of one plan at a time. One thread's, which asks; it has another one make."""

    def __init__(self) -> None:
        self._pages: dict[int, _Pages] = {}  # by faults
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.how = ""  # the newest answer came

    def ask(self, text: bytes, faults: int) -> Plan:
        """As _planner.ask(text), whose faults are these. Raises PlanRefusedError, OSError."""
        pages = self._pages.get(faults)
        self.how = _HOW[0]
        if pages is None:
            return ask(text)
        plan, self.how = pages.ask(text)
        return plan

    def open(self, job: Job) -> None:
        """Drops what it has and begins the plans for `job`, in the background."""
        self.close(0)
        if len(job.nodes) < 2:
            return
        self._pages, self._stop = {}, threading.Event()
        self._thread = threading.Thread(name="plan-book", target=_make, args=(job, self._pages, self._stop),
                                        daemon=True)
        self._thread.start()

    def close(self, seconds: float = 1.0) -> None:
        """Ends the making, and waits for that so long."""
        self._stop.set()
        if self._thread is not None and seconds > 0:
            self._thread.join(seconds)
        self._pages, self._thread = {}, None

    def whole(self, seconds: float) -> bool:
        """Waits until the making has ended. For tests and measurements."""
        if self._thread is not None:
            self._thread.join(seconds)
        return self._thread is None or not self._thread.is_alive()


def _make(job: Job, into: dict[int, _Pages], stop: threading.Event) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
    if stop.wait(_AFTER):
        return
    end = time.monotonic() + _LONGEST
    # With fewer ranks than faults need, fewer faults are asked for: down to those that the ranks left can bear.
    for faults in range(job.faults, -1, -1):
        try:
            pages = _Pages(request(job.profile, nodes=job.nodes, microbatches=job.microbatches, faults=faults,
                                   most_nodes=job.most_nodes, before=job.plan, horizon_ms=job.horizon_ms,
                                   newcomer=job.newcomer))
        except (PlanRefusedError, OSError):
            return  # more ranks than a book has
        into[faults] = pages
        while not stop.is_set() and time.monotonic() < end and pages.make() > 0:
            pass
        if stop.is_set():
            return
        with contextlib.suppress(PlanRefusedError):
            pages.ask(request(job.profile, nodes=job.nodes[1:], microbatches=job.microbatches, faults=faults,
                              most_nodes=job.most_nodes, before=job.plan, horizon_ms=job.horizon_ms))
            return
