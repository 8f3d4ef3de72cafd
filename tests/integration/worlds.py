"""Ranks of one world as forks of this process: torch is imported once, a world of six costs a second.

    results = world(3, lambda rank: train(rank))      # by rank; what a rank raises, is raised

A rank that does not answer within the limit fails the test, and all are ended.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it: once, for all ranks
import torch.distributed as dist

SECONDS = 60.0


class RankError(AssertionError):
    """What a rank raised: `kind` is the name of its class."""

    def __init__(self, rank: int, kind: str, text: str, trace: str) -> None:
        super().__init__(f"rank {rank}: {kind}: {text}\n{trace}")
        self.kind, self.text = kind, text


def _child(rank: int, size: int, work: Callable[[int], Any], answers: Connection) -> None:
    port = answers.recv()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    try:
        answer: Any = (True, work(rank))
    except BaseException as error:
        answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
    answers.send(answer)
    answers.recv()  # its connections stay until all have answered
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then


def world(size: int, work: Callable[[int], Any], seconds: float = SECONDS) -> list[Any]:
    """Runs work(rank) in `size` processes and answers what they return, by rank. Raises RankError."""
    context = mp.get_context("fork")
    ends, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(rank, size, work, theirs), daemon=True)
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        for end in ends:
            end.send(store.port)
        answers: dict[int, Any] = {}
        while len(answers) < size:
            ready = wait([e for i, e in enumerate(ends) if i not in answers], seconds)
            assert ready, f"ranks {[i for i in range(size) if i not in answers]} did not answer within {seconds} s"
            for end in ready:
                rank = ends.index(end)  # type: ignore[arg-type]
                ok, value = end.recv()  # type: ignore[union-attr]
                if not ok:
                    raise RankError(rank, *value)
                answers[rank] = value
        for end in ends:
            end.send(None)
        return [answers[rank] for rank in range(size)]
    finally:
        for process in processes:
            process.kill()
            process.join()
