"""A worker's session with its node's keeper: asked to park, told of the next generation; tells the controller.

The structs and the order of words stand in worker/keeper/attach_protocol.h; a test compares the sizes.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

from everstep._library import EREFUSED, ESTALE, EverstepError, StaleGenerationError
from everstep._told import Teller

MAGIC, VERSION = 0xE57E9A12, 2
REQUEST = struct.Struct("<II132siQ")  # magic, version, job, rank, generation
REPLY = struct.Struct("<Ii8x8x232s")  # magic, error, -, -, message
WORD = struct.Struct("<IIQII")  # magic, kind, generation, bytes, reserved
PARK, PARKED, RESUME, TOLD, TOLD_ACK = 1, 2, 3, 4, 5
_STALE = 116  # errno ESTALE of the reply
_AGAIN = 0.05  # seconds between two calls of on_park, until the worker has parked
_MOST = 4 << 20  # bytes of an environment


@dataclass(frozen=True)
class Resume:
    """What a worker that was parked is now."""

    generation: int
    stdout: str  # files, as those of a fresh worker of that generation
    stderr: str
    environment: dict[str, str]


class Link:
    """The worker's end. parked() and wait_resume() are the training thread's; on_park is called by a thread of the
    link's, again and again until parked(). `boundary`: seconds within which the worker may end its step before it
    parks, since nobody is lost; 0: it must not, its peers wait."""

    def __init__(self, keeper: str, job: str, rank: int, generation: int, on_park: Callable[[], object],
                 timeout: float = 5.0) -> None:
        """Opens the session. Raises OSError (no keeper), StaleGenerationError (this process is to end) or
        EverstepError (the keeper refuses, and says why)."""
        self._on_park = on_park
        self._generation = generation
        self.boundary = 0.0
        self._asked = threading.Event()  # to park
        self._parked = threading.Event()
        self._resumed: queue.SimpleQueue[Resume | None] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._writing = threading.Lock()
        self._teller = Teller(lambda g, words: self._write(TOLD, g, words))
        self._teller.begin(generation)
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(keeper)
            self._socket.sendall(REQUEST.pack(MAGIC, VERSION, job.encode(), rank, generation))
            _, error, message = REPLY.unpack(self._exactly(REPLY.size))
            if error != 0:
                text = message.split(b"\0")[0].decode(errors="replace")
                raise (StaleGenerationError if error == _STALE else EverstepError)(
                    ESTALE if error == _STALE else EREFUSED, text)
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise
        threading.Thread(target=self._listen, name="everstep-session", daemon=True).start()

    @property
    def asked(self) -> bool:
        """The generation is over: park."""
        return self._asked.is_set()

    def wait_asked(self, timeout: float) -> bool:
        """Waits, at most `timeout` seconds, until the worker is asked to park."""
        return self._asked.wait(timeout)

    def parked(self) -> None:
        """Tells the keeper that this worker touches neither its arena nor its peers any more."""
        self._asked.wait()
        self._write(PARKED, self._generation)
        self._parked.set()

    def tell(self, kind: int, body: bytes) -> int:
        """Tells the job's controller, which acknowledges what it has on its disk: everstep._told.Teller.tell."""
        return self._teller.tell(kind, body)

    @property
    def acknowledged(self) -> int:
        """The newest word of this generation that is durable at the controller."""
        return self._teller.acknowledged

    def flush(self, patience: float) -> int:
        """Waits at most `patience` seconds for acknowledgements; returns the words that are not."""
        return self._teller.flush(patience)

    def wait_resume(self) -> Resume:
        """Waits for the next generation, as long as it takes. Raises EverstepError when the keeper is gone."""
        resume = self._resumed.get()
        if resume is None:
            raise EverstepError(EREFUSED, "the node's keeper has ended this worker's session; nothing will resume it")
        return resume

    def close(self) -> None:
        """From now on this worker is ended at a change of the generation. Idempotent."""
        self._teller.close()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _listen(self) -> None:
        words = select.poll()  # not select(), which refuses descriptors from 1024 on
        try:
            words.register(self._socket, select.POLLIN)
            while True:
                if self._asked.is_set() and not self._parked.is_set():
                    # Again and again: it may have been between two collectives, or about to form its group.
                    self._on_park()
                    if not words.poll(_AGAIN * 1e3):
                        continue
                magic, kind, generation, size, _ = WORD.unpack(self._exactly(WORD.size))
                if magic != MAGIC or size > _MOST:
                    break
                texts = self._exactly(size)
                if kind == PARK:
                    self.boundary = int(texts or b"0") / 1e3
                    self._asked.set()
                elif kind == TOLD_ACK:
                    self._teller.heard(generation, int.from_bytes(texts, "little"))
                elif kind == RESUME:
                    stdout, stderr, *pairs = texts.decode(errors="surrogateescape").split("\0")[:-1]
                    self._generation = generation
                    self._teller.begin(generation)
                    self._asked.clear()
                    self._parked.clear()
                    self._resumed.put(Resume(generation, stdout, stderr,
                                             dict(pair.split("=", 1) for pair in pairs)))
        except (OSError, ValueError):
            pass  # closed, by either side
        self._resumed.put(None)

    def _write(self, kind: int, generation: int, body: bytes = b"") -> None:
        with self._writing:
            self._socket.sendall(WORD.pack(MAGIC, kind, generation, len(body), 0) + body)

    def _exactly(self, size: int) -> bytes:
        out = b""
        while len(out) < size:
            piece = self._socket.recv(size - len(out))
            if not piece:
                raise ConnectionError("the node's keeper closed the session")
            out += piece
        return out
