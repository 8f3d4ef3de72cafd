"""everstep.Session: a loop goes from 4 ranks to 3, to 2, to 4, and no survivor's process is started anew.

    4 nodes --SIGKILL of one--> 3 --SIGKILL of one--> 2 --two new ones--> 4      losses equal to 4 ranks undisturbed

The global batch (22, which neither 4 nor 3 divides) and its samples are the same at each number of ranks, so losses
differ by the order of float64 sums alone: 1e-9 of their value.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import ROOT, Run, wait_for
from nodes_test import Nodes

SCRIPT = Path(__file__).parent / "scripts/session.py"
EXAMPLE = ROOT / "docs/examples/session.py"


@pytest.fixture
def work() -> Iterator[Path]:
    """Short, since a socket's path is below it."""
    folder = Path(tempfile.mkdtemp(prefix="ess-", dir="/tmp"))
    (folder / "lines").mkdir()
    (folder / "plain").mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def told(folder: Path) -> dict[int, list[dict[str, float]]]:
    """By process id: its lines."""
    found = {}
    for file in folder.glob("*.jsonl"):
        whole = file.read_text().split("\n")[:-1]
        found[int(file.stem)] = [json.loads(line) for line in whole]
    return found


def at_world(folder: Path, world: int, after: int) -> dict[int, int]:
    """Rank -> process id of the newest generation after `after`, once it has `world` ranks that have made 4 steps."""
    lines = told(folder)
    newest = max((int(line["generation"]) for each in lines.values() for line in each), default=0)
    ranks = {}
    for pid, each in lines.items():
        mine = [line for line in each if line["generation"] == newest and "step" in line]
        if len(mine) >= 4 and mine[0]["world"] == world:
            ranks[int(mine[0]["rank"])] = pid
    return ranks if newest > after and sorted(ranks) == list(range(world)) else {}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_survivors_stay_from_four_to_three_to_two_to_four(work: Path, kind: str) -> None:
    lines = work / "lines"
    environment = {"KIND": kind, "LINES": str(lines), "OMP_NUM_THREADS": "1"}
    nodes = Nodes(work, 4, nnodes="2:4", script=SCRIPT, env=environment)
    gone: list[Run] = []

    def worker(run: Run, pids: dict[int, int]) -> int:
        (pid,) = set(run.processes()) & set(pids.values())
        return pid

    def runs_at(world: int, after: int = 0) -> tuple[dict[int, int], int]:
        def there() -> dict[int, int]:
            assert all(run.process.poll() is None for run in nodes.runs if run not in gone), nodes.told()
            return at_world(lines, world, after)

        try:
            ranks = wait_for(f"4 steps at {world} ranks", there, 90)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{nodes.told()}") from None
        return ranks, max(int(line["generation"]) for each in told(lines).values() for line in each)

    def lose(run: Run) -> None:
        gone.append(run)
        nodes.kill(run)

    try:
        four, generation = runs_at(4)
        where = [worker(run, four) for run in nodes.runs]
        lose(nodes.runs[2])
        three, generation = runs_at(3, generation)
        assert set(three.values()) == {where[0], where[1], where[3]}, nodes.told()
        lose(nodes.runs[1])
        two, generation = runs_at(2, generation)
        assert set(two.values()) == {where[0], where[3]}, nodes.told()
        arguments = nodes.runs[2].process.args
        assert isinstance(arguments, list)
        for name in ("n4", "n5"):
            nodes.runs.append(Run(work, *arguments[3:], name=name, env=environment))
        again, generation = runs_at(4, generation)
        assert {where[0], where[3]} < set(again.values()), nodes.told()
        (lines / "end").touch()
        for run in nodes.runs:
            if run not in gone:
                assert run.wait(60) == 0, nodes.told()
    finally:
        nodes.stop()
    everything = told(lines)
    assert max(line["resumed"] for line in everything[where[0]]) >= 3
    steps: dict[int, set[float]] = {}
    # Of all ranks: one that is torn out of a step's last collective has not told it, though the others have made it.
    for line in (line for each in everything.values() for line in each):
        if "step" in line:
            steps.setdefault(int(line["step"]), set()).add(line["loss"])
    assert sorted(steps) == list(range(len(steps))), "a step was left out"
    plain = Run(work, "--standalone", "--nproc-per-node", 4, SCRIPT, name="p",
                env=environment | {"LINES": str(work / "plain"), "STEPS": str(len(steps))})
    try:
        assert plain.wait(90) == 0, plain.told()
    finally:
        plain.stop()
    undisturbed = {int(line["step"]): line["loss"] for each in told(work / "plain").values() for line in each
                   if "step" in line}
    assert len(undisturbed) == len(steps)
    for step, losses in steps.items():
        for loss in losses:  # a step that was made again after a loss, too
            assert loss == pytest.approx(undisturbed[step], rel=1e-9), step


def test_the_example_loses_a_rank_and_the_others_stay(work: Path) -> None:
    run = Run(work, "--standalone", "--nproc-per-node", 3, EXAMPLE, env={"STEPS": "60"})
    line = re.compile(r"step (\d+) rank (\d) of 3 pid (\d+)")

    def pids(from_step: int) -> dict[int, set[int]]:
        """Rank -> those that made a step from `from_step` on."""
        found: dict[int, set[int]] = {}
        for step, rank, pid in line.findall(run.stdout()):
            if int(step) >= from_step:
                found.setdefault(int(rank), set()).add(int(pid))
        return found

    try:
        before = wait_for("ten steps", lambda: {r: max(p) for r, p in pids(10).items()} if len(pids(10)) == 3 else {})
        os.kill(before[1], signal.SIGKILL)
        assert run.wait(90) == 0, run.told()
        last = pids(59)
        assert last[0] == {before[0]} and last[2] == {before[2]}, run.told()
        assert last[1] and before[1] not in last[1], run.told()
        run.assert_nothing_left()
    finally:
        run.stop()
