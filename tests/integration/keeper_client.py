"""Speaks proto/keeper.proto to a real everstep-keeper, with no protobuf package: just enough of the encoding."""

from __future__ import annotations

import os
import pathlib
import socket
import struct
import subprocess
import time

SCRIPT, MODULE, PROGRAM, RUN_PATH = 1, 2, 3, 4


def _varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = b""
    while n >= 0x80:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def encode(fields: dict[int, object]) -> bytes:
    """Field number -> int, str, bytes (a message), list of them, or dict[str, str] (a map)."""
    out = b""
    for number, value in fields.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            values = [encode({1: k, 2: v}) for k, v in value.items()]
        for v in values:
            if isinstance(v, int):
                out += _varint(number << 3) + _varint(v)
            else:
                raw = os.fsencode(v) if isinstance(v, str) else v
                out += _varint(number << 3 | 2) + _varint(len(raw)) + raw
    return out


def decode(raw: bytes) -> dict[int, list]:
    out: dict[int, list] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        n = shift = 0
        while True:
            byte = raw[at]
            at += 1
            n |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return n - (1 << 64) if n >> 63 else n

    while at < len(raw):
        tag = varint()
        if tag & 7 == 0:
            out.setdefault(tag >> 3, []).append(varint())
        else:
            size = varint()
            out.setdefault(tag >> 3, []).append(raw[at : at + size])
            at += size
    return out


def text(message: dict[int, list], number: int) -> str:
    return message.get(number, [b""])[0].decode()


def number(message: dict[int, list], field: int) -> int:
    return message.get(field, [0])[0]


class Keeper:
    """An everstep-keeper in `folder`, and its owner's connection."""

    def __init__(self, program: str, folder: pathlib.Path):
        self.folder = folder
        self.path = str(folder / "keeper.sock")
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [program, "--socket", self.path, "--node", "n0", "--log", str(folder / "keeper.log"), "--ready-fd", str(write)],
            pass_fds=[write],
            stdin=subprocess.DEVNULL,
        )
        os.close(write)
        with os.fdopen(read) as ready:
            answer = ready.readline().strip()
        assert answer == "ready", answer
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(self.path)
        self.next_id = 0
        self.events: list[dict[int, list]] = []
        self.replies: dict[int, dict[int, list]] = {}
        self.state = decode(self.call(2, {1: 1, 2: 1})[4][0])

    def send(self, body: int, fields: dict[int, object]) -> int:
        self.next_id += 1
        raw = encode({1: self.next_id, body: encode(fields)})
        self.socket.sendall(struct.pack("<I", len(raw)) + raw)
        return self.next_id

    def _read(self, deadline: float) -> None:
        def exactly(n: int) -> bytes:
            out = b""
            while len(out) < n:
                self.socket.settimeout(max(0.01, deadline - time.monotonic()))
                piece = self.socket.recv(n - len(out))
                if not piece:
                    raise ConnectionError("the keeper closed the connection")
                out += piece
            return out

        message = decode(exactly(struct.unpack("<I", exactly(4))[0]))
        if number(message, 1) == 0:
            self.events.append(message)
        else:
            self.replies[number(message, 1)] = message

    def wait_reply(self, id_: int, seconds: float = 90) -> dict[int, list]:
        deadline = time.monotonic() + seconds
        while id_ not in self.replies:
            self._read(deadline)
        return self.replies.pop(id_)

    def call(self, body: int, fields: dict[int, object], seconds: float = 90) -> dict[int, list]:
        reply = self.wait_reply(self.send(body, fields), seconds)
        assert number(reply, 2) == 0, text(reply, 3)
        return reply

    def wait_event(self, wanted, seconds: float = 120):
        """The first event for which wanted(event) is not None; what it returned."""
        deadline = time.monotonic() + seconds
        seen = 0
        while True:
            while seen < len(self.events):
                found = wanted(self.events[seen])
                seen += 1
                if found is not None:
                    return found
            self._read(deadline)

    def fork_server(self, job: str, python: str, kind: int, target: str, args: list[str], env: dict, cwd: str) -> dict:
        """Starts one and waits until it is ready or failed: its last KeeperForkServerState."""
        self.call(3, {1: job, 2: python, 3: env, 4: cwd, 7: kind, 8: target, 9: args})

        def done(event):
            if 7 not in event:
                return None
            state = decode(event[7][0])
            return state if text(state, 1) == job and (number(state, 2) or number(state, 3)) else None

        return self.wait_event(done)

    def spawn(self, job: str, rank: int, *, python: str = "", kind: int = SCRIPT, target: str, args: list[str] = (),
              env: dict, cwd: str, preload: bool, generation: int = 1, out: str, umask: int = 0o22, **more) -> dict:
        """KeeperReply of a spawn; its KeeperSpawned is field 5."""
        fields = {1: job, 2: generation, 3: rank, 4: rank, 5: kind, 6: python, 7: target, 8: list(args), 9: env, 10: cwd,
                  11: umask, 12: int(preload), 14: f"{out}.out", 15: f"{out}.err"}
        if "watch_ms" in more:
            fields |= {16: 1, 17: more["watch_ms"]}
        return self.call(5, fields)

    def wait_exit(self, job: str, rank: int, generation: int = 1, seconds: float = 120) -> int:
        def ended(event):
            if 6 not in event:
                return None
            e = decode(event[6][0])
            same = (text(e, 1), number(e, 2), number(e, 3)) == (job, generation, rank)
            return number(e, 6) if same else None

        return self.wait_event(ended, seconds)

    def close(self) -> None:
        self.call(10, {1: 0})
        self.socket.close()
        self.process.wait(20)
