"""What a worker tells its job's controller: words in order, kept here until they are acknowledged.

Nobody between keeps a word (keeper, agent), so this end says again what was not acknowledged: after an agent's or the
controller's restart nothing is missing, and nothing is taken twice, since each word has its number. The form of words
stands in proto/base/told.h; a test compares.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections import deque
from collections.abc import Callable

LEDGER, PROFILE, PLAN = 1, 2, 3
HEADER = struct.Struct("<QII")  # sequence, kind, bytes
MOST_BODY, MOST_BUNDLE = 256 << 10, 512 << 10  # bytes
MOST_KEPT = 64 << 20  # bytes, not acknowledged
_PAUSE = 0.05  # seconds between two bundles
_FIRST, _LONGEST = 0.5, 4.0  # seconds until what is not acknowledged is said again


class Teller:
    """Thread-safe. One bundle of words is on its way at a time; its thread ends with close()."""

    def __init__(self, send: Callable[[int, bytes], None]) -> None:
        """`send(generation, words)`: writes to the keeper; may raise OSError."""
        self._send = send
        self._change = threading.Condition()
        self._words: deque[tuple[int, bytes]] = deque()  # sequence, as it is sent
        self._kept = 0  # bytes of them
        self._generation = 0
        self._sequence = 0
        self._acknowledged = 0
        self._told = 0  # newest of the bundle that is on its way
        self._again, self._wait, self._last = 0.0, _FIRST, 0.0  # monotonic, seconds, monotonic
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def acknowledged(self) -> int:
        """The newest word that is durable at the controller; 0: none."""
        with self._change:
            return self._acknowledged

    def begin(self, generation: int) -> None:
        """Words are numbered from 1 in each generation; what was not acknowledged in the one before is forgotten."""
        with self._change:
            self._words.clear()
            self._kept = self._sequence = self._acknowledged = self._told = 0
            self._generation = generation
            self._change.notify_all()

    def tell(self, kind: int, body: bytes) -> int:
        """Returns the word's number. Raises ValueError for one that is too large, BufferError when too much is kept
        already: the controller has been away for too long."""
        if len(body) > MOST_BODY:
            raise ValueError(f"a word of {len(body)} bytes; the controller takes at most {MOST_BODY}")
        with self._change:
            if self._kept + len(body) + HEADER.size > MOST_KEPT:
                raise BufferError(f"{self._kept} bytes wait for the controller, the limit is {MOST_KEPT}")
            self._sequence += 1
            word = HEADER.pack(self._sequence, kind, len(body)) + body
            self._words.append((self._sequence, word))
            self._kept += len(word)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="everstep-teller", daemon=True)
                self._thread.start()
            self._change.notify_all()
            return self._sequence

    def heard(self, generation: int, sequence: int) -> None:
        """The controller has the words up to this one on its disk."""
        with self._change:
            if generation != self._generation or sequence > self._sequence:
                return
            while self._words and self._words[0][0] <= sequence:
                self._kept -= len(self._words.popleft()[1])
            self._acknowledged = max(self._acknowledged, sequence)
            if self._acknowledged >= self._told:
                self._told, self._wait = 0, _FIRST
            self._change.notify_all()

    def flush(self, patience: float) -> int:
        """Waits at most `patience` seconds until all is acknowledged; returns the words that are not."""
        with self._change:
            self._change.wait_for(lambda: not self._words or self._closed, patience)
            return len(self._words)

    def close(self) -> None:
        """Nothing is sent any more. Idempotent."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def _bundle(self) -> bytes:
        """The oldest words, as many as go together."""
        words = bytearray()
        for sequence, word in self._words:
            if words and len(words) + len(word) > MOST_BUNDLE:
                break
            words += word
            self._told = sequence
        return bytes(words)

    def _due(self) -> float | None:
        """Seconds until something is to be sent; None: nothing is."""
        if not self._words:
            return None
        return max(0.0, (self._again if self._told else self._last + _PAUSE) - time.monotonic())

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._closed:
                    due = self._due()
                    if due is not None and due <= 0.0:
                        break
                    self._change.wait(due)
                if self._closed:
                    return
                if self._told:  # said before
                    self._wait = min(_LONGEST, 2 * self._wait)
                words, generation = self._bundle(), self._generation
                self._last = time.monotonic()
                self._again = self._last + self._wait
            with contextlib.suppress(OSError):  # the keeper is gone: this process ends with it
                self._send(generation, words)
