"""Pipeline: a model given as layers, on whatever ranks there are."""

from __future__ import annotations

import gc
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from everstep import _samples, _told
from everstep._attach import warn
from everstep._refusal import refusals
from everstep.pipeline import _agree, _keys, _ledger, _rescue
from everstep.pipeline._agree import Complete, Layout, Record, Status
from everstep.pipeline._book import Book, Job
from everstep.pipeline._exchange import Exchange, sum_ties
from everstep.pipeline._fill import Fill, waves
from everstep.pipeline._holdings import Holdings
from everstep.pipeline._layer import (
    Gradient,
    Layer,
    LayerLike,
    OptimizerFactory,
    Recipe,
    SchedulerFactory,
    untie,
)
from everstep.pipeline._measure import Measured, check_profile, collate, measure
from everstep.pipeline._planner import PlanRefusedError
from everstep.pipeline._rescue import NOTHING, Rescue
from everstep.pipeline._schedule import Stage, tensors
from everstep.pipeline._session import PipelineSession, alone
from everstep.pipeline._switch import Moved, from_rank_0, gather
from everstep.pipeline._tier import LayerFiles
from everstep.pipeline._tree import Node, nodes_of

_log = logging.getLogger("everstep")


@dataclass(frozen=True)
class Report:
    """A step that was taken."""

    step: int
    loss: float  # mean over the global batch
    seconds: float  # of this step on this rank, without what was begun and left
    generation: int
    rank: int
    world_size: int
    pipelines: int


class Pipeline:
    """Trains a model that is given as an ordered list of layers, on pipelines side by side.

        pipeline = everstep.Pipeline(
            [Embedding(), *[Block() for _ in range(8)], Head()],
            loss=lambda logits, target: cross_entropy(logits.flatten(0, 1), target.flatten()),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
            dataset=data, batch=64, microbatch=4)
        pipeline.run(1000, on_step=lambda report: print(report.step, report.loss))

    Which rank computes which layers is the planner's: pipelines of different depth, each with a whole copy of the
    model, at least faults + 1 of them. When ranks are lost or come, those that are there stay in their process, make
    a new plan, fetch the layers that they lack from a rank that has them, and go on with the step that was under
    way. Every step has the same global batch, the same samples and the same random streams whatever the layout.

    Args:
        layers: modules, or functions that make one each (then no rank ever makes more than it needs); each takes what
            the one before gives, a tensor or a tuple of tensors. Parameters that modules share are kept equal.
        loss: (output of the last layer, target) -> the mean over the microbatch, one number.
        optimizer: (parameters of one layer) -> optimizer. Of every kind that works on each parameter by itself.
        dataset: dataset[i] is (input, target); has a length, which does not change.
        batch: samples of a step, over all pipelines.
        microbatch: samples that go through a pipeline at once; `batch` is a multiple of it.
        scheduler: (optimizer) -> learning-rate scheduler, stepped once a step.
        faults: ranks that may be lost at once without losing a layer; with fewer ranks than that needs, fewer.
        clip: largest norm of the whole gradient.
        seed: of the order of samples, of random streams and of layers that are made by functions.
        deterministic: gradients are added up in an order that does not depend on the layout, so losses and weights
            are the same bits for every layout and whatever was lost. Costs memory for some gradients more.
        tied: names of parameters that are one, ("0.weight", "9.weight"), for layers that are made by functions.
        profile: text of a profile (docs/reference/profile.md) in place of measuring layers.
        autocast: layers and loss run under torch.autocast of this dtype (torch.bfloat16).
        memory: bytes of a node; 0: not limited.
        link: between nodes: (microseconds, 10^9 bytes a second); also how much of a newcomer's layers goes beside a
            step.
        horizon: expected seconds to the next loss or join: a faster plan must pay for its move within that time.
        directory: for files of layers, which a job goes on from when more ranks were lost than there are copies, or
            all of them; it also begins with the newest whole step that lies there.
        every: steps between two that are kept in files.
        ledger: a directory for ledger.jsonl: which (step, microbatch) went into the model; or a function that is
            given its lines.
        name: of the model, in profiles.

    A rank counts as a node: with several ranks on one machine `faults` counts ranks. Runs under `everstep run` and
    torchrun, and alone; only `everstep run` survives losses. Backend gloo. Not thread-safe.
    """

    @refusals("Pipeline: ")
    def __init__(self, layers: Sequence[LayerLike], *, loss: Callable[[Any, Any], torch.Tensor],
                 optimizer: OptimizerFactory, dataset: Any, batch: int, microbatch: int,
                 scheduler: SchedulerFactory | None = None, faults: int = 1, clip: float | None = None, seed: int = 0,
                 deterministic: bool = False, tied: Sequence[Sequence[str]] = (), profile: str | None = None,
                 autocast: torch.dtype | None = None, memory: int = 0, link: tuple[float, float] = (20.0, 1.25),
                 horizon: float = 0.0,
                 directory: str | os.PathLike[str] | None = None, every: int = 100,
                 ledger: str | os.PathLike[str] | Callable[[bytes], object] | None = None,
                 name: str = "model") -> None:
        layers = list(layers)
        if not layers:
            raise ValueError("Pipeline: layers is empty; give the model as a list of modules")
        for index, layer in enumerate(layers):
            if not callable(layer):
                raise TypeError(f"Pipeline: layer {index} is a {type(layer).__name__}; it must be a torch.nn.Module "
                                "or a function that makes one")
        for what, value in (("batch", batch), ("microbatch", microbatch), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Pipeline: {what} is {value!r}; it must be 1 or more")
        if batch % microbatch:
            less = batch - batch % microbatch
            raise ValueError(f"Pipeline: a batch of {batch} does not divide into microbatches of {microbatch}; "
                             f"{f'{less} or ' if less else ''}{less + microbatch} would")
        if faults < 0:
            raise ValueError(f"Pipeline: faults is {faults}; it must be 0 or more")
        if clip is not None and not clip > 0:
            raise ValueError(f"Pipeline: clip is {clip}; it must be more than 0")
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise TypeError(f"Pipeline: the dataset is a {type(dataset).__name__}; it needs a length and an index")
        if len(dataset) < batch:
            raise ValueError(f"Pipeline: the dataset has {len(dataset)} samples, a batch {batch}")
        ties = untie(layers, tied)
        self._recipe = Recipe(layers, optimizer, scheduler, seed, ties, autocast)
        self._loss = loss if autocast is None else torch.autocast("cpu", autocast)(loss)
        self._dataset = dataset
        self._samples = len(dataset)
        self._batch = batch
        self._microbatch = microbatch
        self._microbatches = batch // microbatch
        self._faults = faults
        self._clip = clip
        self._seed = seed
        self._deterministic = deterministic
        self._given_profile = profile
        self._memory = memory
        self._link = link
        self._horizon_ms = int(horizon * 1000)
        self._name = name
        self._ledger = None if ledger is None else _ledger.Ledger(
            ledger if callable(ledger) else _ledger.to_directory(ledger))
        self._files = None if directory is None else LayerFiles(directory, len(layers), every)
        self._settings = {
            "the number of layers": len(layers), "batch": batch, "microbatch": microbatch, "faults": faults,
            "clip": clip, "seed": seed, "deterministic": deterministic, "autocast": autocast,
            "the dataset's length": self._samples,
            "memory": memory, "link": tuple(link), "horizon": horizon, "profile": profile,
            "the list of tied parameters": tuple(tie.members for tie in ties),
        }
        self._member = _agree.new_member()
        self._holdings = Holdings(self._recipe, self._files)
        self._layers = self._holdings.layers
        self._version = 0
        self._reduced: int | None = None
        self._vote: tuple[int, Sequence[float]] | None = None
        self._line: dict[str, Any] | None = None
        self._record: Record | None = None
        self._measured: Measured | None = None
        self._layout: Layout | None = None
        self._fill: Fill | None = None  # while ranks get layers for a plan that does not train yet
        self._book = Book()
        self._stage: Stage | None = None
        self._totals: dict[int, torch.Tensor] = {}
        self._parts: list[Sequence[int]] = []  # microbatches, by who did them
        self._by: list[tuple[int, int]] | None = None  # (generation, pipeline) of each; None: as the layout says
        self._told: _ledger.Told | None = None  # the ledger that the controller keeps
        self._used: dict[int, int] = {}  # microbatch -> checksum of its samples
        self._complete: Complete | None = None
        self._kept: Rescue = NOTHING  # of this rank's own pipeline, once complete
        self._rescue: Rescue = NOTHING  # what the step under way begins with

    # --- what the user sees ---

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._version

    @property
    def layers(self) -> Mapping[int, torch.nn.Module]:
        """Index -> module, of the layers that this rank holds now."""
        return {index: layer.module for index, layer in sorted(self._layers.items())}

    @property
    def profile(self) -> str:
        """The text that plans are made from; empty before run()."""
        return "" if self._measured is None else self._given_profile or self._measured.profile

    @property
    def plan(self) -> str:
        """A picture of the plan now; empty before run()."""
        return "" if self._record is None else self._record.plan.picture

    def run(self, steps: int, *, on_step: Callable[[Report], object] | None = None,
            stop: Callable[[], bool] | None = None, save: str | os.PathLike[str] | None = None) -> int:
        """Trains until `steps` steps are taken, or `stop()` is true on some rank at the end of one; returns how many
        there are. `on_step` is called on every rank for each step that it has taken. `save`: a file in which rank 0
        puts the whole model's weights in the end (torch.load gives "LAYER.NAME" -> tensor, as
        torch.nn.Sequential(*layers).state_dict() does)."""
        if "RANK" not in os.environ:
            alone()
        # A survivor looks for cycles before it forms its next group: not among what PyTorch made when it was loaded.
        gc.collect()
        gc.freeze()
        try:
            count: int = PipelineSession(lambda session: self._generation(session, steps, on_step, stop, save)).run()
        finally:
            gc.unfreeze()
            self._book.close()
        return count

    # --- a generation ---

    def _generation(self, session: PipelineSession, steps: int, on_step: Callable[[Report], object] | None,
                    stop: Callable[[], bool] | None, save: str | os.PathLike[str] | None) -> int:
        self._switch(session)
        session.training = True
        while self._version < steps:
            layout = self._layout
            assert layout is not None
            began = time.perf_counter()
            loss, leave, ended = self._take_step(session, layout, stop)
            seconds = time.perf_counter() - began
            session.took(self._version - 1, seconds)
            if on_step is not None:
                on_step(Report(self._version - 1, loss, seconds, session.generation, session.rank,
                               session.world_size, len(layout.ranks)))
            if self._files is not None and self._files.due(self._version):
                self._save(self._files, session.rank, layout)
            if ended:
                break
            if leave:
                session.leave_together()
            if self._fill is not None and self._fill.over:
                self._adopt(session, self._fill)
        assert self._layout is not None
        if self._files is not None:
            self._files.wait()
        if save is not None:
            self._holdings.export(save, session.rank, self._layout, self._sizes)
        session.flush()
        return self._version

    def _save(self, files: LayerFiles, rank: int, layout: Layout) -> None:
        """This rank's share of the layers, each by one of those that hold it."""
        mine = [i for i in layout.layers(rank) if layout.holder(i % len(layout.ranks), i) == rank]
        words = [] if self._told is None else self._told.for_files
        files.save(self._version, {i: self._layers[i].pack(line=self._line, words=words) for i in mine})

    @refusals("Pipeline: ", but=(PlanRefusedError, _agree.NewcomersDifferError))  # more nodes may come; they refuse
    def _switch(self, session: PipelineSession) -> None:
        """Agrees with the other ranks on the step to do next and on a plan, and takes the place in it."""
        began = time.perf_counter()
        rank = session.rank
        self._settings["the dataset's length"] = len(self._dataset)
        if self._told is not None:
            self._told.pause()
        elif self._ledger is None:
            self._told = session.told()
        if self._files is not None:
            self._files.wait()
        statuses = gather(Status(self._member, self._settings, {i: x.version for i, x in self._layers.items()},
                                 self._reduced, self._vote, self._complete, self._line, self._record,
                                 self._measured, {} if self._files is None else self._files.have(), session.usual))
        try:
            _agree.check_settings(statuses, rank)
        except _agree.NewcomersDifferError:
            session.leave_together()  # they end, and the next generation is without them
            raise
        now = self._holdings.standing(statuses, rank)
        if now.vote is not None and self._reduced == now.vote[0] and self._version == now.vote[0]:
            self._commit(session, now.vote[1], now.line)
        self._reduced = self._fill = None
        measured = next((s.measured for s in statuses if s.measured is not None), None)
        self._measured = measured or from_rank_0(self._measure)
        fresh = now.version == 0 and not any(now.holds)
        asked = time.perf_counter()
        record, bears = _agree.next_record(statuses, session.generation, self.profile, self._microbatches,
                                           self._faults, self._horizon_ms, fresh, self._book.ask)
        planned = time.perf_counter() - asked
        # Lines that may not be durable: whoever went on with this step has them all.
        knows = next((r for r, holds in enumerate(now.holds) if holds), None)
        mine = () if self._told is None or rank != knows else self._told.unknown
        answers = gather((record.plan.checksum, mine))
        sums = [checksum for checksum, _ in answers]
        if len(set(sums)) > 1:
            other = next(r for r, value in enumerate(sums) if value != sums[0])
            raise RuntimeError(f"Pipeline: the plan's checksum is {sums[0]:08x} on rank 0 and {sums[other]:08x} on "
                               f"rank {other}; both need the same release of Everstep")
        if bears < self._faults and rank == 0:
            warn(f"{len(statuses)} ranks hold {bears + 1} copies of each layer, not {self._faults + 1}: {bears} may "
                 "be lost at once")
        layout = _agree.layout_of(record, statuses)
        fill = self._fill_for(statuses, now, record, layout, rank)
        moved = self._take_place(now, layout if fill is None else fill.before, rank)
        self._rescue = _rescue.take(statuses, now.version, layout, self._layers, rank, self._kept, self._leaves)
        self._complete, self._kept = None, NOTHING
        self._version = now.version
        self._record, self._fill = record, fill
        if self._told is not None:
            self._told.begin(now.told if knows is None else answers[knows][1], rank, session.generation,
                             self._version, self._microbatches, layout.parts, layout.ranks)
        if rank == 0:
            session.tell(_told.PROFILE, self.profile)
            session.tell(_told.PLAN, _agree.told_plan(record, statuses, self._microbatches, self._faults,
                                                          self._horizon_ms))
            if self._ledger is not None:
                self._ledger.begin(session.generation, self._version, self._microbatches, layout.parts,
                                   layout.ranks, now.line)
            _log.info("everstep: generation %d goes on with step %d on %d ranks; %d layers (%d bytes) moved, "
                      "switched in %.0f ms (planned in %.2f ms, %s), %d of %d microbatches are done\n%s",
                      session.generation, self._version, session.world_size, moved.layers, moved.bytes,
                      (time.perf_counter() - began) * 1e3, planned * 1e3, self._book.how,
                      len(self._rescue.done), self._microbatches, record.plan.picture)
            if fill is not None:
                _log.info("everstep: generation %d trains by the plan before for %d steps, while layers go to their "
                          "places in this one", session.generation, fill.left)
        self._line = now.line
        self._book.open(Job(self.profile, record.plan, [record.ids[s.member] for s in statuses], record.next_id,
                            record.most, self._microbatches, self._faults, self._horizon_ms))

    def _fill_for(self, statuses: Sequence[Status], now: _agree.Standing, record: Record, after: Layout,
                  rank: int) -> Fill | None:
        """How layers get to their places while the plan before trains on; None: at once, since it cannot (a rank of
        it is gone, or something of a step is rescued) or since that takes next to no time."""
        old = _agree.newest_record(statuses)
        before = None if old is None else _agree.layout_before(old.plan, record.ids, statuses)
        if old is None or before is None or now.files or _rescue.whole_pipelines(statuses, now.version):
            return None
        if any(i not in now.holds[r] for r in range(len(statuses)) for i in before.layers(r)):
            return None
        sizes = self._sizes
        wanted = [(r, i) for r in range(len(statuses)) for i in after.layers(r) if i not in now.holds[r]]
        offers = {i: [before.holder(p, i) for p in range(len(before.ranks))] for i in range(len(sizes))}
        each = waves(_agree.moves(wanted, offers, frozenset(), sizes), sizes, max(s.usual for s in statuses),
                     self._link[1] * 1e9)
        return Fill(each, old.epoch, before, after, rank, self._recipe.build) if each else None

    def _take_place(self, now: _agree.Standing, layout: Layout, rank: int) -> Moved:
        """Collective: from now on this rank computes what `layout` says, with layers that others give it."""
        moved = self._holdings.take(now, layout, rank, self._sizes)
        self._layout = layout
        self._stage = self._make_stage(layout, rank)
        for layer in self._layers.values():
            layer.gradient = Gradient(layer) if layer.parameters else None
        return moved

    def _adopt(self, session: PipelineSession, fill: Fill) -> None:
        """Collective: the plan that layers were sent ahead for takes effect."""
        began = time.perf_counter()
        holds = gather([i for i, layer in self._layers.items() if layer.version == self._version])
        now = _agree.Standing(self._version, None, tuple(map(frozenset, holds)), None)
        moved = self._take_place(now, fill.after, session.rank)
        self._fill = None
        if session.rank == 0:
            _log.info("everstep: the plan of generation %d takes effect with step %d; %d layers (%d bytes) came "
                      "damaged and moved again, switched in %.0f ms", session.generation, self._version,
                      moved.layers, moved.bytes, (time.perf_counter() - began) * 1e3)

    def _measure(self) -> Measured:
        given, target = self._data(0, 0)
        measured = measure(self._recipe, tensors(given, "a microbatch's input"),
                           lambda out: self._loss(out[0] if len(out) == 1 else out, target),
                           microbatch=self._microbatch, memory=self._memory, name=self._name,
                           latency_us=self._link[0], gb_s=self._link[1])
        if self._given_profile is not None:
            check_profile(self._given_profile, measured)
        return measured

    @property
    def _sizes(self) -> Sequence[int]:
        """Bytes of each layer's state."""
        assert self._measured is not None
        return self._measured.state_bytes

    def _make_stage(self, layout: Layout, rank: int) -> Stage | None:
        assert self._measured is not None
        at, mine = layout.place(rank), layout.layers(rank)
        if at is None:
            return None
        ranks, specs = layout.ranks[at.pipeline], self._measured.specs
        first, last = at.stage == 0, at.stage == len(ranks) - 1
        return Stage([self._layers[i] for i in mine], at.stage, len(ranks),
                     None if first else ranks[at.stage - 1], None if last else ranks[at.stage + 1],
                     () if first else specs[mine[0] - 1], () if last else specs[mine[-1]], self._loss, self._data,
                     lambda *numbers: _keys.key(self._seed, *numbers), 1 / self._microbatches)

    # --- a step ---

    def _data(self, step: int, microbatch: int) -> tuple[Any, Any]:
        indices = _samples.share(step, samples=self._samples, batch=self._batch, rank=microbatch,
                                 world=self._microbatches, seed=self._seed).indices
        self._used[microbatch] = _ledger.samples_sum(indices)
        _keys.set_all(_keys.key(self._seed, step, microbatch, _keys.DATA))
        return collate([self._dataset[i] for i in indices])

    def _take_step(self, session: PipelineSession, layout: Layout,
                   stop: Callable[[], bool] | None) -> tuple[float, bool, bool]:
        """The loss, whether the generation is over, whether some rank wants to stop."""
        stage, rank, step, fill = self._stage, session.rank, self._version, self._fill
        assert self._record is not None
        rescue, self._rescue = self._rescue, NOTHING
        self._reduced, self._complete, self._kept = None, None, NOTHING
        self._used.clear()
        if fill is not None:
            fill.begin(lambda index: self._layers[index].pack())
        at = layout.place(rank)
        work = _rescue.divide(layout, self._microbatches, rescue.done)
        gradients = {} if stage is None else {x.index: x.gradient for x in stage.layers if x.gradient is not None}
        exchanges = {i: Exchange(g, rank, self._holders(layout, i, work, rescue), self._leaves)
                     for i, g in gradients.items()}
        for index, gradient in gradients.items():
            gradient.begin(self._leaves, rescue.parts.get(index, ()))
        lost: list[RuntimeError] = []
        waiting = dict(exchanges)

        def done(layer: Layer) -> None:
            """Sends the layer's gradient; that another pipeline is lost does not end this one's backward passes."""
            if layer.gradient is not None:
                try:
                    waiting.pop(layer.index).start(layer.gradient.parts())
                except RuntimeError as error:
                    lost.append(error)

        losses: dict[int, float] = {}
        used: dict[int, int] = dict(rescue.used)
        if stage is not None and at is not None:
            losses = stage.run(step, work[at.pipeline], gradients, done)
            used |= self._used if at.stage == 0 else {}
        for index in list(waiting):  # no microbatch was left for this pipeline
            done(gradients[index].layer)
        losses |= rescue.losses
        if stage is not None and at is not None and rescue is NOTHING and fill is None and len(layout.ranks) > 1:
            self._complete = Complete(step, self._record.epoch, at.pipeline, at.stage, stage.stages,
                                      tuple(work[at.pipeline]), (stage.layers[0].index, stage.layers[-1].index + 1))
            self._kept = Rescue(step, parts={i: g.parts() for i, g in gradients.items()}, losses=losses, used=used)
        if lost:
            raise lost[0]
        epoch = self._record.epoch if fill is None else fill.epoch
        self._parts = [*rescue.leaves.values(), *work]
        self._by = None if rescue is NOTHING and fill is None else [
            *((rescue.epoch, p) for p in rescue.leaves), *((epoch, p) for p in range(len(work)))]
        order = sorted(exchanges, reverse=True)
        for index in order:
            exchanges[index].add_up()
        self._totals = {index: exchanges[index].finish() for index in order}
        if at is not None:
            pipeline = at.pipeline
            sum_ties(self._recipe.ties, {i: self._layers[i] for i in layout.layers(rank)}, self._totals, rank,
                     lambda layer: layout.holder(pipeline, layer))
        if fill is not None:
            self._layers.update(fill.arrive(step))
            self._totals |= fill.follow(self._totals)
        # All that anybody must know of all: each number comes from one rank, so their sum is exact.
        count = len(self._recipe.layers)
        many = self._microbatches
        vote = torch.zeros(2 * many + count + 3, dtype=torch.float64)
        for microbatch, loss in losses.items():
            vote[microbatch] = loss
        for microbatch, samples in used.items():
            vote[many + microbatch] = samples
        for index, total in self._totals.items() if self._clip is not None else ():
            if layout.holder(0, index) == rank:
                vote[2 * many + index] = self._squared_norm(index, total)
        if self._told is not None and rank == 0:
            vote[-3] = self._told.durable
        vote[-2] = float(session.asked)
        vote[-1] = float(stop is not None and stop())
        self._reduced = step
        dist.all_reduce(vote)
        told = vote.tolist()
        return self._commit(session, told, None), told[-2] > 0, told[-1] > 0

    @property
    def _leaves(self) -> int | None:
        """Of the trees of microbatches; None: there are none."""
        return self._microbatches if self._deterministic else None

    def _holders(self, layout: Layout, layer: int, work: Sequence[Sequence[int]],
                 rescue: Rescue) -> list[tuple[int, list[Node]]]:
        """Who holds the layer, and the parts of its gradient that each will have."""
        ranks = [layout.holder(p, layer) for p in range(len(layout.ranks))]
        if not self._deterministic:
            return [(rank, [(-1, 0)]) for rank in ranks]
        return [(rank, nodes_of([*each, *rescue.of(layer, rank)], self._microbatches))
                for rank, each in zip(ranks, work)]

    def _squared_norm(self, layer: int, total: torch.Tensor) -> float:
        """Of a layer's gradient; of tied parameters the first one counts."""
        cut = sorted(self._layers[layer].offsets[name] for tie in self._recipe.ties
                     for index, name in tie.members[1:] if index == layer)
        out, begin = 0.0, 0
        for first, end in [*cut, (total.numel(), total.numel())]:
            if first > begin:
                out += float(torch.linalg.vector_norm(total[begin:first], dtype=torch.float64)) ** 2
            begin = end
        return out

    def _commit(self, session: PipelineSession, vote: Sequence[float], line: dict[str, Any] | None) -> float:
        """Takes the step whose gradients are summed. Nothing here waits for another rank."""
        step, many = self._version, self._microbatches
        norm = math.sqrt(sum(vote[2 * many:-3]))
        scale = 1.0 if self._clip is None else min(1.0, self._clip / (norm + 1e-6))
        for layer in [*(() if self._stage is None else self._stage.layers),
                      *(() if self._fill is None else self._fill.followed)]:
            total = self._totals.get(layer.index)
            if total is not None and scale != 1.0:
                total.mul_(scale)
            layer.apply(total)
        self._version = step + 1
        self._reduced, self._complete, self._kept = None, None, NOTHING
        self._vote = step, tuple(vote)
        loss = sum(vote[:many]) / many
        if line is None:
            assert self._record is not None
            line = _ledger.step_line(self._record.epoch, step, self._parts,
                                     _ledger.samples_sum(map(int, vote[many:2 * many])), loss, self._by)
            if session.rank == 0 and self._ledger is not None:
                self._ledger.step(line)
        self._line = line
        if self._told is not None:
            self._told.heard(int(vote[-3]))
            self._told.step(line)
        return loss
