"""Leaves a stuck collective, and forms the process group anew in the same process.

Other backends than gloo (NCCL) are aborted, as torch.distributed._abort_process_group() does it: collectives that are
under way on a device end, and the device's queue runs on with what is not there. So a step is not to be kept unless
all that it put into the queue had run before leave() began: see `leaving`.

gloo cannot abort: ProcessGroup.abort() and shutdown() return at once and unblock nobody. A rank whose peer is dead or
stopped comes out of a collective only when its own connections end, so leave() ends them: it shuts down the TCP
connections that this process has opened since the group began to form. Whoever is blocked then raises.

With one exception: a message that is half sent or half received when its connection ends. gloo does not tell those
who wait for it (Pair::signalException of gloo/transport/tcp/pair.cc passes over tx_ and rx_), and they wait on until
the group's timeout. So leave() ends connections once no bytes move, which is soon, since nobody gets far without the
lost rank; what was under way to or from that rank itself may stay stuck, and stuck() tells.

    group = Group()
    group.form("gloo", store_port=29500, store=store, rank=0, world_size=4)
    ...                        # main thread: collectives, DDP, sub-groups; one of them blocks
    while not group.leave(1):  # another thread: the main thread raises within milliseconds of the last one
        ...
    group.drop()               # main thread, once nobody uses it any more
    group.form("gloo", ..., world_size=3)

Left alone are what listens (shutting gloo's listener ends the process) and the rendezvous store's connection, so that
the same store may serve again; `form` that is under way is left by leave(store=True), which ends that one, too. While
it still looks for its store, whose host may be gone with the generation, hosted_store() lets it go. A connection that
the script itself opens while a group stands is taken for one of the group's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import socket
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

# What gloo, the store and torch.distributed say when a peer or its connection is gone; they throw plain
# RuntimeErrors.
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "timed out",
         "socket closed", "connectfullmesh", "got 0 bytes", "connection was likely closed", "gloo/transport",
         "communicator was aborted", "ncclremoteerror", "ncclsystemerror", "remote process exited")
_LOOK = 0.01  # seconds between two looks at whether bytes move
_MOVED = struct.Struct("<QQ")  # of struct tcp_info, tcp(7): bytes acknowledged and received
_MOVED_AT = 120
_FUTEX = ("202", "98")  # system call numbers of futex(2): x86-64, aarch64
_REALTIME = 256  # FUTEX_CLOCK_REALTIME
_NO_TIMEOUT = "0x0"
_LONG = 20.0  # seconds: no wait of a loop's own is given as long, and no group's timeout is as short
_DROP_PATIENCE = 0.1  # seconds
_ATTEMPTS = 0.25, 2.0  # seconds, of the first and the longest attempt to connect to a store


class Group:
    """This process's default group, and every sub-group made while it stands. leave() is for any thread."""

    def __init__(self) -> None:
        self._before: frozenset[tuple[int, int]] | None = None  # None: no group
        self._store_port = 0
        self._hook = sys.excepthook
        self._leaving = 0.0  # since when; 0: not
        self._aborts = False

    @property
    def formed(self) -> bool:
        """A group stands or is forming."""
        return self._before is not None

    @property
    def aborts(self) -> bool:
        """The group has backends that leave() aborts."""
        return self._aborts

    @property
    def leaving(self) -> bool:
        """leave() has begun since the group began to form; nothing is aborted before this is true."""
        return self._leaving != 0.0

    def form(self, backend: str, *, store_port: int, connect: Callable[[], Any] | None = None,
             **options: Any) -> None:
        """torch.distributed.init_process_group(backend, **options). REQUIRES: no group stands.

        `store_port`: of the rendezvous store, by which its connections are told from gloo's. `connect`: gives a
        client of it; None: `options` have one, or init_process_group looks for it. Raises what PyTorch does, also
        when leave(store=True) ended it; drop() before the next attempt.
        """
        import torch.distributed as dist

        self._store_port = store_port
        self._hook = sys.excepthook
        self._leaving = 0.0
        self._aborts = _aborts(backend)
        if "nccl" in backend:  # else its watchdog ends the process when it sees the loss
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        self._before = _sockets()
        if connect is not None:
            options["store"] = dist.PrefixStore("default_pg", connect())  # as without one
        dist.init_process_group(backend, **options)

    def leave(self, patience: float = 0.0, store: bool = False) -> bool:
        """Ends the group's connections; `store`: the store's, too. Idempotent.

        False: none was ended, since bytes move on one of them and `patience` seconds since the first call are not
        over; call it again.
        """
        before = self._before
        if before is None:
            return True
        if not self._leaving:
            self._leaving = time.monotonic()
            _abort()
        spared = None if store else self._store_port
        mine = sorted(descriptor for descriptor, _ in _sockets() - before)
        moved = {descriptor: _moved(descriptor, spared) for descriptor in mine}
        if time.monotonic() - self._leaving < patience and any(moved.values()):
            time.sleep(_LOOK)
            if any(then is not None and then != _moved(descriptor, spared) for descriptor, then in moved.items()):
                return False
        for descriptor in mine:
            _shut(descriptor, spared)
        return True

    def stuck(self) -> bool:
        """Nothing but the group's timeout will get a thread out of a collective, or the main thread out of a send or
        recv: the connections are gone, and it waits on. False also where the system does not say what a thread waits
        for, and for a main thread whose wait ends within 20 s."""
        before = self._before
        if before is None or not self._leaving:
            return False
        if any(_moved(descriptor, self._store_port) is not None for descriptor, _ in _sockets() - before):
            return False
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it ended
                call = (thread / "syscall").read_text().split()
                if len(call) < 5 or call[0] not in _FUTEX or call[4] == _NO_TIMEOUT:
                    continue
                if (thread / "comm").read_text().strip() == "pt_gloo_runloop":
                    return True  # at rest it waits without a limit, in a collective with one
                if thread.name == str(os.getpid()) and _wait_left(call) > _LONG:
                    return True
        return False

    def drop(self) -> None:
        """Destroys the group and its sub-groups. Objects that hold one (DDP, a DeviceMesh) must be gone; release()
        helps. Idempotent."""
        import torch.distributed as dist

        if self._before is None:
            return
        while not self.leave(_DROP_PATIENCE):
            pass
        with contextlib.suppress(Exception):  # what a half-formed group says of itself
            if dist.is_initialized() and self._aborts:
                dist.distributed_c10d._abort_process_group()
            elif dist.is_initialized():
                dist.destroy_process_group()
            # One that was left while it formed counts all the same, and its number is part of the names under which
            # ranks meet: a rank that starts anew would wait for the others under another name.
            dist.distributed_c10d._world.group_count = 0
        sys.excepthook = self._hook  # init_process_group put one in front, which names the old rank
        _forget_layouts()
        self._before = None


def hosted_store(timeout: timedelta, over: Callable[[], bool]) -> Any:
    """A client of the store that the environment names and a launcher hosts. init_process_group's own looks for one
    that is gone until `timeout`, and nothing ends that; `over()` does here, within two seconds, a quarter at first.
    Then, and after `timeout`, raises what PyTorch does. A host that takes the connection and does not answer is for
    leave(store=True) to end."""
    import torch.distributed as dist

    attempt, longest = _ATTEMPTS
    until = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                  int(os.environ["WORLD_SIZE"]), is_master=False, timeout=timedelta(seconds=attempt))
            store.set_timeout(timeout)
            return store
        except RuntimeError:
            if over() or time.monotonic() >= until:
                raise
            attempt = min(longest, 2 * attempt)


def _aborts(backend: str) -> bool:
    """`backend`: as init_process_group() takes it: "gloo", "nccl", "cpu:gloo,cuda:nccl"."""
    return any(part.split(":")[-1] != "gloo" for part in backend.split(","))


def _abort() -> None:
    """Aborts groups that have other backends than gloo, all at once, since one after the other they can wait for each
    other (github.com/pytorch/pytorch/issues/119797). What torch.distributed knows of them is drop()'s to forget: the
    main thread may be in the middle of a call."""
    import torch
    import torch.distributed as dist

    world = dist.distributed_c10d._world
    groups = [group for group, (backend, _) in list(world.pg_map.items()) if _aborts(str(backend))]
    together = None
    if dist.is_nccl_available():
        for group in groups:
            with contextlib.suppress(RuntimeError):  # it has no such backend
                backend = group._get_backend(torch.device("cuda"))
                together = backend if isinstance(backend, dist.ProcessGroupNCCL) else together
    if together is not None:
        together._group_start()
    for group in groups:
        with contextlib.suppress(RuntimeError):  # drop() tries it again
            group.abort()
    if together is not None:
        together._group_end()


def lost_peer(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when a peer or a connection is gone; a mistake of the script's
    is not."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, (ConnectionError, TimeoutError)):
            return True
        if isinstance(current, RuntimeError):
            text = str(current).lower()
            if any(word in text for word in _LOST):
                return True
        current = current.__cause__ or current.__context__
    return False


def release(error: BaseException | None) -> None:
    """Lets go of what the frames of `error` hold (DDP's reducer, a schedule's stages), cycles included."""
    current, seen = error, set[int]()
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        traceback.clear_frames(current.__traceback__)
        current = current.__cause__ or current.__context__
    gc.collect()


def _wait_left(call: list[str]) -> float:
    """Seconds until a wait of the main thread runs out, which /proc/self/task/*/syscall shows with a limit."""
    # The limit lies on that thread's stack, which is never unmapped; if the thread has gone on, it is any number.
    seconds, nanoseconds = struct.unpack("<qq", ctypes.string_at(int(call[4], 16), 16))
    clock = time.CLOCK_REALTIME if int(call[2], 16) & _REALTIME else time.CLOCK_MONOTONIC
    left: float = seconds + nanoseconds / 1e9 - time.clock_gettime(clock)
    return left


def _forget_layouts() -> None:
    """DTensor remembers by mesh what an operation gives, and two meshes of equal ranks are equal to it, though the
    groups of one are gone and this process has another rank in the other."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    import torch
    from torch.distributed.tensor import DTensor

    with contextlib.suppress(AttributeError):
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear()
    with contextlib.suppress(AttributeError):  # of PyTorch 2.10 and newer
        torch._C._clear_DTensor_sharding_propagator_cache()


def _sockets() -> frozenset[tuple[int, int]]:
    """(descriptor, inode) of every socket of this process; the inode tells a descriptor that was used again."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own, or closed meanwhile
            status = entry.stat()
            if stat.S_ISSOCK(status.st_mode):
                found.append((int(entry.name), status.st_ino))
    return frozenset(found)


@contextlib.contextmanager
def _connection(descriptor: int, store_port: int | None) -> Iterator[socket.socket | None]:
    """A TCP connection, whoever owns it. None: it is none, it listens, it has ended, or it is the store's."""
    try:
        same = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        yield None
        return
    with same:
        yield same if _is_connection(same, store_port) else None


def _is_connection(it: socket.socket, store_port: int | None) -> bool:
    if it.family not in (socket.AF_INET, socket.AF_INET6) or it.type != socket.SOCK_STREAM:
        return False
    try:
        if it.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return False
        ports = [it.getsockname()[1]]
        with contextlib.suppress(OSError):  # no peer yet, or none any more
            ports.append(it.getpeername()[1])
        return store_port is None or store_port not in ports
    except OSError:
        return False


def _moved(descriptor: int, store_port: int | None) -> tuple[int, int] | None:
    """Bytes that a connection sent and received so far. None: as _connection()."""
    with _connection(descriptor, store_port) as same, contextlib.suppress(OSError, struct.error):
        if same is not None:
            sent, received = _MOVED.unpack_from(same.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), _MOVED_AT)
            return sent, received
    return None


def _shut(descriptor: int, store_port: int | None) -> None:
    with _connection(descriptor, store_port) as same, contextlib.suppress(OSError):  # it ended itself
        if same is not None:
            same.shutdown(socket.SHUT_RDWR)
