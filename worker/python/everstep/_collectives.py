"""Leaves a stuck gloo collective, and forms the process group anew in the same process.

gloo cannot abort: ProcessGroup.abort() and shutdown() return at once and unblock nobody. A rank whose peer is dead or
stopped comes out of a collective only when its own connections end, so leave() ends them: it shuts down the TCP
connections that this process has opened since the group began to form. Whoever is blocked then raises.

    group = Group()
    group.form("gloo", store_port=29500, store=store, rank=0, world_size=4)
    ...                        # main thread: collectives, DDP, sub-groups; one of them blocks
    group.leave()              # another thread: the main thread raises within milliseconds
    group.drop()               # main thread, once nobody uses it any more
    group.form("gloo", ..., world_size=3)

Left alone are what listens (shutting gloo's listener ends the process) and the rendezvous store's connection, so that
the same store may serve again; `form` that is under way is left by leave(store=True), which ends that one, too. A
connection that the script itself opens while a group stands is taken for one of the group's.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import stat
import sys
import traceback
from pathlib import Path
from typing import Any

# What gloo, the store and torch.distributed say when a peer or its connection is gone; they throw plain
# RuntimeErrors.
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "timed out",
         "socket closed", "connectfullmesh", "got 0 bytes", "connection was likely closed", "gloo/transport")


class Group:
    """This process's default group, and every sub-group made while it stands. leave() is for any thread."""

    def __init__(self) -> None:
        self._before: frozenset[tuple[int, int]] | None = None  # None: no group
        self._store_port = 0
        self._hook = sys.excepthook

    @property
    def formed(self) -> bool:
        """A group stands or is forming."""
        return self._before is not None

    def form(self, backend: str, *, store_port: int, **options: Any) -> None:
        """torch.distributed.init_process_group(backend, **options). REQUIRES: no group stands.

        `store_port`: of the rendezvous store, by which its connections are told from gloo's. Raises what PyTorch
        does, also when leave(store=True) ended it; drop() before the next attempt.
        """
        import torch.distributed as dist

        self._store_port = store_port
        self._hook = sys.excepthook
        self._before = _sockets()
        dist.init_process_group(backend, **options)

    def leave(self, store: bool = False) -> int:
        """Ends the group's connections; `store`: the store's, too. Returns how many there were. Idempotent."""
        before = self._before
        if before is None:
            return 0
        ended = 0
        for descriptor, _ in sorted(_sockets() - before):
            ended += _shut(descriptor, None if store else self._store_port)
        return ended

    def drop(self) -> None:
        """Destroys the group and its sub-groups. Objects that hold one (DDP, a DeviceMesh) must be gone; release()
        helps. Idempotent."""
        import torch.distributed as dist

        if self._before is None:
            return
        self.leave()
        with contextlib.suppress(Exception):  # what a half-formed group says of itself
            if dist.is_initialized():
                dist.destroy_process_group()
        sys.excepthook = self._hook  # init_process_group put one in front, which names the old rank
        _forget_layouts()
        self._before = None


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


def _shut(descriptor: int, store_port: int | None) -> bool:
    """Ends a TCP connection, whoever owns it. False: it is none, it listens, or it is the store's."""
    try:
        same = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return False
    with same:
        if same.family not in (socket.AF_INET, socket.AF_INET6) or same.type != socket.SOCK_STREAM:
            return False
        try:
            if same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            if store_port is not None:
                ports = [same.getsockname()[1]]
                with contextlib.suppress(OSError):
                    ports.append(same.getpeername()[1])
                if store_port in ports:
                    return False
            same.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False  # ended already
    return True
