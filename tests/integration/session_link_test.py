"""The keeper's sessions: a worker parks in place of being killed, and is what the next spawn of its local rank gets.

A real keeper, and workers that speak everstep._session_link without PyTorch.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from everstep import _session_link as wire
from everstep import _told
from everstep._library import EverstepError, StaleGenerationError
from keeper_client import Keeper, decode, number

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = os.path.join(os.environ.get("EVERSTEP_BIN", ROOT / "build/release/bin"), "everstep-keeper")
SCRIPT = ROOT / "tests/integration/scripts/parked.py"
KILL, HELLO, TOLD_ACK = 6, 2, 11


def test_the_structs_are_the_headers() -> None:
    header = (ROOT / "worker/keeper/attach_protocol.h").read_text()
    sizes = {name: int(size) for name, size in re.findall(r"static_assert\(sizeof\((\w+)\) == (\d+)\)", header)}
    assert (wire.REQUEST.size, wire.REPLY.size, wire.WORD.size) == (
        sizes["SessionRequest"], sizes["AttachReply"], sizes["SessionWord"])
    assert f"kSessionMagic = 0x{wire.MAGIC:X}" in header
    assert f"kSessionVersion = {wire.VERSION};" in header
    kinds = {name: int(value) for name, value in re.findall(r"(k\w+) = (\d)[,\n]", header)}
    assert kinds == {"kPark": wire.PARK, "kParked": wire.PARKED, "kResume": wire.RESUME, "kTold": wire.TOLD,
                     "kToldAck": wire.TOLD_ACK}


def test_words_are_the_headers() -> None:
    header = (ROOT / "proto/base/told.h").read_text()
    assert re.findall(r"k(?:Ledger|Profile|Plan) = (\d),", header) == [str(_told.LEDGER), str(_told.PROFILE),
                                                                      str(_told.PLAN)]
    limits = {name: int(size) << int(shift)
              for name, size, shift in re.findall(r"k(\w+) = (\d+)u << (\d+);", header)}
    assert limits == {"MaxToldBody": _told.MOST_BODY, "MaxToldBytes": _told.MOST_BUNDLE}
    assert f"kToldHeader = {_told.HEADER.size};" in header


class Node:
    """A keeper and the workers of one job."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.keeper = Keeper(PROGRAM, folder)

    def out(self, rank: int, generation: int) -> pathlib.Path:
        return self.folder / f"logs/{generation}-{rank}.out"

    def spawn(self, generation: int, rank: int = 0, *, how: str = "", local_rank: int = 0) -> tuple[int, bool]:
        """Process id, and whether it is one that was parked."""
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "worker/python"), "RANK": str(rank),
               "WORLD_SIZE": str(generation * 10), "EVERSTEP_JOB": "job", "EVERSTEP_GENERATION": str(generation),
               "EVERSTEP_KEEPER": self.keeper.path}
        out = str(self.out(rank, generation))
        reply = self.keeper.call(5, {1: "job", 2: generation, 3: rank, 4: local_rank, 5: 1, 6: sys.executable,
                                     7: str(SCRIPT), 8: [how] if how else [], 9: env, 10: str(self.folder), 11: 0o22,
                                     14: out, 15: out + ".err"})
        spawned = decode(reply[5][0])
        return number(spawned, 1), bool(number(spawned, 3))

    def told(self, rank: int, generation: int, word: str) -> list[str]:
        """The words after `word` in the worker's output."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            file = self.out(rank, generation)
            for line in file.read_text().split("\n")[:-1] if file.exists() else []:  # an unbuffered one comes in pieces
                if line.split()[0] == word:
                    return line.split()[1:]
            time.sleep(0.01)
        raise AssertionError(f"rank {rank} did not say {word!r}\n{(self.folder / 'keeper.log').read_text()}")

    def opened(self, rank: int = 0, generation: int = 1) -> None:
        self.told(rank, generation, "open")

    def park(self, generation: int, park_ms: int = 30_000, grace_ms: int = 100, planned: int = 0) -> None:
        self.keeper.events.clear()
        self.keeper.call(KILL, {1: "job", 2: generation, 3: -1, 4: signal.SIGTERM, 5: grace_ms, 7: 1, 8: park_ms,
                                9: planned})

    def parked(self, rank: int, generation: int) -> int:
        """Its process id, once the keeper says that it is parked."""
        def seen(event: dict[int, list]) -> int | None:
            told = decode(event[11][0]) if 11 in event else {}
            return number(told, 4) if told and (number(told, 3), number(told, 2)) == (rank, generation) else None

        return self.keeper.wait_event(seen)


@pytest.fixture
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    made = Node(tmp_path_factory.mktemp("k"))
    (made.folder / "logs").mkdir()
    yield made
    made.keeper.close()


def test_a_parked_worker_goes_on_with_another_rank_in_the_same_process(node: Node) -> None:
    pid, resumed = node.spawn(1, 2)
    assert not resumed
    node.opened(2)
    node.park(1)
    assert node.parked(2, 1) == pid
    assert node.spawn(2, 1) == (pid, True)
    assert node.told(1, 2, "resumed") == ["2", "1", "20", str(pid)]
    node.park(2)  # and again
    assert node.parked(1, 2) == pid
    node.park(3)  # a second prepare, while it is parked: told again
    assert node.parked(1, 2) == pid
    assert node.spawn(4, 1) == (pid, True)
    os.kill(pid, signal.SIGKILL)
    assert node.keeper.wait_exit("job", 1, 4) == -signal.SIGKILL


def test_where_nobody_is_lost_a_worker_may_end_its_step_until_somebody_is(node: Node) -> None:
    pid, _ = node.spawn(1, how="ends")
    node.opened()
    node.park(1, park_ms=30_000, planned=1)
    assert node.told(0, 1, "may") == ["30.0"]
    node.park(1, park_ms=40_000, planned=1)  # it has less than that already
    assert not any(11 in event for event in node.keeper.events)
    node.park(2, park_ms=5_000)
    assert node.parked(0, 1) == pid


def test_who_does_not_park_is_killed_and_a_new_process_takes_its_place(node: Node) -> None:
    pid, _ = node.spawn(1, 0, how="deaf")
    node.opened()
    node.park(1, park_ms=200)
    assert node.keeper.wait_exit("job", 0, 1) == -signal.SIGKILL
    again, resumed = node.spawn(2, 0)
    assert again != pid and not resumed


def test_who_closes_its_session_or_never_opened_one_is_ended_as_ever(node: Node) -> None:
    node.spawn(1, 0, how="leaves")
    node.opened()
    node.park(1)
    assert node.keeper.wait_exit("job", 0, 1) in (-signal.SIGTERM, -signal.SIGKILL)


def test_a_stopped_worker_is_not_waited_for(node: Node) -> None:
    pid, _ = node.spawn(1)
    node.opened()
    os.kill(pid, signal.SIGSTOP)

    def stalled(event: dict[int, list]) -> bool | None:
        return True if 10 in event else None

    node.keeper.wait_event(stalled)
    began = time.monotonic()
    node.park(1, park_ms=60_000)
    assert node.keeper.wait_exit("job", 0, 1) in (-signal.SIGTERM, -signal.SIGKILL)
    assert time.monotonic() - began < 50


def test_one_that_dies_parked_is_started_anew(node: Node) -> None:
    pid, _ = node.spawn(1)
    node.opened()
    node.park(1)
    node.parked(0, 1)
    os.kill(pid, signal.SIGKILL)
    assert node.keeper.wait_exit("job", 0, 1) == -signal.SIGKILL
    again, resumed = node.spawn(2)
    assert again != pid and not resumed
    node.opened(0, 2)


def test_a_kill_without_park_ends_the_parked(node: Node) -> None:
    node.spawn(1)
    node.opened()
    node.park(1)
    node.parked(0, 1)
    node.keeper.call(KILL, {1: "job", 2: 1, 3: -1, 4: signal.SIGTERM, 5: 5000})
    assert node.keeper.wait_exit("job", 0, 1) == -signal.SIGTERM


def test_another_agent_finds_it_parked(node: Node) -> None:
    pid, _ = node.spawn(1)
    node.opened()
    node.park(1)
    node.parked(0, 1)
    node.keeper.socket.close()
    node.keeper.socket = socket.socket(socket.AF_UNIX)
    node.keeper.socket.connect(node.keeper.path)
    state = decode(node.keeper.call(HELLO, {1: 1, 2: 1})[4][0])
    (process,) = map(decode, state[4])
    assert (number(process, 5), number(process, 6), number(process, 12)) == (pid, 1, 1)
    assert node.spawn(2) == (pid, True)


def words(event: dict[int, list]) -> list[tuple[int, int, bytes]] | None:
    """(sequence, kind, body) of a KeeperTold; None: another event."""
    if 12 not in event:
        return None
    out, data = [], decode(event[12][0])[4][0]
    while data:
        sequence, kind, size = _told.HEADER.unpack_from(data)
        out.append((sequence, kind, bytes(data[_told.HEADER.size:_told.HEADER.size + size])))
        data = data[_told.HEADER.size + size:]
    return out


def test_what_a_worker_tells_is_said_again_until_it_is_acknowledged(node: Node) -> None:
    node.spawn(1, 0, how="tells")
    assert node.keeper.wait_event(words)[0] == (1, _told.LEDGER, b"one")
    # The agent dies with it, and another one comes.
    node.keeper.socket.close()
    node.keeper.socket = socket.socket(socket.AF_UNIX)
    node.keeper.socket.connect(node.keeper.path)
    node.keeper.events.clear()
    node.keeper.call(HELLO, {1: 1, 2: 1})
    all_of_them = [(1, _told.LEDGER, b"one"), (2, _told.PLAN, b"two"), (3, _told.LEDGER, b"")]
    assert node.keeper.wait_event(lambda e: words(e) if words(e) == all_of_them else None)
    node.keeper.call(TOLD_ACK, {1: "job", 2: 1, 3: 0, 4: 2})
    assert node.keeper.wait_event(lambda e: words(e) if words(e) == all_of_them[2:] else None)
    node.keeper.call(TOLD_ACK, {1: "job", 2: 0, 3: 0, 4: 3})  # another generation's
    node.keeper.call(TOLD_ACK, {1: "job", 2: 1, 3: 0, 4: 3})
    assert node.told(0, 1, "acknowledged") == ["3", "0"]


def test_a_parked_worker_tells_nothing_and_begins_anew_when_it_is_resumed(node: Node) -> None:
    node.spawn(1, 0, how="tells")
    node.keeper.wait_event(words)
    node.park(1)
    node.parked(0, 1)
    node.keeper.events.clear()
    assert node.spawn(2)[1]
    assert node.keeper.wait_event(words)[0] == (1, _told.LEDGER, b"one of 2")


def test_a_teller_keeps_what_is_not_acknowledged_and_no_more_than_it_may() -> None:
    sent: list[bytes] = []
    teller = _told.Teller(lambda generation, data: sent.append(data))
    with pytest.raises(ValueError, match="takes at most"):
        teller.tell(_told.PLAN, bytes(_told.MOST_BODY + 1))
    teller.begin(3)
    count = 0
    with pytest.raises(BufferError, match="the limit is"):
        while True:
            count = teller.tell(_told.LEDGER, bytes(_told.MOST_BODY))
    assert count == _told.MOST_KEPT // (_told.MOST_BODY + _told.HEADER.size)
    assert teller.flush(0.2) == count and 0 < len(sent[0]) <= _told.MOST_BUNDLE
    teller.heard(2, count)  # a generation that is over
    teller.heard(3, count + 1)  # never told
    assert teller.acknowledged == 0
    teller.heard(3, count)
    assert teller.flush(10) == 0 and teller.acknowledged == count
    teller.close()


@pytest.mark.parametrize(("generation", "raised"), [(1, EverstepError), (0, StaleGenerationError)])
def test_only_the_worker_itself_opens_its_session(node: Node, generation: int, raised: type[Exception]) -> None:
    node.keeper.call(KILL, {1: "job", 2: 0, 3: -1, 4: signal.SIGTERM, 5: 0})
    node.spawn(1)
    opened: Callable[[], wire.Link] = lambda: wire.Link(node.keeper.path, "job", 0, generation, lambda: None)  # noqa: E731
    with pytest.raises(raised, match="is not the process that was started as rank 0"):
        opened()
