"""What the ranks of a generation tell each other before anything moves, and what follows from it.

Every function here is one of what all ranks told (a list by rank), so all come to the same end: which step goes on,
who holds which layer of it, who computes what from now on, and who sends what to whom.

How far a step got: a rank that has the summed gradients of all its layers says so to the others in one all-reduce
(the vote), and takes the step when that returns. It returns nowhere before all have spoken. So if one survivor has
taken step s, every other one has the gradients of s and the vote's result can be told to it: it takes the step, too.
If none has, all do it again. Layers of different versions never meet.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from everstep.pipeline._ledger import Line
from everstep.pipeline._measure import Measured
from everstep.pipeline._planner import Plan, PlanRefusedError, request


@dataclass(frozen=True)
class Record:
    """The plan that a rank works on."""

    epoch: int  # the generation that made it
    plan: Plan
    ids: Mapping[str, int]  # member -> the planner's node
    most: int  # members there have ever been at once

    @property
    def next_id(self) -> int:
        """The planner's node that the next newcomer becomes."""
        return _next_id(self.ids)


@dataclass(frozen=True)
class Complete:
    """A rank has done its part of a step up to the sums over pipelines."""

    step: int
    epoch: int  # of the plan
    pipeline: int
    stage: int
    stages: int
    leaves: tuple[int, ...]  # microbatches of the pipeline
    layers: tuple[int, int]  # first, and the one after the last


@dataclass(frozen=True)
class Status:
    """What a rank tells of itself."""

    member: str  # of the process, whatever its rank
    settings: Mapping[str, Any]  # must be equal on all
    layers: Mapping[int, int]  # held -> version
    reduced: int | None = None  # the step whose summed gradients it has, and has not taken
    vote: tuple[int, Sequence[float]] | None = None  # of the newest step taken
    complete: Complete | None = None
    line: dict[str, Any] | None = None  # of the ledger, for that step
    record: Record | None = None
    measured: Measured | None = None
    files: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # version -> layers that it can read
    usual: float = 0.0  # seconds of a step, by what it saw; 0: nothing


def _next_id(ids: Mapping[str, int]) -> int:
    return max(ids.values(), default=-1) + 1


def new_member() -> str:
    """A name for this process that no other has had."""
    return uuid.uuid4().hex


class NewcomersDifferError(ValueError):
    """Ranks that joined have other settings than those that train; it is they who refuse."""


def check_settings(statuses: Sequence[Status], rank: int) -> None:
    """Raises ValueError when ranks were started with different ones; where some of them have trained, on those that
    agree with these it is a NewcomersDifferError."""
    first = next((r for r, s in enumerate(statuses) if any(s.layers.values())), None)
    model = first or 0
    for name, value in statuses[model].settings.items():
        for other, status in enumerate(statuses):
            theirs = status.settings.get(name)
            if theirs == value:
                continue
            text = (f"Pipeline: {name} is {value!r} on rank {model} and {theirs!r} on rank {other}; every rank must "
                    "run the same script on the same data")
            same = statuses[rank].settings == statuses[model].settings
            raise NewcomersDifferError(text) if first is not None and same else ValueError(text)


@dataclass(frozen=True)
class Standing:
    """How far the job is."""

    version: int  # steps taken
    vote: tuple[int, Sequence[float]] | None  # to be taken by who has the gradients of step version - 1
    holds: tuple[frozenset[int], ...]  # [rank]: layers at `version`, once those have taken it
    line: dict[str, Any] | None
    files: tuple[frozenset[int], ...] = ()  # [rank]: layers at `version` that it has as files; (): none are needed
    told: tuple[Line, ...] = ()  # lines that the files came with


def standing(statuses: Sequence[Status], layers: int) -> Standing:
    """The newest step that some survivor has taken, or that files have where survivors lack a layer of it. Raises
    RuntimeError when neither holds every layer."""
    newest = max((v for s in statuses for v in s.layers.values()), default=0)
    vote = next((s.vote for s in statuses if s.vote is not None and s.vote[0] == newest - 1), None)

    def version(status: Status, layer: int) -> int:
        at = status.layers[layer]
        return newest if vote is not None and status.reduced == at == newest - 1 else at

    holds = tuple(frozenset(x for x in s.layers if version(s, x) == newest) for s in statuses)
    line = next((s.line for s in statuses if s.line is not None and s.line["step"] == newest - 1), None)
    live = frozenset().union(*holds)
    lacking = [x for x in range(layers) if x not in live]
    if not lacking or (newest == 0 and not any(s.files for s in statuses)):
        return Standing(newest, vote, holds, line)
    versions = sorted({v for s in statuses for v in s.files}, reverse=True)
    for at in versions:
        have = frozenset(x for s in statuses for x in s.files.get(at, ()))
        kept = tuple(frozenset(x for x in s.layers if version(s, x) == at) for s in statuses)
        if len(have.union(*kept)) == layers:
            return Standing(at, vote, kept, None, tuple(frozenset(s.files.get(at, ())) for s in statuses))
    if newest == 0:
        return Standing(0, None, holds, None)
    where = (f"no step in files is whole (the newest is {versions[0]})" if versions else "no files were kept")
    raise RuntimeError(f"Pipeline: layer {lacking[0]} of step {newest} was held by lost ranks alone, and {where}; "
                       "a larger faults= keeps more copies, directory= keeps files")


def newest_record(statuses: Sequence[Status]) -> Record | None:
    """The plan before; None: there was none."""
    return max((s.record for s in statuses if s.record is not None), key=lambda r: r.epoch, default=None)


def next_record(statuses: Sequence[Status], epoch: int, profile: str, microbatches: int, faults: int,
                horizon_ms: int, fresh: bool, ask: Callable[[bytes, int], Plan]) -> tuple[Record, int]:
    """The plan for these ranks and how many faults it bears: fewer than asked when there are too few ranks, but not
    for a job that starts. `ask`: a request's text and its faults -> the planner's answer. Raises PlanRefusedError."""
    old = newest_record(statuses)
    ids = dict(old.ids) if old is not None else {}
    for status in statuses:
        if status.member not in ids:
            ids[status.member] = _next_id(ids)
    most = max(len(statuses), old.most if old is not None else 0)
    nodes = [ids[s.member] for s in statuses]
    refused: PlanRefusedError | None = None
    for bears in range(faults, -1, -1):
        try:
            plan = ask(request(profile, nodes=nodes, microbatches=microbatches, faults=bears, most_nodes=most,
                               before=None if old is None else old.plan, horizon_ms=horizon_ms), bears)
        except PlanRefusedError as error:
            refused = refused or error
            if fresh:
                break
            continue
        return Record(epoch, plan, ids, most), bears
    assert refused is not None
    raise PlanRefusedError(f"Pipeline: no plan for {len(nodes)} ranks, {microbatches} microbatches and "
                           f"faults={faults}: {refused}")


def told_plan(record: Record, statuses: Sequence[Status], microbatches: int, faults: int, horizon_ms: int) -> str:
    """What the controller is told of a plan: the question that a change asks after it, with the nodes by rank, and
    the plan itself."""
    asked = request("", nodes=[record.ids[s.member] for s in statuses], microbatches=microbatches, faults=faults,
                    most_nodes=record.most, before=record.plan, horizon_ms=horizon_ms).decode()
    return f"everstep-told-plan 1\nchecksum = {record.plan.checksum:08x}\n{asked}{record.plan.text}"


@dataclass(frozen=True)
class Place:
    """A rank's part of a plan."""

    pipeline: int
    stage: int


@dataclass(frozen=True)
class Layout:
    """A plan by ranks."""

    ranks: tuple[tuple[int, ...], ...]  # [pipeline][stage]
    cuts: tuple[tuple[int, ...], ...]  # [pipeline]
    parts: tuple[tuple[int, int], ...]  # [pipeline]: first microbatch, and the one after the last

    def place(self, rank: int) -> Place | None:
        """None: the plan was made before this rank came."""
        for pipeline, ranks in enumerate(self.ranks):
            if rank in ranks:
                return Place(pipeline, ranks.index(rank))
        return None

    def layers(self, rank: int) -> range:
        """That it computes."""
        at = self.place(rank)
        if at is None:
            return range(0)
        return range(self.cuts[at.pipeline][at.stage], self.cuts[at.pipeline][at.stage + 1])

    def holder(self, pipeline: int, layer: int) -> int:
        """The rank that computes `layer` in this pipeline."""
        cuts = self.cuts[pipeline]
        return self.ranks[pipeline][next(i for i in range(len(cuts) - 1) if cuts[i] <= layer < cuts[i + 1])]


def layout_of(record: Record, statuses: Sequence[Status]) -> Layout:
    """Raises ValueError when the plan names other nodes than those that are there."""
    layout = layout_before(record.plan, record.ids, statuses)
    if layout is None or any(layout.place(rank) is None for rank in range(len(statuses))):
        seated = sorted(n for row in record.plan.rows for n in row.nodes)
        raise ValueError(f"a plan for nodes {seated}, and there are {sorted(record.ids[s.member] for s in statuses)}")
    return layout


def layout_before(plan: Plan, ids: Mapping[str, int], statuses: Sequence[Status]) -> Layout | None:
    """A plan that need not know all of these ranks. None: it names some that are not there."""
    rank_of = {ids[s.member]: rank for rank, s in enumerate(statuses)}
    rows = plan.rows
    if any(n not in rank_of for row in rows for n in row.nodes):
        return None
    return Layout(tuple(tuple(rank_of[n] for n in row.nodes) for row in rows), tuple(row.cuts for row in rows),
                  tuple((row.first, row.end) for row in rows))


@dataclass(frozen=True)
class Move:
    """One layer from one rank to another; from itself: out of its files."""

    layer: int
    source: int
    target: int


def moves(wanted: Sequence[tuple[int, int]], offers: Mapping[int, Sequence[int]], bad: frozenset[tuple[int, int]],
          sizes: Sequence[int]) -> list[Move]:
    """For each (rank, layer) of `wanted` a source: the rank itself, else the one that has least to send. `offers`:
    layer -> ranks; `bad`: (source, layer) that gave something else than they said. Raises RuntimeError."""
    load: Counter[int] = Counter()
    out = []
    for target, layer in sorted(wanted, key=lambda w: (-sizes[w[1]], w)):
        sources = [r for r in offers.get(layer, ()) if (r, layer) not in bad]
        if not sources:
            raise RuntimeError(f"Pipeline: no rank gives layer {layer} undamaged")
        source = target if target in sources else min(sources, key=lambda r: (load[r], r))
        if source != target:
            load[source] += max(1, sizes[layer])
        out.append(Move(layer, source, target))
    return sorted(out, key=lambda m: (m.layer, m.target))
