"""What the measured scripts share: the unit of measure, and how a figure reaches the benchmark."""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import time
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
