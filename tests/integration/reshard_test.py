"""An FSDP2 job's state, from four ranks to three and back, through a real arena: equal to dcp.load at each number of ranks.

everstep_arena_host holds the memory, as one node's keeper and agent do; torchrun starts the ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("EVERSTEP_BUILD", ROOT / "build/release"))
SCRIPT = ROOT / "tests/integration/scripts/elastic_state.py"
STEERING = ("EVERSTEP", "RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC")


class World:
    """One node's memory, and worlds of ranks that come and go."""

    def __init__(self, folder: Path) -> None:
        self.out = folder
        self.socket = folder / "keeper.sock"
        self.host = subprocess.Popen([BUILD / "tests/everstep_arena_host", self.socket, "job"], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True)
        assert self.answer()["ready"]
        self.generation = 0

    def answer(self) -> dict[str, object]:
        assert self.host.stdout
        line = self.host.stdout.readline()
        assert line, "the arena host is gone"
        return json.loads(line)

    def run(self, ranks: int, steps: int, start: int = -1, **more: object) -> list[list[str]]:
        """A generation of so many ranks up to so many steps; what its rank 0 wrote."""
        if "FROM" not in more:
            self.generation += 1
            assert self.host.stdin
            self.host.stdin.write(f"activate {self.generation} {ranks} {start} {' '.join(map(str, range(ranks)))}\n")
            self.host.stdin.flush()
            answer = self.answer()
            assert answer["ok"], answer
        name = f"lines-{self.generation}-{len(more)}"
        env = {k: v for k, v in os.environ.items() if not k.startswith(STEERING)} | {
            "EVERSTEP_KEEPER": str(self.socket), "EVERSTEP_JOB": "job", "EVERSTEP_GENERATION": str(self.generation),
            "EVERSTEP_LIBRARY": str(BUILD / "lib/libeverstep.so"), "PYTHONPATH": str(ROOT / "worker/python"), "KIND": "fsdp2",
            "OUT_DIR": str(self.out), "LINES": name, "STEPS": str(steps), "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in more.items()}
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(SCRIPT)],
                              env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return [line.split() for line in (self.out / name).read_text().splitlines()]

    def close(self) -> None:
        assert self.host.stdin
        self.host.stdin.close()
        assert self.host.wait(10) == 0


@pytest.fixture
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="esg-", dir="/tmp") as folder:
        world = World(Path(folder))
        yield world
        world.close()


def test_four_ranks_then_three_then_four(world: World) -> None:
    four = world.run(4, 4)
    three = world.run(3, 7, start=3)
    assert three[0] == ["start", "2", "3", "3", four[-1][5]], "not what four ranks captured"
    again = world.run(4, 9, start=6)
    assert again[0] == ["start", "3", "4", "6", three[-1][5]], "not what three ranks captured"
    # At the same number of ranks gloo adds in the same order: loss and state are equal to the last bit.
    replay = world.run(4, 9, FROM=6)
    assert [line[3:] for line in replay] == [line[3:] for line in again]


def test_shares_are_put_together_by_any_number_of_ranks(world: World) -> None:
    """A DDP state of which each rank captured its share: for as many ranks, and for fewer."""
    three = world.run(3, 3, KIND="shares")
    shares = [int((world.out / f"bytes-shares-{rank}").read_text()) for rank in range(3)]
    again = world.run(3, 5, start=2, KIND="shares")
    assert again[0] == ["start", "2", "3", "2", three[-1][5]], "not what three ranks captured"
    two = world.run(2, 6, start=4, KIND="shares")
    assert two[0] == ["start", "3", "2", "4", again[-1][5]], "not what three ranks captured of what they had put together"
    halves = [int((world.out / f"bytes-shares-{rank}").read_text()) for rank in range(2)]
    # Parameters and moments of 458 KB; streams, buffers and the table beside them stay whole.
    assert max(shares) - min(shares) < 50_000 and 40_000 < min(halves) - max(shares) < 130_000, (shares, halves)


def test_what_is_found_to_be_the_same_is_captured_in_shares(world: World) -> None:
    """replicated="auto": nobody says that the ranks hold the same; they compare it, after a restore as well."""
    three = world.run(3, 2, KIND="auto")
    shares = [int((world.out / f"bytes-auto-{rank}").read_text()) for rank in range(3)]
    two = world.run(2, 3, start=1, KIND="auto")
    assert two[0] == ["start", "2", "2", "1", three[-1][5]], "not what three ranks captured"
    halves = [int((world.out / f"bytes-auto-{rank}").read_text()) for rank in range(2)]
    whole = 12 * 40_009 * 37  # parameters and two moments of the wide layers; buffers of its width stay whole
    beside = 2 * 4 * 40_009 + 60_000
    assert all(0 < share - whole // 3 < beside for share in shares), shares
    assert all(0 < half - whole // 2 < beside for half in halves), halves


def test_ranks_that_hold_other_values_keep_each_its_own(world: World) -> None:
    two = world.run(2, 2, KIND="apart")
    sizes = [int((world.out / f"bytes-apart-{rank}").read_text()) for rank in range(2)]
    assert min(sizes) > 12 * 40_009 * 37, "a state that differs was divided"
    again = world.run(2, 3, start=1, KIND="apart")
    assert again[0] == ["start", "2", "2", "1", two[-1][5]]
    with pytest.raises(AssertionError, match=r"captured with replicated=False, or found to differ"):
        world.run(1, 4, start=2, KIND="apart")
