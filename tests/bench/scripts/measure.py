"""What the measured scripts share: the unit of measure, and how a figure reaches the benchmark."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import statistics
import time
from pathlib import Path
from typing import Any

import torch


class Copier:
    """One plain memcpy of the state's bytes, both sides warm. Calling it gives its seconds."""

    def __init__(self, size: int) -> None:
        self.source, self.target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
        for _ in range(3):
            self()

    def __call__(self) -> float:
        began = time.perf_counter()
        ctypes.memmove(self.target.data_ptr(), self.source.data_ptr(), self.source.numel())
        return time.perf_counter() - began

    def median(self, runs: int = 5) -> float:
        return statistics.median(self() for _ in range(runs))


def tell(**row: Any) -> None:
    """One JSON line in $BENCH_OUT; lines of several processes do not mix."""
    with open(os.environ["BENCH_OUT"], "a") as file:
        file.write(json.dumps(row) + "\n")


def footprint(mark: str, folder: Path) -> int:
    """Bytes of memory of all processes that have BENCH_RUN=`mark` in their environment, whoever started them: their own
    pages, and once each the shared ones (tmpfs, memfd, shared memory) that they hold open or have mapped, and `folder`'s."""
    own, shared = 0, {}

    def add(path: str) -> None:
        try:
            s = os.stat(path)
        except OSError:
            return
        if stat.S_ISREG(s.st_mode) and os.major(s.st_dev) == 0:  # a device without a disk: tmpfs, memfd, shm
            shared[(s.st_dev, s.st_ino)] = s.st_blocks * 512

    for root, _, files in os.walk(folder):
        for name in files:
            add(os.path.join(root, name))
    for pid in (p for p in os.listdir("/proc") if p.isdigit()):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if f"BENCH_RUN={mark}".encode() not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{pid}/smaps_rollup") as file:
                own += sum(int(line.split()[1]) << 10 for line in file if line.startswith("Pss_Anon:"))
            for kind in ("fd", "map_files"):
                for name in os.listdir(f"/proc/{pid}/{kind}"):
                    add(f"/proc/{pid}/{kind}/{name}")
        except OSError:
            continue  # it has ended
    return own + sum(shared.values())
