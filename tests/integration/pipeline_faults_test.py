"""A rank of everstep.Pipeline dies at each labelled point of a step and of a switch: the survivors finish the step or do
it again, and losses, weights and ledger are those of a run that lost nobody.

    5 ranks, pipelines of 3 and 2   --SIGKILL at POINT-->   4 ranks, in the same processes

The short form takes some points; EVERSTEP_ALL_POINTS=01234 takes all, on each of these ranks.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from everstep.pipeline import _exchange, _holdings, _layer, _ledger, _schedule, _switch, engine
from pipeline_test import SAMPLES, profile, train, weights
from survivors import STARTED_ANEW, KeptError, Outcome, survive
from worlds import world

STEPS, AT = 5, 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, calls: int, when: Callable[[], bool]) -> None:
    """Dies before the `calls`-th call of owner.name while `when()`."""
    whole, seen = getattr(owner, name), [0]

    @functools.wraps(whole)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when():
            seen[0] += 1
            if seen[0] == calls:
                die()
        return whole(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, calls: int, when: Callable[[], bool]) -> None:
    whole, seen = getattr(owner, name), [0]

    @functools.wraps(whole)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = whole(*args, **kwargs)
        if when():
            seen[0] += 1
            if seen[0] == calls:
                die()
        return result

    setattr(owner, name, wrapped)


Point = Callable[[Callable[[], bool]], None]
POINTS: dict[str, Point] = {
    "the samples": lambda when: before(engine.Pipeline, "_data", 1, when),
    "the first forward pass": lambda when: before(_schedule.Stage, "_go_forward", 1, when),
    "after the first forward pass": lambda when: after(_schedule.Stage, "_go_forward", 1, when),
    "the second forward pass": lambda when: before(_schedule.Stage, "_go_forward", 2, when),
    "after the second forward pass": lambda when: after(_schedule.Stage, "_go_forward", 2, when),
    "the first backward pass": lambda when: before(_schedule.Stage, "_go_backward", 1, when),
    "after the first backward pass": lambda when: after(_schedule.Stage, "_go_backward", 1, when),
    "within a backward pass": lambda when: after(_schedule, "back", 2, when),
    "after the second backward pass": lambda when: after(_schedule.Stage, "_go_backward", 2, when),
    "the end of the schedule": lambda when: after(_schedule.Stage, "run", 1, when),
    "a gradient's first message": lambda when: before(_exchange.Exchange, "start", 1, when),
    "after a gradient's first message": lambda when: after(_exchange.Exchange, "start", 1, when),
    "the sum of a slice": lambda when: before(_exchange.Exchange, "add_up", 1, when),
    "after the sum of a slice": lambda when: after(_exchange.Exchange, "add_up", 1, when),
    "the end of a sum": lambda when: before(_exchange.Exchange, "finish", 1, when),
    "the tied parameters": lambda when: before(engine, "sum_ties", 1, when),
    "the vote": lambda when: before(dist, "all_reduce", 1, when),
    "after the vote": lambda when: after(dist, "all_reduce", 1, when),
    "the first optimizer": lambda when: before(_layer.Layer, "apply", 1, when),
    "after the first optimizer": lambda when: after(_layer.Layer, "apply", 1, when),
    "between two optimizers": lambda when: before(_layer.Layer, "apply", 2, when),
    "the commit": lambda when: before(engine.Pipeline, "_commit", 1, when),
    "after the step": lambda when: after(engine.Pipeline, "_commit", 1, when),
}
SWITCH: dict[str, Point] = {  # while the generation after a loss begins: a second loss
    "what all tell": lambda when: before(_switch.dist, "all_gather_object", 1, when),
    "after what all told": lambda when: after(_switch.dist, "all_gather_object", 1, when),
    "the plan": lambda when: before(engine._agree, "next_record", 1, when),
    "the plan's checksum": lambda when: after(_switch.dist, "all_gather_object", 2, when),
    "who lacks what": lambda when: before(_holdings, "fetch", 1, when),
    "what is sent": lambda when: before(_layer.Layer, "pack", 1, when),
    "what has come": lambda when: before(_layer.Layer, "unpack", 1, when),
    "the end of the switch": lambda when: after(_holdings, "fetch", 1, when),
    "the ledger's beginning": lambda when: after(_ledger.Ledger, "begin", 1, when),
}
SHORT = {"within a backward pass": 0, "after a gradient's first message": 3, "after the sum of a slice": 1,
         "after the first optimizer": 4}
SHORT_SWITCH = {"what has come": 2}
PASSED_BY = {("the samples", 1), ("between two optimizers", 0)}  # a middle stage takes none; a stage of one layer has one
ALL = [int(rank) for rank in os.environ.get("EVERSTEP_ALL_POINTS", "")]


@functools.lru_cache(maxsize=4)
def undisturbed(steps: int = STEPS, clip: float | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    results = world(1, lambda rank: train(rank, steps, deterministic=True, profile=profile(1), tied=TIED, clip=clip))
    return results[0]["losses"], weights(results)


TIED = [("1.inner.weight", "4.inner.weight")]


def job(folder: Path, dying: dict[int, Callable[[engine.Pipeline], None]],
        **options: Any) -> Callable[[int], dict[str, Any]]:
    """What each rank runs; `dying`: by first rank, what is armed."""

    def work(rank: int) -> dict[str, Any]:
        made = engine.Pipeline.__init__

        def init(self: engine.Pipeline, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            if rank in dying:
                dying[rank](self)

        engine.Pipeline.__init__ = init  # type: ignore[method-assign]
        whole, did = _schedule.Stage._go_forward, set[tuple[int, int, int]]()

        def go_forward(stage: _schedule.Stage, microbatch: int, losses: dict[int, float]) -> None:
            did.add((int(os.environ["EVERSTEP_GENERATION"]), stage._step, microbatch))
            whole(stage, microbatch, losses)

        _schedule.Stage._go_forward = go_forward  # type: ignore[method-assign]
        taken: dict[int, float] = {}
        result = train(rank, on_step=lambda report: taken.__setitem__(report.step, report.loss),
                       **{"steps": STEPS, "ledger": folder, "deterministic": True, "faults": 1, "profile": profile(2),
                          "tied": TIED} | options)
        return result | {"taken": taken, "did": did}

    return work


def drill(folder: Path, size: int, dying: dict[int, Callable[[engine.Pipeline], None]], *, joins: int = 0,
          deaf: bool = False, **options: Any) -> Outcome:
    """survive() of such a job, again where gloo kept a survivor."""
    for _ in range(2):
        with contextlib.suppress(KeptError):
            return survive(size, job(folder, dying, **options), joins=joins, deaf=deaf)
        shutil.rmtree(folder)
        folder.mkdir()
    return survive(size, job(folder, dying, **options), joins=joins, deaf=deaf)


def check(folder: Path, outcome: Any, same: Callable[[Any, Any], bool] = torch.equal, steps: int = STEPS,
          clip: float | None = None) -> _ledger.Verdict:
    losses, expected = undisturbed(steps, clip)
    taken: dict[int, float] = {}
    for result in outcome.results.values():
        for step, loss in result["taken"].items():
            assert same(torch.tensor(loss), torch.tensor(losses[step])), step
        taken |= result["taken"]
    got = weights([result | {"losses": 0} for result in outcome.results.values()])
    assert got.keys() == expected.keys()
    assert all(same(value, expected[name]) for name, value in got.items())
    verdict = _ledger.verify((folder / "ledger.jsonl").read_text().splitlines(),
                             lambda step: _ledger.expected(step, samples=SAMPLES, batch=24, microbatches=6))
    assert verdict.ok and verdict.steps == steps, verdict
    return verdict


def as_lines(words: list[str]) -> list[bytes]:
    """What the controller was told, as a ledger in a file has it."""
    lines: list[dict[str, Any]] = []
    layouts: dict[int, list[list[int]]] = {}
    for word in words:
        kind, step, generation, *rest = word.split()
        ranges = [[int(n) for n in piece.split("@")[0].split("-")] for piece in rest if "@" in piece]
        if kind == "begin":
            layouts[int(generation)] = ranges
            lines.append({"begin": int(step), "generation": int(generation), "microbatches": int(rest[0]),
                          "before": None})
        else:
            line = {"step": int(step), "generation": int(generation), "samples": int(rest[0], 16),
                    "parts": layouts[int(generation)] if rest[2] == "=" else ranges}
            if line not in lines:  # told again: nobody knew that it was heard
                lines.append(line)
    return [json.dumps(line).encode() for line in lines]


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("point", ["within a backward pass", "after the vote", "after the step"])
def test_what_the_controller_is_told_is_whole_when_rank_0_dies(tmp_path: Path, point: str, deaf: bool) -> None:
    """`deaf`: the controller was away until then, so the next rank 0 tells all of it."""
    arm = after_step if point == "after the step" else in_step(POINTS[point])
    outcome = drill(tmp_path, 5, {0: arm}, ledger=None, deaf=deaf)
    assert outcome.died == [0] and outcome.generations == 2
    verdict = _ledger.verify(as_lines(outcome.words),
                             lambda step: _ledger.expected(step, samples=SAMPLES, batch=24, microbatches=6))
    assert verdict.ok and verdict.steps == STEPS, (verdict, outcome.words)
    assert outcome.words[0].startswith("begin 0 1 6 ") and outcome.words[-1].startswith(f"step {STEPS - 1} 2 ")


def in_step(point: Point) -> Callable[[engine.Pipeline], None]:
    return lambda pipeline: point(lambda: pipeline.step == AT and pipeline._stage is not None)


def after_step(pipeline: engine.Pipeline) -> None:
    POINTS["after the step"](lambda: pipeline.step == AT + 1)


@pytest.mark.parametrize(("point", "rank"), [(point, rank) for point in POINTS for rank in range(5)
                                             if (rank in ALL and (point, rank) not in PASSED_BY)
                                             or SHORT.get(point) == rank])
def test_a_rank_dies_in_a_step(tmp_path: Path, point: str, rank: int) -> None:
    arm = after_step if point == "after the step" else in_step(POINTS[point])
    outcome = drill(tmp_path, 5, {rank: arm})
    assert outcome.died == [rank] and outcome.generations == 2
    check(tmp_path, outcome)


@pytest.mark.parametrize(("point", "rank"), [(point, rank) for point in SWITCH for rank in range(5)
                                             if rank in ALL or SHORT_SWITCH.get(point) == rank])
def test_a_second_rank_dies_in_the_switch(tmp_path: Path, point: str, rank: int) -> None:
    """Rank 4 and a newcomer: six were there, so that two copies of each layer outlive the first loss."""

    def second(pipeline: engine.Pipeline) -> None:
        SWITCH[point](lambda: os.environ["EVERSTEP_GENERATION"] == "2" and pipeline._version in (0, AT))

    outcome = drill(tmp_path, 6, {5: in_step(POINTS["the first backward pass"]), rank: second}, joins=1)
    assert outcome.died[0] == 5
    check(tmp_path, outcome)


def test_who_missed_the_vote_takes_the_step_with_those_who_did_not(tmp_path: Path) -> None:
    """Rank 4 dies after the vote; ranks 0 and 2 have taken the step, 1 and 3 did not hear its result."""

    def deaf(pipeline: engine.Pipeline) -> None:
        whole = dist.all_reduce

        def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            whole(tensor, *args, **kwargs)
            if pipeline.step == AT and os.environ["EVERSTEP_GENERATION"] == "1":
                with contextlib.suppress(RuntimeError):
                    tensor.fill_(float("nan"))
                raise RuntimeError("Connection closed by peer")

        dist.all_reduce = all_reduce

    outcome = drill(tmp_path, 5, {4: in_step(POINTS["after the vote"]), 1: deaf, 3: deaf})
    assert outcome.died == [4]
    check(tmp_path, outcome)
    assert sum(AT in result["taken"] for result in outcome.results.values()) == 2  # nobody did it again


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_other_pipeline_does_not_do_its_microbatches_again(tmp_path: Path, deterministic: bool) -> None:
    """Rank 1 of the pipeline that has microbatches 0 .. 2 dies; 3 .. 5 go through the other one."""
    dies = in_step(POINTS["after the first backward pass"])
    outcome = drill(tmp_path, 5, {1: dies}, deterministic=deterministic)
    assert outcome.died == [1]
    again = {i for result in outcome.results.values() for generation, step, i in result["did"]
             if (generation, step) == (2, AT)}
    assert again == {0, 1, 2}
    check(tmp_path, outcome, torch.equal if deterministic else lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5))


def test_without_deterministic_a_disturbed_run_is_one_of_the_undisturbed_ones(tmp_path: Path) -> None:
    """The test: runs that lost nobody differ from layout to layout by the order of sums. At each step, how far the
    disturbed run lies from the farthest of these, over all steps no more than three times how far they lie from each
    other."""
    steps = 16

    def run(size: int, least: int) -> torch.Tensor:
        results = world(size, lambda rank: train(rank, steps, profile=profile(least), tied=TIED))
        return torch.tensor(results[0]["losses"], dtype=torch.float64)

    undisturbed_runs = torch.stack([run(*layout) for layout in ((1, 1), (2, 2), (3, 2), (4, 1), (5, 2), (6, 1))])
    arms = {4: in_step(POINTS["the first backward pass"])}
    outcome = drill(tmp_path, 5, arms, deterministic=False, steps=steps)
    assert outcome.died == [4]
    disturbed = torch.tensor([outcome.results[0]["taken"][step] for step in range(steps)], dtype=torch.float64)
    apart = (undisturbed_runs[:, None] - undisturbed_runs[None]).abs().amax((0, 1))
    away = (undisturbed_runs - disturbed).abs().amax(0)
    assert 0 < float(apart.sum()) < 1e-3 * float(disturbed.sum())  # they do differ, and next to nothing
    assert float(away.sum()) <= 3 * float(apart.sum()), (away, apart)


def test_a_drill_whose_survivor_gloo_kept_is_done_again(tmp_path: Path) -> None:
    again, folder = tmp_path / "again", tmp_path / "job"
    folder.mkdir()

    def kept(pipeline: engine.Pipeline) -> None:
        whole = pipeline._take_step

        def take_step(*args: Any) -> Any:
            if pipeline.step == AT and not again.exists():
                again.touch()
                os._exit(STARTED_ANEW)
            return whole(*args)

        pipeline._take_step = take_step  # type: ignore[method-assign]

    outcome = drill(folder, 5, {4: in_step(POINTS["the first backward pass"]), 2: kept})
    assert again.exists() and outcome.died == [4]
    check(folder, outcome)


def test_more_losses_than_copies_go_back_to_the_newest_whole_step_in_files(tmp_path: Path) -> None:
    """Ranks 0 and 3, which hold the first layer of both pipelines, die when three steps are taken. The file of that layer
    after three steps is damaged, so all go on from two."""

    def dies(pipeline: engine.Pipeline) -> None:
        whole = pipeline._take_step

        def take_step(*args: Any) -> Any:
            if pipeline.step == 3 and os.environ["EVERSTEP_GENERATION"] == "1":
                assert pipeline._files is not None
                pipeline._files.wait()
                for file in (tmp_path / "files").glob("step-*03.rank-00000-of-*.everstep"):  # rank 0 wrote it
                    file.write_bytes(file.read_bytes()[:-9] + b"something")
                die()
            return whole(*args)

        pipeline._take_step = take_step  # type: ignore[method-assign]

    outcome = drill(tmp_path, 5, {3: dies, 0: dies}, directory=tmp_path / "files", every=1)
    assert sorted(outcome.died) == [0, 3]
    assert check(tmp_path, outcome).taken_back == 1


def test_a_job_that_is_started_again_goes_on_from_its_files(tmp_path: Path) -> None:
    options: dict[str, Any] = {"directory": tmp_path / "files", "every": 2, "deterministic": True, "faults": 0,
                               "profile": profile(2), "tied": TIED}
    first = world(3, lambda rank: train(rank, 4, **options))
    second = world(2, lambda rank: train(rank, STEPS, **options))
    losses, expected = undisturbed()
    assert first[0]["losses"] + second[0]["losses"] == losses
    got = weights(second)
    assert all(torch.equal(got[name], value) for name, value in expected.items())

