"""everstep._collectives: survivors leave a stuck gloo collective in place and form a smaller group in the same process.

    4 ranks, all-reduces on two groups (and DDP's)  --SIGKILL or SIGSTOP of one-->  3 wait for it
    leave() from another thread                     --> the collective raises, the group is dropped
    form() with 3 ranks, same process, same store   --> all-reduces again
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import everstep
import pytest
import torch
import torch.distributed as dist
from everstep._collectives import Group, hosted_store, lost_peer

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "scripts/collectives.py"


class Rank:
    """One process of SCRIPT, which lives through several groups."""

    def __init__(self, port: int, kind: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT / "worker/python"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, SCRIPT, str(port), kind], env=environment, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.told: list[str] = []

    def ask(self, *words: object) -> None:
        assert self.process.stdin
        print(*words, file=self.process.stdin, flush=True)

    def hear(self, *what: str) -> list[str]:
        """The next line that begins with a word of `what`, without it if it is the only one."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.told.append(line.strip())
            if line.split()[:1] and line.split()[0] in what:
                return line.split()[1:] if len(what) == 1 else line.split()
        raise AssertionError(f"it ended with {self.process.wait()} before it said {what!r}: {self.told}")


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))


@contextlib.contextmanager
def ranks(store: dist.TCPStore, count: int, kind: str) -> Iterator[list[Rank]]:
    made = [Rank(store.port, kind) for _ in range(count)]
    alarm = signal.signal(signal.SIGALRM, lambda *_: [r.process.kill() for r in made])
    signal.alarm(150)  # a rank that is stuck says nothing: then all are ended, and hear() tells
    try:
        yield made
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        for rank in made:
            rank.process.kill()
            rank.process.wait()


def form(members: list[Rank], prefix: str) -> None:
    for number, rank in enumerate(members):
        rank.ask("form", prefix, number, len(members))
    for rank in members:
        assert rank.hear("trains") == [str(len(members))]


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} did not stop within 60 s")


@pytest.mark.parametrize(("how", "kind"), [(signal.SIGKILL, "ddp"), (signal.SIGSTOP, "plain"),
                                           (signal.SIGKILL, "aborts"),
                                           pytest.param(signal.SIGKILL, "nccl", marks=pytest.mark.skipif(
                                               torch.cuda.device_count() < 4, reason="needs four GPUs"))])
def test_survivors_leave_and_form_a_smaller_group_in_place(store: dist.TCPStore, how: signal.Signals, kind: str) -> None:
    with ranks(store, 4, kind) as members:
        pids = [rank.hear("pid")[0] for rank in members]
        form(members, "one")
        victim, survivors = members[1], [members[0], *members[2:]]
        victim.ask("hold")  # what is under way when a rank dies gloo does not give up: the next test
        victim.hear("held")
        victim.process.send_signal(how)
        began = time.perf_counter()
        for rank in survivors:
            rank.ask("leave")
        for rank in survivors:
            rank.hear("left")
        left = time.perf_counter() - began
        form(survivors, "two")
        print(f"{kind} {how.name}: left after {left:.3f} s, three steps of the new group after "
              f"{time.perf_counter() - began:.3f} s")
        assert [str(rank.process.pid) for rank in survivors] == [pids[0], *pids[2:]]
        assert all(rank.process.poll() is None for rank in survivors)


@pytest.mark.parametrize("kind", ["large", "message"])
def test_a_message_cut_off_in_the_middle_is_told(store: dist.TCPStore, kind: str) -> None:
    """gloo waits for the rest of it; a rank that says so can be started anew at once."""
    with ranks(store, 2, kind) as members:
        sender, receiver = members
        form(members, "one")
        receiver.ask("stop")
        wait_until_stopped(receiver.process.pid)
        sender.ask("leave")
        word, seconds = sender.hear("left", "stuck")
        assert word == "stuck" and float(seconds) < 5, sender.told


def test_many_changes_leave_no_descriptor_behind(store: dist.TCPStore) -> None:
    left: list[str] = []
    with ranks(store, 2, "plain") as members:
        for change in range(6):
            form(members, f"group-{change}")
            members[0].ask("hold")
            members[0].hear("held")
            members[0].ask("leave")
            for rank in members:  # who was not told hears of it by its own connection
                rank.hear("left")
            members[0].ask("count")
            left += members[0].hear("sockets")
    assert len(set(left)) == 1, left


def test_who_left_a_group_that_never_formed_forms_one_with_a_newcomer(
        store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "RANK": 0, "WORLD_SIZE": 2,
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, str(value))
    group = Group()
    timer = threading.Timer(1.0, lambda: group.leave(store=True))
    timer.start()
    with pytest.raises(RuntimeError):
        group.form("gloo", store_port=store.port, timeout=timedelta(seconds=60))  # the other one never comes
    timer.join()
    group.drop()
    with ranks(store, 1, "plain") as (newcomer,):
        newcomer.ask("form", "two", 1, 2)
        mine = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=20))
        group.form("gloo", store_port=store.port, store=dist.PrefixStore("two", mine), rank=0, world_size=2,
                   timeout=timedelta(seconds=20))
        newcomer.hear("formed")
        group.drop()


@pytest.mark.parametrize("listens", [False, True])
def test_who_looks_for_a_store_that_is_gone_leaves(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`listens`: its host was killed while others still hold the port, and nobody answers there."""
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        if listens:
            gone.listen()
        port = gone.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        group, over, left = Group(), threading.Event(), threading.Event()

        def leave() -> None:  # what a Session's link does
            time.sleep(0.5)
            over.set()
            while not left.wait(0.05):
                group.leave(store=True)

        leaver = threading.Thread(target=leave, daemon=True)
        leaver.start()
        began = time.monotonic()
        with pytest.raises(RuntimeError):
            group.form("gloo", store_port=port, rank=1, world_size=2,
                       connect=lambda: hosted_store(timedelta(seconds=60), over.is_set))
        assert over.is_set() and time.monotonic() - began < 20
        left.set()
        leaver.join()
        group.drop()


def test_what_is_no_group_is_left_alone() -> None:
    group = Group()
    assert not group.formed and group.leave() and not group.stuck()
    group.drop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as mine:
        assert group.leave()
        mine.sendall(b"x")  # nobody ended it


@pytest.mark.parametrize(("error", "lost"), [
    (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ConnectionResetError("x"), True), (KeyError("x"), False)])
def test_a_lost_peer_is_told_from_a_mistake(error: Exception, lost: bool) -> None:
    assert lost_peer(error) is lost
    try:
        raise ValueError("while logging") from error
    except ValueError as outer:
        assert lost_peer(outer) is lost


def test_outside_of_everstep_a_session_trains_once(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EVERSTEP_")]:
        monkeypatch.delenv(name)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port,
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, str(value))
    calls = []

    @everstep.resilient
    def train(session: everstep.Session) -> list[int]:
        calls.append((session.rank, session.world_size, session.generation, dist.get_world_size()))
        start = session.restore({"values": torch.zeros(3)})
        assert not session.step(start)
        return session.share(0, samples=4, batch=4).indices

    with pytest.warns(RuntimeWarning, match="a Session trains once there"):
        assert sorted(train()) == [0, 1, 2, 3]
    assert calls == [(0, 1, 0, 1)]
    assert not dist.is_initialized()

    def mistaken(session: everstep.Session) -> None:
        raise ConnectionError("the script's own")

    with pytest.raises(ConnectionError, match="own"):
        everstep.Session(mistaken).run()
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="'mpi' cannot be left in place; use one of 'gloo', 'nccl'"):
        everstep.Session(mistaken, backend="mpi")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            everstep.Session(mistaken, backend="nccl").run()


def test_a_step_that_an_abort_may_have_cut_off_is_not_captured() -> None:
    class Left:
        aborts, leaving = True, True

    class Kept:
        steps: ClassVar[list[int]] = []

        def step(self, n: int) -> bool:
            self.steps.append(n)
            return True

    session = everstep.Session(lambda _: None)
    session._checkpoint = Kept()  # type: ignore[assignment]
    session._group = Left()  # type: ignore[assignment]
    with pytest.raises(Exception, match="what the device did of step 4 may be cut off"):
        session.step(4)
    Left.leaving = False
    assert session.step(5) and Kept.steps == [5]
