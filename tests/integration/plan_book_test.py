"""The plan book of a pipeline job: made in the background, at the lowest priority, and asked at a loss.

    plan of 6 ranks ── Book.open ─► a thread ─► the plans for each loss        next_record ── Book.ask ─► the same plan
"""

from __future__ import annotations

import os
import threading
import time

import pytest
from everstep.pipeline import _agree, _planner
from everstep.pipeline._book import Book, Job

LAYERS = 12


def profile(layers: int = LAYERS) -> str:
    rows = "".join(f"{i},{2 + i % 3},{4 + i % 2},1,1,10000000\n" for i in range(layers))
    return ("everstep-profile 1\ndevice-memory-mib = 1300\nlayer,forward_ms,backward_ms,activation_mib,output_mib,parameters\n"
            + rows)


class Ranks:
    """Ranks of a job with a plan."""

    def __init__(self, count: int, faults: int, layers: int = LAYERS) -> None:
        self.count, self.faults, self.profile = count, faults, profile(layers)
        fresh = [_agree.Status(f"m{i}", {}, {}) for i in range(count)]
        self.record, self.bears = self.plan(fresh, lambda text, _: _planner.ask(text))
        self.statuses = [_agree.Status(f"m{i}", {}, {}, record=self.record) for i in range(count)]

    def plan(self, statuses: list[_agree.Status], ask: object) -> tuple[_agree.Record, int]:
        return _agree.next_record(statuses, 1, self.profile, 4 * self.count, self.faults, 600_000, False, ask)  # type: ignore[arg-type]

    def job(self) -> Job:
        return Job(self.profile, self.record.plan, list(range(self.count)), self.record.next_id, self.record.most,
                   4 * self.count, self.faults, 600_000)

    def after(self, lost: set[int], joined: int = 0) -> list[_agree.Status]:
        return [s for i, s in enumerate(self.statuses) if i not in lost] + [
            _agree.Status(f"new{i}", {}, {}) for i in range(joined)]


@pytest.mark.parametrize("count, faults", [(6, 1), (9, 2), (4, 1), (5, 2), (4, 3)])
def test_a_loss_is_looked_up_and_is_the_plan_that_would_be_made(count: int, faults: int) -> None:
    """(4, 1) after a loss and (5, 2), (4, 3) at once are too few for so many copies: fewer faults are borne."""
    ranks = Ranks(count, faults)
    book = Book()
    book.open(ranks.job())
    assert book.whole(60)
    for lost in range(count):
        for joined in (0, 1):
            statuses = ranks.after({lost}, joined)
            told = ranks.plan(statuses, book.ask)
            assert told == ranks.plan(statuses, lambda text, _: _planner.ask(text))
            assert book.how == "from the book", (lost, joined, told[1])
    for lost, joined in (({0, 1}, 0), (set(), 0), ({0}, 2)):
        statuses = ranks.after(lost, joined)
        assert ranks.plan(statuses, book.ask) == ranks.plan(statuses, lambda text, _: _planner.ask(text))
        assert book.how.startswith("made "), (lost, joined)
    book.close()


def test_an_older_plans_book_is_not_used() -> None:
    ranks = Ranks(6, 1)
    book = Book()
    book.open(ranks.job())
    assert book.whole(60)
    record, _ = ranks.plan(ranks.after({2}), book.ask)
    assert book.how == "from the book"
    statuses = [_agree.Status(s.member, {}, {}, record=record) for s in ranks.after({2})]
    again = ranks.plan(statuses[1:], book.ask)
    assert again == ranks.plan(statuses[1:], lambda text, _: _planner.ask(text))
    assert book.how == "made with the book's templates"
    book.close()


def test_the_making_yields_and_ends_when_it_is_told_to() -> None:
    """A book of many plans is under way; its thread has the lowest priority, this one its own."""
    ranks = Ranks(160, 1, 96)
    book = Book()
    book.open(ranks.job())
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    (maker,) = [t for t in threading.enumerate() if t.name == "plan-book"]
    deadline = time.monotonic() + 20
    while maker.native_id is None or os.getpriority(os.PRIO_PROCESS, maker.native_id) != 19:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine
    statuses = ranks.after({7})
    assert ranks.plan(statuses, book.ask) == ranks.plan(statuses, lambda text, _: _planner.ask(text))
    book.close(20)
    maker.join(20)
    assert not maker.is_alive()
    assert ranks.plan(statuses, book.ask)[1] == 1 and book.how == "made anew"


def test_one_rank_has_no_book() -> None:
    ranks = Ranks(2, 0)
    book = Book()
    job = ranks.job()
    book.open(Job(job.profile, job.plan, [0], 1, 2, 4, 0, 0))
    assert book.whole(0)
    book.close()
