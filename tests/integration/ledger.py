"""Reads what scripts/ledger.py wrote and tells whether the steps add up."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    step: int
    rank: int
    world: int
    crc: int
    generation: int
    at: float
    pid: int


def read(folder: Path, since: float = 0.0) -> list[Entry]:
    """All whole lines of all ranks and generations, by time. A line its writer was killed in is left out.

    since: leaves out files that nobody has written to since then (wall clock).
    """
    entries = []
    for file in folder.glob("*.jsonl"):
        if since and file.stat().st_mtime < since:
            continue
        for line in file.read_text().splitlines():
            try:
                entries.append(Entry(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                continue
    return sorted(entries, key=lambda e: e.at)


def check(entries: list[Entry], committed: list[tuple[float, int]], bare: list[tuple[float, float]] | None = None) -> list[str]:
    """What is wrong with a finished run's ledger; empty when all is well.

    committed: (wall clock, committed step) samples taken from the controller while the job ran.
    bare: times (from, to) in which as many copies died as there were of a step: who began then may have lost it.
    """
    wrong: list[str] = []
    by_rank: dict[int, set[int]] = defaultdict(set)
    crcs: dict[tuple[int, int], dict[int, Entry]] = defaultdict(dict)
    starts: dict[tuple[int, int], Entry] = {}
    for e in entries:
        by_rank[e.rank].add(e.step)
        crcs[e.step, e.world].setdefault(e.crc, e)
        key = (e.generation, e.rank)
        if key not in starts or e.step < starts[key].step:
            starts[key] = e
    last = max((e.step for e in entries), default=-1)
    # A step is made when one rank has come out of it: the reduction holds every rank's part, and with a replicated
    # state the others may start from that rank's copy without having written the step down themselves.
    missing = sorted(set(range(last + 1)).difference(*by_rank.values()))
    if missing:
        wrong.append(f"nobody made {len(missing)} of {last + 1} steps, the first is {missing[0]}")
    for (step, world), seen in sorted(crcs.items()):
        if len(seen) > 1:
            told = ", ".join(f"generation {e.generation} rank {e.rank}: {crc:08x}" for crc, e in seen.items())
            wrong.append(f"step {step} at world size {world} has {len(seen)} different states: {told}")
    for (generation, rank), e in sorted(starts.items()):
        # What was committed a second before the generation's first step ended was surely known to its plan only if
        # no newer generation was made; so compare with what was committed before the *previous* generation's last entry,
        # and before this one's first: a worker behind a cut may write down the end of its last step long after.
        before = [x.at for x in entries if x.generation < generation]
        if not before:
            continue
        until = min(max(before), *(x.at for x in entries if x.generation == generation))
        known = max((c for at, c in committed if at <= until), default=-1)
        if e.step <= known and not any(begin <= e.at <= end for begin, end in bare or []):
            wrong.append(f"generation {generation} rank {rank} began with step {e.step}, although step {known} was committed")
        previous = [x.step for x in entries if x.generation < generation]
        if previous and e.step > max(previous) + 1:
            wrong.append(f"generation {generation} rank {rank} began with step {e.step} after step {max(previous)}: a gap")
    return wrong


def redone(entries: list[Entry]) -> dict[int, int]:
    """Steps each generation made again: generation -> newest step of older ones minus its first step, plus 1."""
    result: dict[int, int] = {}
    for generation in sorted({e.generation for e in entries}):
        before = [e.step for e in entries if e.generation < generation]
        mine = [e.step for e in entries if e.generation == generation]
        if before:
            result[generation] = max(0, max(before) + 1 - min(mine))
    return result
