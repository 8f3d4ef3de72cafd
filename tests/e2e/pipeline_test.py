"""everstep.Pipeline under `everstep run`: nodes go and come, survivors' processes stay, and every step is taken once.

    6 nodes --SIGSTOP of a worker--> 6 --SIGKILL of one--> 5 --two new--> 7 --SIGKILL of two--> 5 --one drains--> 4
    6 nodes --SIGKILL of two, in different pipelines--> 4 --of a whole pipeline--> 2 --two new, controller killed--> 4

With deterministic=True the losses and weights are then the bits of one rank that was never disturbed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from everstep.pipeline import _ledger
from launch import ROOT, Run, wait_for
from nodes_test import Nodes

SCRIPT = Path(__file__).parent / "scripts/pipeline.py"
EXAMPLE = ROOT / "docs/examples/pipeline.py"
SAMPLES, BATCH, MICROBATCHES, SEED = 240, 24, 12, 11  # of SCRIPT


@pytest.fixture
def work() -> Iterator[Path]:
    """Short, since a socket's path is below it."""
    folder = Path(tempfile.mkdtemp(prefix="esp-", dir="/tmp"))
    (folder / "lines").mkdir()
    (folder / "plain").mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def told(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """By process id: its lines."""
    return {int(file.stem): [json.loads(line) for line in file.read_text().split("\n")[:-1]]
            for file in folder.glob("*.jsonl") if file.stem.isdigit()}


class Job:
    """SCRIPT on several nodes of this machine."""

    def __init__(self, work: Path, count: int, nnodes: str, **environment: str) -> None:
        self.work, self.lines = work, work / "lines"
        self.environment = {"LINES": str(self.lines), "OMP_NUM_THREADS": "1", "PAUSE": "0.004"} | environment
        self.nodes = Nodes(work, count, nnodes=nnodes, script=SCRIPT, env=self.environment)
        self.gone: list[Run] = []
        self.generation = 0

    def at(self, world: int) -> dict[int, int]:
        """Rank -> process id, once a later generation has `world` ranks that have taken 3 steps each."""

        def there() -> dict[int, int]:
            assert all(run.process.poll() is None for run in self.nodes.runs if run not in self.gone), self.nodes.told()
            lines = told(self.lines)
            newest = max((line["generation"] for each in lines.values() for line in each), default=0)
            ranks = {}
            for pid, each in lines.items():
                mine = [line for line in each if line["generation"] == newest]
                if len(mine) >= 3 and mine[0]["world"] == world:
                    ranks[mine[0]["rank"]] = pid
            return ranks if newest > self.generation and sorted(ranks) == list(range(world)) else {}

        try:
            ranks = wait_for(f"3 steps at {world} ranks", there, 60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.nodes.told()}") from None
        self.generation = max(line["generation"] for each in told(self.lines).values() for line in each)
        return ranks

    def pipelines(self, ranks: dict[int, int]) -> list[list[int]]:
        """Process ids by pipeline and stage, as the ledger has them."""
        begins = [json.loads(line) for line in (self.lines / "ledger.jsonl").read_text().splitlines() if "begin" in line]
        return [[ranks[rank] for rank in row] for row in begins[-1]["ranks"]]

    def worker(self, run: Run, ranks: dict[int, int]) -> int:
        (pid,) = set(run.processes()) & set(ranks.values())
        return pid

    def lose(self, *runs: Run) -> None:
        self.gone += runs
        for run in runs:
            self.nodes.kill(run)

    def join(self, *names: str) -> list[Run]:
        arguments = self.nodes.runs[-1].process.args
        assert isinstance(arguments, list)
        new = [Run(self.work, *arguments[3:], name=name, env=self.environment) for name in names]
        self.nodes.runs += new
        return new

    def end(self) -> None:
        (self.lines / "end").touch()
        for run in self.nodes.runs:
            if run not in self.gone:
                assert run.wait(60) == 0, self.nodes.told()


def losses(folder: Path) -> dict[int, float]:
    """Of each step; every process that took it must have the same."""
    found: dict[int, set[float]] = {}
    for line in (line for each in told(folder).values() for line in each):
        found.setdefault(line["step"], set()).add(line["loss"])
    assert all(len(each) == 1 for each in found.values()), {s: e for s, e in found.items() if len(e) > 1}
    assert sorted(found) == list(range(len(found))), "a step was left out"
    return {step: next(iter(each)) for step, each in found.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the whole model; every holder of a layer must have the same bits."""
    out: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.pt"):
        for index, state in torch.load(file).items():
            for name, value in state.items():
                assert torch.equal(out.setdefault(f"{index}.{name}", value), value), f"{index}.{name}"
    return out


def test_losses_joins_and_a_drain_in_one_process_life(work: Path) -> None:
    job = Job(work, 6, "2:7", DETERMINISTIC="1")
    try:
        six = job.at(6)
        where = {job.worker(run, six): run for run in job.nodes.runs}
        pipelines = job.pipelines(six)
        assert len(pipelines) >= 2 and all(len(pids) >= 2 for pids in pipelines)
        first = job.worker(job.nodes.runs[0], six)  # beside the controller; its end is another test's
        stopped = next(pid for pid in where if pid != first)
        os.kill(stopped, signal.SIGSTOP)
        six = job.at(6)
        (fresh,) = set(six.values()) - set(where)
        assert set(where) - set(six.values()) == {stopped}
        where[fresh] = where.pop(stopped)
        pipelines = job.pipelines(six)
        job.lose(where.pop(next(pids[1] for pids in pipelines if pids[1] != first)))
        five = job.at(5)
        assert set(five.values()) == set(where)
        new = job.join("n6", "n7")
        seven = job.at(7)
        assert set(where) < set(seven.values())
        where |= {job.worker(run, seven): run for run in new}
        # Of one pipeline: another one has every layer.
        job.lose(*[where.pop(pid) for pid in next(p for p in job.pipelines(seven) if first not in p)[:2]])
        again = job.at(5)
        assert set(again.values()) == set(where)
        drained = next(pid for pid in where if pid != first)
        run = where.pop(drained)
        job.gone.append(run)
        run.process.terminate()
        four = job.at(4)
        assert set(four.values()) == set(where)
        job.end()
    finally:
        job.nodes.stop()
    check(job, 5)


def stayed(job: Job, where: dict[int, Run], ranks: dict[int, int]) -> dict[int, Run]:
    """Survivors are the same processes, but for those that said that gloo kept them in a message that was cut off."""
    now = {job.worker(run, ranks): run for run in where.values()}
    told = sum(file.read_text(errors="replace").count("this worker is started anew")
               for run in job.nodes.runs for file in run.state.rglob("stderr.log"))
    assert len(set(where) - set(now)) <= told, job.nodes.told()
    return now


def test_two_pipelines_lose_one_each_then_one_is_lost_whole_then_the_controller_dies_in_a_switch(work: Path) -> None:
    job = Job(work, 6, "2:6", DETERMINISTIC="1")
    try:
        six = job.at(6)
        where = {job.worker(run, six): run for run in job.nodes.runs}
        first = job.worker(job.nodes.runs[0], six)
        front, back = job.pipelines(six)[:2]
        # The beginning of one and the end of the other: between them every layer is left.
        ends = (front[-1], back[0]) if first in (front[0], back[-1]) else (front[0], back[-1])
        assert len(front) > 1 and len(back) > 1 and first not in ends
        job.lose(*[where.pop(pid) for pid in ends])
        four = job.at(4)
        where = stayed(job, where, four)
        first = job.worker(job.nodes.runs[0], four)
        mine, other = sorted(job.pipelines(four), key=lambda pids: first not in pids)
        assert first in mine and len(other) > 1
        job.lose(*[where.pop(pid) for pid in other])
        two = job.at(2)
        where = stayed(job, where, two)
        controller = job.nodes.runs[0].pid_of("controller")
        (job.lines / "kill.new").write_text(str(controller))
        (job.lines / "kill.new").rename(job.lines / "kill")
        new = job.join("n6", "n7")
        four = job.at(4)
        assert (job.lines / "killed").exists() and job.nodes.runs[0].pid_of("controller") not in (0, controller)
        where = stayed(job, where, four)
        assert len(where) == 2 and all(job.worker(run, four) for run in new)
        job.end()
    finally:
        job.nodes.stop()
    check(job, 4)


def check(job: Job, generations: int) -> None:
    """Each step was taken once, with the losses and weights of one rank that nothing happened to."""
    work = job.work
    disturbed = losses(job.lines)
    ledger = (job.lines / "ledger.jsonl").read_text().splitlines()
    verdict = _ledger.verify(ledger, lambda step: _ledger.expected(step, samples=SAMPLES, batch=BATCH, seed=SEED,
                                                                   microbatches=MICROBATCHES))
    assert verdict.ok and verdict.steps == len(disturbed) and verdict.generations >= generations, verdict
    plain = Run(work, "--standalone", "--nproc-per-node", 1, SCRIPT, name="p",
                env=job.environment | {"LINES": str(work / "plain"), "STEPS": str(len(disturbed)), "MEMORY": "0", "FAULTS": "0", "PAUSE": "0"})
    try:
        assert plain.wait(90) == 0, plain.told()
    finally:
        plain.stop()
    assert losses(work / "plain") == disturbed
    undisturbed, survived = weights(work / "plain"), weights(job.lines)
    assert undisturbed.keys() == survived.keys()
    for name, value in undisturbed.items():
        assert torch.equal(value, survived[name]), name


def test_a_batch_that_does_not_divide_is_refused_once(work: Path) -> None:
    """Not in --max-restarts generations that all say the same."""
    environment = {"LINES": str(work / "lines"), "OMP_NUM_THREADS": "1", "PAUSE": "0", "MICROBATCH": "7"}
    run = Run(work, "--standalone", "--max-restarts", 10, "--nproc-per-node", 3, SCRIPT, env=environment)
    try:
        assert run.wait(60) == 1, run.told()
        run.assert_nothing_left()
    finally:
        run.stop()
    assert "input_refused" in run.stderr() and "a batch of 24 does not divide into microbatches of 7" in run.stderr(), run.told()
    assert sorted(folder.name for folder in run.state.rglob("attempt_*")) == ["attempt_0"]


def test_a_newcomer_with_other_settings_is_refused_and_the_others_train_on(work: Path) -> None:
    job = Job(work, 2, "2:3", MEMORY="0", FAULTS="0")
    try:
        two = job.at(2)
        job.environment["FAULTS"] = "1"
        (other,) = job.join("n3")
        again = job.at(2)
        assert set(again.values()) == set(two.values()), job.nodes.told()
        assert "faults is 0 on rank 0 and 1 on rank 2" in other.told()
        job.gone.append(other)
        other.stop()
        job.end()
    finally:
        job.nodes.stop()


def test_the_example_loses_ranks_again_and_again_and_the_others_stay(work: Path) -> None:
    """More often in a row than a job may be lost without getting on: it does get on, and the controller is told."""
    run = Run(work, "--standalone", "--nproc-per-node", 4, EXAMPLE, env={"STEPS": "100", "OMP_NUM_THREADS": "1"})
    line = re.compile(r"step (\d+) rank (\d) of 4 pid (\d+) loss ([\d.]+)")

    def now(gone: int = 0) -> dict[int, int]:
        """Rank -> process id that took its newest step, once all four, `gone` not among them, have taken one of the
        newest three."""
        found = {int(rank): (int(step), int(pid)) for step, rank, pid, _ in line.findall(run.stdout())}
        newest = max((step for step, _ in found.values()), default=0)
        ranks = {rank: pid for rank, (step, pid) in found.items() if step > newest - 3}
        return ranks if len(ranks) == 4 and gone not in ranks.values() else {}

    try:
        ranks = wait_for("four ranks", now)
        for lost in (1, 2, 3, 1):
            os.kill(ranks[lost], signal.SIGKILL)
            after = wait_for("four ranks", functools.partial(now, ranks[lost]))
            assert [rank for rank in range(4) if after[rank] != ranks[rank]] == [lost], run.told()
            ranks = after
        assert run.wait(90) == 0, run.told()
    finally:
        run.stop()
    losses = [float(loss) for *_, loss in line.findall(run.stdout())]
    assert losses[-1] < losses[0] / 2
    verdict = _ledger.verify((work / "ledger/ledger.jsonl").read_text().splitlines())
    assert verdict.ok and verdict.steps == 100 and verdict.generations == 5, verdict
