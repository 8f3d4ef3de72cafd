"""What happens to a checkpoint system, happens to ours: the scenarios of `tests/bench/run.sh scenarios`, small.

    midsave  SIGKILL of a trainer in the middle of a save
    flip     a node is lost with its memory, a spare takes its rank, and one bit of the only copy left was flipped
    shrink   a node is lost, two ranks go on as one
    steps    what saves cost in memory and open files
A job that ends in order and starts again is in files_test.py, a lost node without damage in nodes_test.py and
tests/integration/survive_test.py; what saves cost in time is no test's business.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/bench"))

from scenarios import SAVES, Case, verdict  # noqa: E402

ARGS = argparse.Namespace(size="4MiB", steps=8, limit=90.0, realtime=False)


@pytest.mark.parametrize("plan", ["midsave", "shrink"])
def test_the_newest_complete_step_comes_back_with_the_right_bits(plan: str) -> None:
    rows = Case("everstep", plan, ARGS, kill=0.4).run()
    passed, said = verdict(rows, plan, ranks=1 if plan == "shrink" else 2)
    assert passed, said


def test_a_flipped_bit_in_the_only_copy_left_is_never_restored() -> None:
    rows = Case("everstep", "flip", ARGS).run()
    assert [row for row in rows if "damaged" in row], "no bit was flipped"
    passed, said = verdict(rows, "flip", ranks=2)
    assert passed, said
    assert {row["restored"] for row in rows if "restored" in row} == {SAVES - 1}  # the step before, in the other slot


def test_saves_open_two_files_a_rank_and_take_two_slots_a_copy() -> None:
    told = {row["metric"]: row["value"] for row in Case("everstep", "steps", ARGS).run() if "metric" in row}
    assert told["descriptors"] <= 4
    assert told["memory"] < 2 * 2 + 3  # two slots, two copies; the rest are pages of programs, beside 4 MiB of state
