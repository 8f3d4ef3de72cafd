"""A rank of a gloo group that lives through the loss of its peers. Told what to do on stdin, tells on stdout.

    form PREFIX RANK WORLD   forms the group, and a sub-group of all; all-reduces for ever: `formed SECONDS`, `trains WORLD`
    leave                    by another thread than the one that is in the collective: `left SECONDS`, dropping the group
    count                    between groups: `sockets N`
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from everstep._collectives import Group, _sockets, lost_peer, release


def tell(*words: object) -> None:
    print(*words, flush=True)


def train(group: Group, ddp: bool) -> None:
    """Ends by an exception only."""
    world, step = dist.get_world_size(), 0
    everybody = dist.new_group(timeout=timedelta(seconds=600))
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if ddp else None
    while True:
        ones = torch.ones(1 << 16)
        dist.all_reduce(ones, group=everybody if step % 2 else None)
        assert ones[-1].item() == world, f"{ones[-1].item()} of {world}"
        if wrapped is not None:
            wrapped(torch.randn(4, 64)).sum().backward()
        step += 1
        if step == 3:
            tell("trains", world)


def main() -> None:
    store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=timedelta(seconds=60))
    ddp = sys.argv[2] == "ddp"
    group, todo = Group(), queue.Queue[list[str]]()

    def listen() -> None:
        for line in sys.stdin:
            if line.split() == ["leave"]:
                tell("ended", group.leave())
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
        group.form("gloo", store_port=int(sys.argv[1]), store=dist.PrefixStore(words[1], store), rank=int(words[2]),
                   world_size=int(words[3]), timeout=timedelta(seconds=600))
        tell("formed", f"{time.perf_counter() - began:.3f}")
        try:
            train(group, ddp)
        except RuntimeError as error:
            assert lost_peer(error), error
            release(error)
        began = time.perf_counter()
        group.drop()
        tell("left", f"{time.perf_counter() - began:.3f}")


if __name__ == "__main__":
    main()
