"""everstep.Pipeline beside the same training as a program by hand: torch.distributed.pipelining over gloo.

Both train in the same processes, in blocks of some steps in turn: the same layers on the same ranks, the same samples in the
same microbatches, an AdamW each. By hand: PipelineStage and Schedule1F1B; side by side, the stages are wrapped in
DistributedDataParallel, as PipelineStage provides for, and their gradients overlap with the last backward pass. It has its
samples' numbers beforehand, and neither norms, checksums nor a ledger.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT
from everstep import _samples
from everstep.pipeline import Pipeline, Report
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

sys.path[:0] = [str(ROOT / "tests/integration"), str(ROOT / "tests/bench/scripts")]

import gpt  # noqa: E402
from worlds import world  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """Of a training; microbatches: of a step, over all pipelines."""

    stages: int
    pipelines: int
    width: int = 128
    blocks: int = 8
    microbatch: int = 4
    microbatches: int = 8

    @property
    def ranks(self) -> int:
        return self.stages * self.pipelines

    def samples(self, step: int, microbatch: int) -> list[int]:
        return list(_samples.share(step, samples=gpt.SAMPLES, batch=self.microbatch * self.microbatches, rank=microbatch,
                                   world=self.microbatches, seed=0).indices)


@dataclass
class Block:
    """Some steps: wall clock from all ranks' begin to all ranks' end, and the processor time of this rank."""

    wall: float
    cpu: float
    losses: list[float]


@dataclass
class Outcome:
    """Of one rank. Blocks of both in the order they ran, the first ones (compilation, caches) left out."""

    everstep: list[Block] = field(default_factory=list)
    by_hand: list[Block] = field(default_factory=list)
    check: tuple[list[float], list[float]] = ([], [])  # losses of the same steps from the same weights: everstep, by hand
    place: tuple[int, int] = (0, 0)


class ByHand:
    """The rank's stage of a program that knows nothing of Everstep; begins with the weights that `pipeline` has now."""

    def __init__(self, shape: Shape, pipeline: Pipeline, rank: int) -> None:
        layout = pipeline._layout
        assert layout is not None
        if len(layout.ranks) != shape.pipelines or len(set(layout.cuts)) != 1 or len({e - b for b, e in layout.parts}) != 1:
            raise SystemExit(f"error: not {shape.pipelines} equal pipelines: {pipeline.plan}")
        self.shape, self.at, self.part = shape, layout.place(rank), layout.parts[layout.place(rank).pipeline]
        mine = [pipeline._layers[i] for i in layout.layers(rank)]
        makers = gpt.layers(shape.width, shape.blocks)
        module: nn.Module = nn.Sequential(*[makers[layer.index]() for layer in mine])
        parameters = list(module.parameters())
        self.optimizer = gpt.optimizer(parameters)
        theirs = [(p, layer.optimizer) for layer in mine for p in layer.parameters]
        with torch.no_grad():
            for own, (other, optimizer) in zip(parameters, theirs, strict=True):
                own.copy_(other)
                assert optimizer is not None
                self.optimizer.state[own] = {name: value.clone() for name, value in optimizer.state[other].items()}
        rows = [dist.new_group(list(row)) for row in layout.ranks]
        columns = [dist.new_group(sorted(column)) for column in zip(*layout.ranks)]
        if shape.pipelines > 1:
            module = nn.parallel.DistributedDataParallel(module, process_group=columns[self.at.stage])
        self.first, self.last = self.at.stage == 0, self.at.stage == shape.stages - 1
        if shape.stages > 1:
            stage = PipelineStage(module, self.at.stage, shape.stages, torch.device("cpu"), group=rows[self.at.pipeline])
            self.schedule = Schedule1F1B(stage, self.part[1] - self.part[0], loss_fn=gpt.loss)
        self.text = gpt.Text()

    def step(self, indices: list[int]) -> float:
        given = [self.text[i] for i in indices] if self.first or self.last else []
        losses: list[torch.Tensor] = []
        self.optimizer.zero_grad()
        inputs = (torch.stack([x for x, _ in given]),) if self.first else ()
        if self.last:
            self.schedule.step(*inputs, target=torch.stack([y for _, y in given]), losses=losses)
        else:
            self.schedule.step(*inputs)
        self.optimizer.step()
        return sum(float(each.detach()) for each in losses) / max(1, len(losses))

    def block(self, first: int, count: int) -> Block:
        indices = [[i for m in range(*self.part) for i in self.shape.samples(step, m)] for step in range(first, first + count)]
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        losses = [self.step(each) for each in indices]
        cpu = time.process_time() - cpu
        dist.barrier()
        return Block(time.perf_counter() - began, cpu, losses)


def train(shape: Shape, rounds: int, steps: int, ledger: Path, seconds: float) -> Outcome:
    """What one rank runs: everstep's first step, then `rounds` + 1 times `steps` by hand and as many by everstep; after
    `seconds` no more than the block under way, but three at least."""
    outcome = Outcome()
    rank = int(os.environ["RANK"])
    pipeline = Pipeline(gpt.layers(shape.width, shape.blocks), loss=gpt.loss, optimizer=gpt.optimizer, dataset=gpt.Text(),
                        batch=shape.microbatch * shape.microbatches, microbatch=shape.microbatch, faults=shape.pipelines - 1,
                        profile=gpt.profile(shape.width, shape.blocks, shape.stages), ledger=ledger)
    hand: list[ByHand] = []
    began = [0.0, 0.0]
    losses: list[float] = []

    def on_step(report: Report) -> None:
        losses.append(report.loss)
        if report.step % steps:
            return
        done = report.step // steps  # blocks of everstep
        cpu = time.process_time() - began[1]
        dist.barrier()
        if done:
            outcome.everstep.append(Block(time.perf_counter() - began[0], cpu, losses[-steps:]))
        else:
            hand.append(ByHand(shape, pipeline, rank))
            outcome.place = hand[0].at.pipeline, hand[0].at.stage
        if done <= rounds:
            outcome.by_hand.append(hand[0].block(report.step + 1, steps))
        dist.barrier()
        began[:] = [time.perf_counter(), time.process_time()]

    until = time.monotonic() + seconds
    pipeline.run((rounds + 1) * steps + 1, on_step=on_step,
                 stop=lambda: rank == 0 and len(outcome.everstep) >= 3 and time.monotonic() > until)
    outcome.check = outcome.everstep.pop(0).losses, outcome.by_hand.pop(0).losses
    return outcome


def compare(shape: Shape, rounds: int, steps: int, ledger: Path, seconds: float) -> list[Outcome]:
    """By rank; about `seconds` at most. Ends the program where the two do not train the same."""
    outcomes: list[Outcome] = world(shape.ranks, lambda rank: train(shape, rounds, steps, ledger, seconds),
                                    seconds=10 * seconds)
    last = [o for o in outcomes if o.place[1] == shape.stages - 1]
    for step, theirs in enumerate(outcomes[0].check[0]):
        ours = sum(o.check[1][step] for o in last) / len(last)
        if abs(ours - theirs) > 1e-4 * abs(theirs):
            raise SystemExit(f"error: the loss of step {step + 1} is {theirs:.7f} by everstep and {ours:.7f} by hand")
    return outcomes


def figures(outcomes: list[Outcome], steps: int) -> list[dict[str, Any]]:
    """Of each round: seconds a step on the wall clock, processor seconds a step of all ranks."""
    return [{"everstep": outcomes[0].everstep[i].wall / steps, "by hand": outcomes[0].by_hand[i].wall / steps,
             "everstep cpu": sum(o.everstep[i].cpu for o in outcomes) / steps,
             "by hand cpu": sum(o.by_hand[i].cpu for o in outcomes) / steps} for i in range(len(outcomes[0].everstep))]
