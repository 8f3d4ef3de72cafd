"""Newcomers of everstep.Pipeline get their layers while the plan before trains, over a link on which a step has time for
one layer: the same losses and weights as without them, whoever is lost meanwhile.

    4 ranks   --join-->   4 train, the fifth receives and follows   --a few steps later-->   5 train

The short form takes some points of a loss; any EVERSTEP_ALL_POINTS takes all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from everstep.pipeline import _agree, _fill, _layer, _switch, engine
from pipeline_faults_test import ALL, AT, after, before, check, drill
from survivors import join

SLOW = (20.0, 1e-6)
STEPS = 12
Arm = Callable[[engine.Pipeline], None]


def joins(pipeline: engine.Pipeline) -> None:
    """Newcomers are to come while step AT is under way."""
    whole = pipeline._take_step

    def take_step(session: Any, *args: Any) -> Any:
        if session.rank == 0 and pipeline.step == AT and os.environ["EVERSTEP_GENERATION"] == "1":
            join(session)
        return whole(session, *args)

    pipeline._take_step = take_step  # type: ignore[method-assign]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("size", "count", "clip"), [(4, 1, None), (4, 2, 0.5)])
def test_they_are_filled_while_the_plan_before_trains(tmp_path: Path, size: int, count: int,
                                                      clip: float | None) -> None:
    outcome = drill(tmp_path, size, {0: joins}, link=SLOW, steps=STEPS, clip=clip, joins=count)
    assert outcome.died == [] and outcome.generations == 2
    assert check(tmp_path, outcome, steps=STEPS, clip=clip).taken_back == 0
    said = [line for line in lines(tmp_path) if "step" in line and line["generation"] == 2]
    beside = [line for line in said if "by" in line]  # told as what pipelines of generation 1 did
    assert 1 < len(beside) < len(said) and said[:len(beside)] == beside
    assert all(generation == 1 for line in beside for generation, _ in line["by"])


def test_what_came_damaged_moves_again_in_the_end(tmp_path: Path) -> None:
    def damages(pipeline: engine.Pipeline) -> None:
        whole, seen = _switch.Arrival.take, [0]

        def take(arrival: _switch.Arrival) -> tuple[_layer.Bundle, bool]:
            bundle, undamaged = whole(arrival)
            seen[0] += 1
            return bundle, undamaged and seen[0] != 1

        _fill.Arrival.take = take  # type: ignore[method-assign]

    outcome = drill(tmp_path, 4, {0: joins, 4: damages}, link=SLOW, steps=STEPS, joins=1)
    check(tmp_path, outcome, steps=STEPS)


FILLING: dict[str, Callable[[Callable[[], bool]], None]] = {
    "what sets off": lambda when: before(_fill.Fill, "begin", 2, when),
    "what has come": lambda when: before(_fill.Fill, "arrive", 2, when),
    "the gradients that follow": lambda when: before(_fill.Fill, "follow", 2, when),
    "after the gradients that follow": lambda when: after(_fill.Fill, "follow", 2, when),
    "the plan's taking effect": lambda when: before(engine.Pipeline, "_adopt", 1, when),
    "after it": lambda when: after(engine.Pipeline, "_adopt", 1, when),
}


SHORT = {"what sets off": 4, "what has come": 1, "the gradients that follow": 4, "the plan's taking effect": 1}


@pytest.mark.parametrize(("point", "rank"), [(point, rank) for point in FILLING for rank in (1, 4)
                                             if ALL or SHORT.get(point) == rank])
def test_a_rank_dies_meanwhile(tmp_path: Path, point: str, rank: int) -> None:
    """Rank 1 trains, rank 4 is the newcomer."""

    def dies(pipeline: engine.Pipeline) -> None:
        FILLING[point](lambda: os.environ["EVERSTEP_GENERATION"] == "2")

    arms: dict[int, Arm] = {0: joins, rank: dies}
    outcome = drill(tmp_path, 4, arms, link=SLOW, steps=STEPS, joins=1)
    assert outcome.died == [rank] and outcome.generations == 3
    check(tmp_path, outcome, steps=STEPS)


def test_waves_are_what_a_step_has_time_for() -> None:
    moves = [_agree.Move(layer, source, 9) for layer, source in ((0, 0), (1, 1), (2, 0), (3, 1))]
    sizes = [40, 40, 10, 300]
    assert _fill.waves(moves, sizes, 1.0, 4000.0) == []  # a tenth of a step
    assert _fill.waves(moves, sizes, 0.0, 4000.0) == [[m] for m in moves]
    assert [[m.layer for m in wave] for wave in _fill.waves(moves, sizes, 1.0, 180.0)] == [[0, 1, 2], [3]]
    assert _fill.waves([], sizes, 1.0, 1.0) == []
    one_source = [_agree.Move(0, 0, 8), _agree.Move(1, 0, 9)]  # it sends 80 in all
    assert [len(wave) for wave in _fill.waves(one_source, sizes, 1.0, 120.0)] == [1, 1]
