"""A rank of a gloo group that lives through the loss of its peers. Told what to do on stdin, tells on stdout.

    form PREFIX RANK WORLD   forms the group, and a sub-group of all; all-reduces for ever: `formed SECONDS`, `trains WORLD`
    hold                     between two steps: `held`, and does nothing any more
    stop                     SIGSTOP to itself, in the middle of a message of kind `large` or `message`
    leave                    by another thread than the one that is in the collective: `left SECONDS`, dropping the group;
                             or `stuck SECONDS`, and ends: gloo will not let go of it
    count                    between groups: `sockets N`
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from everstep._collectives import Group, _moved, _sockets, lost_peer, release

LARGE = 64 << 20  # bytes


class StandIn(dist.ProcessGroup):
    """Does as NCCL does: no connection of this process ends a collective, abort() does. All-reduces by the store."""

    def __init__(self, store: dist.Store, rank: int, world: int, _: timedelta) -> None:
        super().__init__(rank, world)
        self._store, self._rank, self._world, self._count = store, rank, world, 0
        self._aborted = threading.Event()

    def allreduce(self, tensors: list[torch.Tensor], _: object = None) -> dist.Work:
        self._count += 1
        self._store.set(f"{self._count}/{self._rank}", tensors[0].numpy().tobytes())
        keys = [f"{self._count}/{rank}" for rank in range(self._world)]
        while not self._aborted.is_set():
            if self._store.check(keys):
                tensors[0].copy_(sum(torch.frombuffer(bytearray(self._store.get(key)), dtype=tensors[0].dtype)
                                     for key in keys))
                return Finished()
            time.sleep(0.002)
        raise RuntimeError("communicator was aborted")

    def abort(self) -> None:
        self._aborted.set()

    def getBackendName(self) -> str:  # PyTorch's name
        return "stand_in"


class Finished(dist.Work):
    def wait(self, *_: object) -> bool:
        return True


dist.Backend.register_backend("stand_in", StandIn, devices=["cpu"])


def tell(*words: object) -> None:
    print(*words, flush=True)


def train(kind: str, holds: threading.Event, leaves: threading.Event) -> None:
    """Ends by an exception only."""
    world, step = dist.get_world_size(), 0
    everybody = dist.new_group(timeout=timedelta(seconds=600)) if kind != "aborts" else None
    large = torch.ones(LARGE // 4)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else None
    while True:
        if holds.is_set():
            tell("held")
            leaves.wait()
        if leaves.is_set():  # as a loop with a Session, at the end of its step
            raise ConnectionError("asked to leave")
        if kind == "large":  # of 64 MiB most is under way whenever one looks
            dist.broadcast(large, src=0)
        elif kind == "message":  # the same, and the main thread itself waits for it
            if dist.get_rank() == 0:
                dist.send(large, 1)
            else:
                dist.recv(large, 0)
        else:
            ones = torch.ones(1 << 16, device="cuda" if kind == "nccl" else "cpu")
            dist.all_reduce(ones, group=everybody if step % 2 else None)
            assert ones[-1].item() == world, f"{ones[-1].item()} of {world}"
        if wrapped is not None:
            wrapped(torch.randn(4, 64)).sum().backward()
        step += 1
        if step == 3:
            tell("trains", world)


def stop_in_a_message() -> None:
    while True:
        for descriptor, _ in _sockets():
            moved = _moved(descriptor, None)
            if moved and moved[1] > LARGE and LARGE // 4 < moved[1] % LARGE < LARGE // 2:
                os.kill(os.getpid(), signal.SIGSTOP)
                return
        time.sleep(0)


def main() -> None:
    store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=timedelta(seconds=60))
    group, todo = Group(), queue.Queue[list[str]]()
    holds, leaves = threading.Event(), threading.Event()

    def leave() -> None:
        began = time.perf_counter()
        leaves.set()
        while not group.leave(patience=2.0):
            pass
        while leaves.is_set():
            time.sleep(0.15)
            if leaves.is_set() and group.stuck():
                tell("stuck", f"{time.perf_counter() - began:.3f}")
                os._exit(0)

    def listen() -> None:
        for line in sys.stdin:
            if line.split() == ["leave"]:
                threading.Thread(target=leave, daemon=True).start()
            elif line.split() == ["hold"]:
                holds.set()
            elif line.split() == ["stop"]:
                threading.Thread(target=stop_in_a_message, daemon=True).start()
            else:
                todo.put(line.split())

    threading.Thread(target=listen, daemon=True).start()
    tell("pid", os.getpid())
    while True:
        words = todo.get()
        if words[0] == "count":
            tell("sockets", len(_sockets()))
            continue
        began = time.perf_counter()
        if sys.argv[2] == "nccl":
            torch.cuda.set_device(int(words[2]) % torch.cuda.device_count())
        group.form({"aborts": "stand_in", "nccl": "nccl"}.get(sys.argv[2], "gloo"), store_port=int(sys.argv[1]), store=dist.PrefixStore(words[1], store), rank=int(words[2]),
                   world_size=int(words[3]), timeout=timedelta(seconds=600))
        tell("formed", f"{time.perf_counter() - began:.3f}")
        try:
            train(sys.argv[2], holds, leaves)
        except (RuntimeError, ConnectionError) as error:
            assert lost_peer(error), error
            release(error)
        began = time.perf_counter()
        group.drop()
        holds.clear()
        leaves.clear()
        tell("left", f"{time.perf_counter() - began:.3f}")


if __name__ == "__main__":
    main()
