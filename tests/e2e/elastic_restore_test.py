"""A job at 4 ranks loses a node, goes on at 3, and is 4 again: from memory alone, into every layout, to the last bit.

    4 nodes  step 0 .. a     everything in memory and, for this test, a DCP folder a step
    3 nodes  step a+1 .. b   ranges of 4 shards (FSDP2; also through everstep.dcp), any copy (DDP)      = stock dcp.load of step a at 3 ranks
    4 nodes  step b+1 .. c   ranges of 3 shards, one rank with nothing       = stock dcp.load of step b at 4 ranks
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import Run, wait_for
from nodes_test import Nodes

SCRIPT = Path(__file__).parents[1] / "integration/scripts/elastic_state.py"


@pytest.fixture
def work() -> Iterator[Path]:
    """Short, since a socket's path is below it."""
    folder = Path(tempfile.mkdtemp(prefix="ese-", dir="/tmp"))
    (folder / "out").mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def environment(work: Path, kind: str, **more: object) -> dict[str, str]:
    base = {"KIND": kind, "OUT_DIR": str(work / "out"), "LINES": "lines", "STEPS": "100000", "OMP_NUM_THREADS": "1"}
    return base | {k: str(v) for k, v in more.items()}


def lines(work: Path, name: str = "lines") -> list[list[str]]:
    """Kind, generation, world, step, ...: what rank 0 wrote."""
    file = work / "out" / name
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def steps(work: Path, generation: int, name: str = "lines") -> dict[int, list[str]]:
    """Of one generation: step -> loss and digest, to the last bit."""
    return {int(words[3]): words[4:] for words in lines(work, name) if words[0] == "step" and int(words[1]) == generation}


def newest(work: Path) -> tuple[int, int, int]:
    """World, generation and steps of it so far."""
    found = lines(work)
    if not found:
        return 0, 0, 0
    generation = max(int(words[1]) for words in found)
    return int(next(w[2] for w in found if int(w[1]) == generation)), generation, len(steps(work, generation))


@pytest.mark.parametrize(("kind", "redundancy"), [("fsdp2", "replicate(2)"), ("fsdp2", "xor(2+1)"), ("ddp", "replicate(2)"), ("dcp", "replicate(2)")])
def test_four_ranks_then_three_then_four(work: Path, kind: str, redundancy: str) -> None:
    nodes = Nodes(work, 4, "--redundancy", redundancy, nnodes="3:4", script=SCRIPT, env=environment(work, kind))
    try:
        def runs_at(world: int, after: int) -> int:
            def there() -> int:
                assert all(run.process.poll() in (None, -9) for run in nodes.runs), nodes.told()
                now, generation, count = newest(work)
                return generation if now == world and generation > after and count >= 4 else 0

            try:
                return wait_for(f"4 steps at {world} ranks after generation {after}", there, 90)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{lines(work)[-5:]}\n{nodes.told()}") from None

        four = runs_at(4, 0)
        nodes.kill(nodes.runs[2])
        three = runs_at(3, four)
        arguments = nodes.runs[2].process.args
        assert isinstance(arguments, list)
        nodes.runs.append(Run(work, *arguments[3:], name="n4", env=environment(work, kind)))
        again = runs_at(4, three)
        (work / "out/end").touch()
        for run in nodes.runs:
            if run is not nodes.runs[2]:
                assert run.wait(60) == 0, nodes.told()
        starts = {int(w[1]): (int(w[2]), int(w[3]), w[4]) for w in lines(work) if w[0] == "start"}
        replays = []
        for generation, before in ((three, four), (again, three)):
            world, step, digest = starts[generation]
            captured = steps(work, before)
            assert digest == captured[step][1], f"restored is not what was captured at step {step}"
            assert step >= max(captured) - 2, f"{max(captured) - step} steps were lost"
            last = max(steps(work, generation))
            replays.append((generation, Run(work, "--standalone", "--nproc-per-node", world, SCRIPT, name=f"r{generation}",
                                            env=environment(work, kind, FROM=step, STEPS=last + 1, LINES=f"replay{generation}"))))
        (work / "out/end").unlink()
        for generation, run in replays:
            nodes.runs.append(run)
            assert run.wait(60) == 0, run.told()
            # The same bits at the same number of ranks: gloo's sums have a fixed order.
            assert steps(work, 1, f"replay{generation}") == steps(work, generation)
    finally:
        nodes.stop()


def test_files_of_four_ranks_are_restored_by_three(work: Path) -> None:
    ckpt = work / "ckpt"
    first = Run(work, "--standalone", "--nproc-per-node", 4, "--ckpt-dir", ckpt, SCRIPT, name="a", env=environment(work, "fsdp2", STEPS=6))
    try:
        assert first.wait(90) == 0, first.told()
        first.assert_nothing_left()
        second = Run(work, "--standalone", "--nproc-per-node", 3, "--ckpt-dir", ckpt, SCRIPT, name="b",
                     env=environment(work, "fsdp2", STEPS=8, LINES="second"))
        try:
            assert second.wait(90) == 0, second.told()
            (start,) = [w for w in lines(work, "second") if w[0] == "start"]
            assert start[2:] == ["3", "5", steps(work, 1)[5][1]]
        finally:
            second.stop()
    finally:
        first.stop()
