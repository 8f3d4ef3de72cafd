"""Ranks that outlive each other, as forks of this process: what keeper and controller do for a Session, in a page.

    rank dies --> the others are told to park --> all have parked --> new ranks, a new group, the same processes

    outcome = survive(5, work)         # work(rank) in each; what a survivor returns, in order of the first ranks

The link is a pipe to this process in place of the keeper's socket; all else of Session runs as it does in a job.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing as mp
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it: once, for all ranks
import torch.distributed as dist
from everstep._session_link import Resume
from everstep._told import HEADER, LEDGER, Teller
from everstep.session import Session

AGAIN = 0.05  # seconds between two calls of on_park, as the real link has it
STARTED_ANEW = 75  # exit code of a worker that cannot live on
BOUNDARY = 15.0  # seconds to end a step where nobody is lost, as agents give them


class PipeLink:
    """What everstep._session_link.Link is to a Session, over a pipe."""

    def __init__(self, pipe: Connection, on_park: Callable[[], object]) -> None:
        self._pipe, self._on_park = pipe, on_park
        self._writing = threading.Lock()
        self._teller = Teller(lambda generation, words: self._send("told", generation, words))
        self._teller.begin(int(os.environ["EVERSTEP_GENERATION"]))
        self.boundary = 0.0
        self._asked, self._parked = threading.Event(), threading.Event()
        self._resumed: queue.SimpleQueue[Resume] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def wait_asked(self, timeout: float) -> bool:
        return self._asked.wait(timeout)

    def parked(self) -> None:
        self._asked.wait()
        self._send("parked")
        self._parked.set()

    def tell(self, kind: int, body: bytes) -> int:
        return self._teller.tell(kind, body)

    @property
    def acknowledged(self) -> int:
        return self._teller.acknowledged

    def flush(self, patience: float) -> int:
        return self._teller.flush(patience)

    def _send(self, *word: Any) -> None:
        with self._writing:
            self._pipe.send(word)

    def wait_resume(self) -> Resume:
        return self._resumed.get()

    def close(self) -> None:
        pass

    def _listen(self) -> None:
        while True:
            if self._asked.is_set() and not self._parked.is_set():
                self._on_park()
                if not self._pipe.poll(AGAIN):
                    continue
            word, *rest = self._pipe.recv()
            if word == "park":
                self.boundary = rest[0]
                self._asked.set()
            elif word == "heard":
                self._teller.heard(*rest)
            elif word == "resume":
                self._teller.begin(rest[0])
                self._asked.clear()
                self._parked.clear()
                self._resumed.put(Resume(*rest))
            else:
                os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then


def join(session: Session) -> None:
    """Asks for the newcomers, from any rank."""
    session._link._send("join")  # type: ignore[union-attr]


def environment(rank: int, world: int, port: int, generation: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "EVERSTEP_GENERATION": str(generation), "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(generation)}


def _child(number: int, work: Callable[[int], Any], pipe: Connection) -> None:
    faulthandler.register(signal.SIGUSR1)
    os.environ |= pipe.recv()
    torch.set_num_threads(1)

    def opened(session: Session) -> None:
        session._link = PipeLink(pipe, session._leave)  # type: ignore[assignment]

    Session._open = opened  # type: ignore[method-assign]
    try:
        answer: tuple[Any, ...] = ("answer", True, work(number))
    except BaseException:
        answer = ("answer", False, traceback.format_exc())
    pipe.send(answer)
    threading.Event().wait()  # until it is told to end: its connections stay until all have answered


class KeptError(AssertionError):
    """A survivor ended itself: the death cut off a message that gloo was sending or receiving, of which it never tells
    (_collectives.py). About one drill in some hundreds; what was to be seen cannot be seen then: do it again."""


@dataclass
class Outcome:
    results: dict[int, Any] = field(default_factory=dict)  # first rank -> what it returned
    died: list[int] = field(default_factory=list)  # first ranks
    pauses: list[float] = field(default_factory=list)  # seconds from a death to everybody's parking
    generations: int = 1
    words: list[str] = field(default_factory=list)  # of the ledger, as they came


def survive(size: int, work: Callable[[int], Any], *, joins: int = 0, seconds: float = 120.0,
            deaf: bool = False) -> Outcome:
    """`joins`: newcomers that begin with the first new generation, after a death or join(session). `deaf`: what ranks tell is heard
    after the first death only. Raises KeptError, or AssertionError with the text of what a survivor raised, or when they
    do not end."""
    context = mp.get_context("fork")
    stores: list[dist.TCPStore] = []
    outcome, deadline = Outcome(), time.monotonic() + seconds
    waiting: dict[int, Connection] = {}
    pipes: dict[int, Connection] = {}
    processes: dict[int, Any] = {}
    heard: dict[tuple[int, int], int] = {}

    def start(number: int) -> None:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(number, work, theirs), daemon=True)
        process.start()
        theirs.close()
        waiting[number], processes[number] = ours, process  # type: ignore[assignment]

    def begin(number: int, first: dict[str, str]) -> None:
        pipes[number] = waiting.pop(number)
        pipes[number].send(first)

    def hear(numbers: list[int]) -> tuple[int, tuple[Any, ...] | None]:
        """The next word of one of them; None: it died."""
        ready = wait([pipes[n] for n in numbers], max(0.0, deadline - time.monotonic()))
        if not ready:
            for process in processes.values():  # each writes where its threads are
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1)
            raise AssertionError(f"{numbers} said nothing within {seconds} s; they said on stderr where they are")
        number = next(n for n in numbers if pipes[n] is ready[0])
        try:
            word = pipes[number].recv()
        except (EOFError, OSError):
            processes[number].join(5)
            if processes[number].exitcode == STARTED_ANEW:
                raise KeptError(f"rank {number} was kept by gloo") from None
            return number, None
        assert word[0] != "answer" or word[1], f"rank {number}:\n{word[2]}"
        return number, word

    def send(number: int, *word: Any) -> None:
        with contextlib.suppress(OSError):  # it has died, which is heard next
            pipes[number].send(word)

    def take(number: int, generation: int, data: bytes) -> int:
        """What the controller does: each word once, in order."""
        while data:
            sequence, kind, size = HEADER.unpack_from(data)
            body, data = data[HEADER.size:HEADER.size + size], data[HEADER.size + size:]
            known = heard.get((number, generation), sequence - 1)
            if sequence == known + 1:
                heard[number, generation] = sequence
                if kind == LEDGER:
                    outcome.words.append(body.decode())
        return heard[number, generation]

    def live() -> list[int]:
        return [n for n in sorted(pipes) if n not in outcome.died]

    try:
        for number in range(size + joins):  # all before a store is made: what its threads hold stays held in a fork
            start(number)
        stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                                    timeout=timedelta(seconds=60)))
        for rank in range(size):
            begin(rank, environment(rank, size, stores[0].port, 1))
        parked: set[int] = set()
        asked, lost = 0.0, 0  # deaths before this generation
        while len(outcome.results) < len(live()):
            number, word = hear([n for n in live() if n not in outcome.results])
            if word is None or word[0] == "join":
                if word is None:
                    outcome.died.append(number)
                    parked.discard(number)
                asked = asked or time.monotonic()
                for n in live():
                    send(n, "park", 0.0 if outcome.died[lost:] else BOUNDARY)
            elif word[0] == "parked":
                parked.add(number)
            elif word[0] == "told":
                generation, data = word[1:]
                if generation == outcome.generations and not asked and (outcome.died or not deaf):
                    send(number, "heard", generation, take(number, generation, data))
            else:
                outcome.results[number] = word[2]
            if asked and parked >= set(live()):
                outcome.pauses.append(time.monotonic() - asked)
                outcome.generations += 1
                stores.append(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
                ranks = live() + sorted(waiting)
                for rank, n in enumerate(ranks):
                    values = environment(rank, len(ranks), stores[-1].port, outcome.generations)
                    if n in pipes:
                        send(n, "resume", outcome.generations, "", "", values)
                    else:
                        begin(n, values)
                parked, asked, lost = set(), 0.0, len(outcome.died)
        for number in live():
            send(number, "end")
        return outcome
    finally:
        for process in processes.values():
            process.kill()
            process.join()
