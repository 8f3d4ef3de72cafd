"""What a cluster's processes take, sampled while a test runs: memory, descriptors, threads, and whether that stays flat.

Processes of a test that breaks things live for seconds, so what is compared is the part that a process plays, whoever
plays it: the medians of the first and the last third of the run. Memory is what a process has for itself (RssAnon);
what lies in arenas is counted once, as the memfds of a node's keeper.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

YOUNG = 3.0  # seconds: who is younger still fills its tables
# By how much the last third's median may be above the first's.
MIB_MORE, SHARE_MORE = 8.0, 0.25  # whichever is more
COUNT_MORE = 4  # descriptors; threads
# Tables of the controller's store: each start writes some, compaction merges them, and it opens at most this many
# (max_open_files in controller/store/rocks_store.cc). They are counted apart, against that.
STORE_TABLES = 128


@dataclass(frozen=True)
class Sample:
    at: float
    mib: float
    descriptors: int  # besides tables
    tables: int  # open files of a RocksDB store's tables
    threads: int


def look(pid: int) -> Sample | None:
    """None: it is gone, or too young."""
    folder = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line)
        ticks = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[19])
        if time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK") < YOUNG:
            return None
        files = [target(entry) for entry in os.scandir(folder / "fd")]
        tables = sum(name.endswith(".sst") for name in files)
        return Sample(time.time(), int(status["RssAnon"].split()[0]) / 1024, len(files) - tables, tables, int(status["Threads"]))
    except (OSError, KeyError, ValueError, IndexError):
        return None


def target(entry: os.DirEntry) -> str:
    """Where a descriptor leads; empty: it was closed meanwhile."""
    try:
        return os.readlink(entry.path)
    except FileNotFoundError:
        return ""


def arenas_mib(keeper: int) -> float | None:
    """What the memfds that a keeper holds take."""
    total = 0
    try:
        for entry in os.scandir(f"/proc/{keeper}/fd"):
            if os.readlink(entry.path).startswith("/memfd:"):
                total += os.stat(entry.path).st_blocks * 512
    except OSError:
        return None
    return total / (1 << 20)


class Vitals:
    """Samples until it is stopped. pids: part -> the processes that play it now; "keeper ..." has arenas, too."""

    def __init__(self, pids: Callable[[], dict[str, list[int]]], each: Callable[[], object], every: float = 1.0) -> None:
        """each: called once a round on the same thread."""
        self.pids, self.each, self.every = pids, each, every
        self.samples: dict[str, list[Sample]] = {}
        self.arenas: dict[str, list[tuple[float, float]]] = {}
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.ending.wait(self.every):
            for part, pids in self.pids().items():
                for pid in pids:
                    if sample := look(pid):
                        self.samples.setdefault(part.split()[0], []).append(sample)
                    if part.startswith("keeper") and (mib := arenas_mib(pid)) is not None:
                        self.arenas.setdefault(part, []).append((time.time(), mib))
            self.each()

    def stop(self) -> None:
        self.ending.set()
        self.thread.join()

    def verdict(self) -> tuple[str, list[str]]:
        """The table, and what is not flat."""
        lines = [f"{'PART':12s} {'SAMPLES':>8s}  {'MiB FIRST':>9s} {'LAST':>7s} {'MAX':>7s}  {'FDS FIRST':>9s} {'LAST':>5s} {'MAX':>5s}  "
                 f"{'THREADS FIRST':>13s} {'LAST':>5s} {'MAX':>5s}"]
        wrong = []
        for part, samples in sorted(self.samples.items()):
            first, last = thirds([(s.at, s) for s in samples])
            if not first or not last:
                wrong.append(f"{part}: too few samples to tell whether it grows ({len(samples)})")
                continue
            row = f"{part:12s} {len(samples):8d}  "
            for name, width in (("mib", 9), ("descriptors", 9), ("threads", 13)):
                a, b = median(getattr(s, name) for s in first), median(getattr(s, name) for s in last)
                worst = max(getattr(s, name) for s in samples)
                row += f"{a:{width}.1f} {b:7.1f} {worst:7.1f}  " if name == "mib" else f"{a:{width}.0f} {b:5.0f} {worst:5.0f}  "
                if b > a + (max(MIB_MORE, SHARE_MORE * a) if name == "mib" else COUNT_MORE):
                    wrong.append(f"{part}: {name} grew from {a:.1f} to {b:.1f} (medians of the first and the last third)")
            if tables := max(s.tables for s in samples):
                row += f"tables {tables}"
                if tables > STORE_TABLES:
                    wrong.append(f"{part}: {tables} tables of the store were open at once; its limit is {STORE_TABLES}")
            lines.append(row.rstrip())
        for part, values in sorted(self.arenas.items()):
            first, last = thirds(values)
            if first and last:
                a, b, worst = median(first), median(last), max(v for _, v in values)
                lines.append(f"{'arenas ' + part.split()[1]:12s} {len(values):8d}  {a:9.1f} {b:7.1f} {worst:7.1f}")
                if b > a + max(MIB_MORE, SHARE_MORE * a):
                    wrong.append(f"arenas of {part}: grew from {a:.1f} to {b:.1f} MiB")
        return "\n".join(lines), wrong


def thirds(timed: list) -> tuple[list, list]:
    """The values of the first and the last third of the time that `timed` (pairs of time and value) spans."""
    begin, end = timed[0][0], timed[-1][0]
    return ([v for at, v in timed if at <= begin + (end - begin) / 3], [v for at, v in timed if at >= end - (end - begin) / 3])
