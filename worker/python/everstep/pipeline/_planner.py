"""The planner through libeverstep_plan.so: which node runs which layers, and which microbatches.

The texts stand in controller/planner/abi/plan_abi.h. Each rank asks for itself; Plan.checksum is what they compare.
"""

from __future__ import annotations

import ctypes as c
import functools
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep._library import library_paths

_VERSION = 2
_ROOM = 1 << 16  # first guess of an answer's bytes


class PlanRefusedError(ValueError):
    """No plan: says which number is wrong, and what would work."""


@dataclass(frozen=True)
class Row:
    """One pipeline: a whole copy of the model."""

    first: int  # its microbatches are first .. end-1
    end: int
    cuts: tuple[int, ...]  # stage i has the layers cuts[i] .. cuts[i + 1]-1
    nodes: tuple[int, ...]  # by stage


@dataclass(frozen=True)
class Plan:
    """What the planner answered."""

    text: str
    rows: tuple[Row, ...]
    time_ns: int  # of a step, as predicted

    @property
    def checksum(self) -> int:
        """Equal on every rank, or they do not have the same plan."""
        return zlib.crc32(self.text.encode())

    @property
    def picture(self) -> str:
        """For people."""
        return "\n".join(line[2:] for line in self.text.splitlines() if line.startswith("# "))


def request(profile: str, *, nodes: Sequence[int], microbatches: int, faults: int, most_nodes: int,
            before: Plan | None = None, horizon_ms: int = 0, newcomer: int | None = None) -> bytes:
    """The text that asks for a plan; `newcomer`: of books alone."""
    lines = ["everstep-plan-request 1", f"faults = {faults}", f"most-nodes = {most_nodes}",
             f"microbatches = {microbatches}", f"horizon-ms = {horizon_ms}", f"nodes = {','.join(map(str, nodes))}"]
    if newcomer is not None:
        lines.append(f"newcomer = {newcomer}")
    if before is not None:
        lines += [line for line in before.text.splitlines() if line.startswith("pipeline = ")]
    return "\n".join([*lines, "profile =", profile]).encode()


def answered(call: Callable[[Any, int], int]) -> Plan:
    """The plan that `call` writes into the memory it is given, of so many bytes; it returns the bytes that it needs,
    negative: a refusal. Raises PlanRefusedError."""
    room = _ROOM
    while True:
        answer = c.create_string_buffer(room)
        need = call(answer, room)
        if abs(need) <= room:
            break
        room = abs(need)
    text = answer.value.decode(errors="replace")
    if need < 0:
        raise PlanRefusedError(text)
    return read(text)


def ask(text: bytes) -> Plan:
    """The best plan for a request's nodes, with faults + 1 copies of each layer; after `before`, the one that moves
    least of those. Raises PlanRefusedError, OSError without the library."""
    library = load()
    return answered(lambda answer, room: int(library.everstep_plan(text, len(text), answer, room)))


def read(text: str) -> Plan:
    """An answer's text. Raises ValueError."""
    rows: list[Row] = []
    time_ns = 0
    for line in text.splitlines():
        name, _, value = line.partition(" = ")
        if name == "time-ns":
            time_ns = int(value)
        elif name == "pipeline":
            count, cuts, nodes = value.split("; ")
            first = rows[-1].end if rows else 0
            rows.append(Row(first, first + int(count), tuple(map(int, cuts.split(","))),
                            tuple(map(int, nodes.split(",")))))
    if not rows:
        raise ValueError("a plan without pipelines")
    return Plan(text, tuple(rows), time_ns)


@functools.lru_cache(maxsize=1)
def load() -> c.CDLL:
    """libeverstep_plan.so. Raises OSError."""
    tried = [path.with_name("libeverstep_plan.so") for path in library_paths()]
    given = os.environ.get("EVERSTEP_PLAN_LIBRARY")
    for path in [Path(given)] if given else tried:
        if path.exists():
            library = c.CDLL(str(path))
            library.everstep_plan_version.restype = c.c_uint32
            if library.everstep_plan_version() != _VERSION:
                raise OSError(f"{path} speaks version {library.everstep_plan_version()} of plans, this package "
                              f"{_VERSION}; build both from the same release")
            library.everstep_plan.argtypes = [c.c_char_p, c.c_uint64, c.c_char_p, c.c_uint64]
            library.everstep_plan.restype = c.c_int64
            library.everstep_plan_book_open.argtypes = [c.c_char_p, c.c_uint64, c.c_char_p, c.c_uint64]
            library.everstep_plan_book_open.restype = c.c_void_p
            library.everstep_plan_book_make.argtypes = [c.c_void_p, c.c_uint64]
            library.everstep_plan_book_make.restype = c.c_uint64
            library.everstep_plan_book_ask.argtypes = [c.c_void_p, c.c_char_p, c.c_uint64, c.c_char_p, c.c_uint64,
                                                       c.POINTER(c.c_uint32)]
            library.everstep_plan_book_ask.restype = c.c_int64
            library.everstep_plan_book_close.argtypes = [c.c_void_p]
            library.everstep_plan_book_close.restype = None
            return library
    raise OSError("libeverstep_plan.so is not there; looked at " + ", ".join(map(str, tried))
                  + "; run deploy/setup.sh, or set EVERSTEP_PLAN_LIBRARY")
