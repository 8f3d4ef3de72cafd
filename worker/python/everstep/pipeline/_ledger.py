"""Which (step, microbatch) went into the model, a line each, and whether that was each of them once.

    {"begin": 17, "generation": 3, "microbatches": 8, "pipelines": [[0, 5], [5, 8]], "ranks": [[0, 1, 3], [2, 4]],
     "before": {"step": 16, ...}}
    {"step": 17, "generation": 3, "parts": [[0, 5], [5, 8]], "samples": 2774529115, "loss": 2.31}

`begin` is written when a generation begins and takes back what earlier generations wrote from that step on: it was
lost with those who held it. It tells the step before once more, since rank 0 may have died between taking that and
writing it down. A part [first, end] is the microbatches first .. end-1 of one
pipeline; `samples` is a
checksum of the microbatches' checksums of their samples' numbers.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep import _samples
from everstep._attach import warn

Write = Callable[[bytes], object]


class Ledger:
    """Rank 0's. `write` is given whole lines; to_directory() makes one that appends to a file."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def begin(self, generation: int, step: int, microbatches: int, pipelines: Sequence[tuple[int, int]],
              ranks: Sequence[Sequence[int]], before: dict[str, Any] | None) -> None:
        """A generation that goes on with `step`; `before`: what step_line() gave of the one before."""
        self._line({"begin": step, "generation": generation, "microbatches": microbatches,
                    "pipelines": [list(p) for p in pipelines], "ranks": [list(r) for r in ranks], "before": before})

    def step(self, line: dict[str, Any]) -> None:
        """A step that every rank has the gradients of, and this one has taken."""
        self._line(line)

    def _line(self, values: dict[str, Any]) -> None:
        self._write((json.dumps(values, separators=(",", ":")) + "\n").encode())


Line = tuple[int, bool, str]  # step, whether a generation begins with it, the word that says so
_MOST_IN_FILES = 4096


class Told:
    """Of a job with a controller: every rank keeps the lines that it cannot know to be durable there, rank 0 tells
    them. When rank 0 is lost, whoever is rank 0 then tells what is missing. docs/internals/ledger.md.

    A line here is a word of controller/core/ledger.h, beside the step that it is of."""

    def __init__(self, tell: Callable[[bytes], int], acknowledged: Callable[[], int]) -> None:
        """`tell(word)` gives its number, `acknowledged()` the newest number that is durable."""
        self._tell = tell
        self._acknowledged = acknowledged
        self._lines: deque[Line] = deque()
        self._numbers: deque[tuple[int, int]] = deque()  # number, step; of lines that this rank told as rank 0
        self._durable = -1
        self._telling = False

    @property
    def unknown(self) -> tuple[Line, ...]:
        """What may not be durable yet, oldest first."""
        return tuple(self._lines)

    @property
    def for_files(self) -> list[list[Any]]:
        """The newest of it."""
        return [list(line) for line in self.unknown[-_MOST_IN_FILES:]]

    @property
    def durable(self) -> int:
        """Rank 0's: the newest step whose line is durable; -1: none that it knows of."""
        newest = self._acknowledged()
        while self._numbers and self._numbers[0][0] <= newest:
            self._durable = self._numbers.popleft()[1]
        return self._durable

    def heard(self, step: int) -> None:
        """Rank 0 knows the line of this step to be durable, and all before it."""
        while self._lines and self._lines[0][0] <= step:
            self._lines.popleft()

    def pause(self) -> None:
        """Its generation is over: nothing is told before begin()."""
        self._telling = False

    def begin(self, lines: Iterable[Line], rank: int, generation: int, step: int, microbatches: int,
              pipelines: Sequence[tuple[int, int]], ranks: Sequence[Sequence[int]]) -> None:
        """A generation goes on with `step`. `lines`: what the rank knew that knows most; of later steps they do not
        count any more."""
        kept = [line for line in lines if line[1] or line[0] < step]
        rows = " ".join(f"{first}-{end}@{'.'.join(map(str, row))}" for (first, end), row in zip(pipelines, ranks))
        self._lines = deque(kept)
        self._numbers.clear()
        self._durable = -1
        self._telling = rank == 0
        for step_of, begins, word in kept:
            self._say(step_of, begins, word)
        self._add(step, True, f"begin {step} {generation} {microbatches} {rows}")

    def step(self, line: Mapping[str, Any]) -> None:
        """A step that this rank has taken."""
        bits = struct.unpack("<Q", struct.pack("<d", line["loss"]))[0]
        by = line.get("by")
        rest = "=" if by is None else " ".join(f"{first}-{end}@{generation}.{pipeline}" for
                                               (first, end), (generation, pipeline) in zip(line["parts"], by))
        step = line["step"]
        self._add(step, False, f"step {step} {line['generation']} {line['samples']:x} {bits:x} {rest}")

    def _add(self, step: int, begins: bool, word: str) -> None:
        self._lines.append((step, begins, word))
        self._say(step, begins, word)

    def _say(self, step: int, begins: bool, word: str) -> None:
        if not self._telling:
            return
        try:
            number = self._tell(word.encode())
        except (ValueError, BufferError) as error:
            self._telling = False  # what is missing then is a gap that the ledger names
            warn(f"the ledger of this job is not whole from step {step} on: {error}")
            return
        if not begins:
            self._numbers.append((number, step))


def to_directory(directory: str | os.PathLike[str]) -> Write:
    """Appends to DIRECTORY/ledger.jsonl, each line whole."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "ledger.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    return lambda line: os.write(descriptor, line)


def step_line(generation: int, step: int, parts: Iterable[Sequence[int]], samples: int, loss: float,
              by: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
    """What is written of a step. `parts`: microbatches, by who did them; `by`: (generation, pipeline) of each part
    where that is not the layout's."""
    ranges: list[tuple[int, int]] = []
    doers: list[tuple[int, int]] = []
    for place, part in enumerate(parts):
        pieces = runs([part])
        ranges += pieces
        doers += [by[place]] * len(pieces) if by is not None else []
    line = {"step": step, "generation": generation, "parts": [list(r) for r in ranges], "samples": samples,
            "loss": loss}
    return line if by is None else line | {"by": [list(d) for d in doers]}


def runs(parts: Iterable[Sequence[int]]) -> list[tuple[int, int]]:
    """Each part as runs of microbatches that follow each other: (first, the one after the last)."""
    out: list[tuple[int, int]] = []
    for part in parts:
        begin = 0
        for place in range(1, len(part) + 1):
            if place == len(part) or part[place] != part[place - 1] + 1:
                out.append((part[begin], part[place - 1] + 1))
                begin = place
    return out


def samples_sum(numbers: Iterable[int]) -> int:
    """CRC-32 of numbers: of a microbatch's samples, and of a step's microbatches."""
    return zlib.crc32(b"".join(n.to_bytes(8, "little") for n in numbers))


@dataclass(frozen=True)
class Verdict:
    """What verify() found."""

    steps: int  # committed, without a gap from 0 on
    taken_back: int  # lines of steps that a later generation did again
    generations: int
    faults: tuple[str, ...]  # empty: each (step, microbatch) went in exactly once

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.faults


def expected(step: int, *, samples: int, batch: int, microbatches: int, seed: int = 0) -> int:
    """The checksum of a step's samples when their order is kept."""
    return samples_sum(
        samples_sum(_samples.share(step, samples=samples, batch=batch, rank=i, world=microbatches, seed=seed).indices)
        for i in range(microbatches))


def verify(lines: Iterable[str | bytes], expected_samples: Callable[[int], int] | None = None) -> Verdict:
    """Reads ledgers, of one job, in any order of files; `expected_samples(step)`: what the checksum must be."""
    begins: dict[int, dict[str, Any]] = {}
    said: list[dict[str, Any]] = []
    faults: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            known = isinstance(value, dict) and isinstance(value["generation"], int) and ("begin" in value
                                                                                         or "step" in value)
        except (ValueError, KeyError):
            known = False
        if not known:
            faults.append(f"line {number} is none of a ledger")
        elif "begin" in value:
            begins[value["generation"]] = value
        else:
            said.append(value)
    if not begins:
        return Verdict(0, 0, 0, (*faults, "no generation begins in it"))
    last: dict[int, dict[str, Any]] = {}
    taken_back = 0
    known_steps = {(v["generation"], v["step"]) for v in said}
    said += [b["before"] for b in begins.values()
             if b["before"] is not None and (b["before"]["generation"], b["before"]["step"]) not in known_steps]
    for value in sorted(said, key=lambda v: (v["generation"], v["step"])):
        step, generation = value["step"], value["generation"]
        if any(g > generation and b["begin"] <= step for g, b in begins.items()):
            taken_back += 1
            continue
        if generation not in begins:
            faults.append(f"step {step} is of generation {generation}, which never began")
            continue
        if step < begins[generation]["begin"]:
            faults.append(f"step {step} of generation {generation}, which began with {begins[generation]['begin']}")
        if step in last:
            faults.append(f"step {step} went in twice, in generations {last[step]['generation']} and {generation}")
        last[step] = value
        count = begins[generation]["microbatches"]
        times = [0] * count
        for first, end in value["parts"]:
            for i in range(first, end):
                if 0 <= i < count:
                    times[i] += 1
                else:
                    faults.append(f"step {step} has a microbatch {i} of {count}")
        wrong = [f"{i} {'twice or more' if n else 'never'}" for i, n in enumerate(times) if n != 1]
        if wrong:
            faults.append(f"step {step}: microbatch {', '.join(wrong[:8])}")
        if expected_samples is not None and value["samples"] != expected_samples(step):
            faults.append(f"step {step} had other samples than its order gives")
    gaps = [s for s in range(max(last, default=-1) + 1) if s not in last]
    if gaps:
        faults.append(f"step {gaps[0]} never went in ({len(gaps)} such)")
    return Verdict(len(last), taken_back, len(begins), tuple(faults))
