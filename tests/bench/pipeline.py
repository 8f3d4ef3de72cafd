"""Pipelines beside a program by hand, and how survivors of a loss and a join get on.

Cases of throughput (--cases throughput): 1 x 2 is one pipeline of two stages, 2 x 2 two of them side by side. The same training
by everstep.Pipeline and by torch.distributed.pipelining, in the same processes, in blocks of --steps steps in turn
(by_hand.py); first some steps from the same weights, whose losses must agree. step: seconds of a step on the wall clock;
processor: processor seconds of a step, all ranks together, which a busy machine disturbs less; ratio: everstep to by hand,
of neighbouring blocks.

Cases of recovery (--cases recovery, join), four nodes of one rank (scripts/survivor.py), a microbatch lasts --pause seconds
more; level 2: a DDP loop in everstep.Session, level 3: everstep.Pipeline with pipelines of two stages.
  rank_sigkill   one worker dies; its agent starts another one, which is waited for
  node_sigkill   a node dies whole; three go on
  next_step      SIGKILL to the first optimizer step of the next generation, on the slowest survivor
  without_step   of it, what was not that step's own duration on that rank: the redone microbatches taken off
  planned        of it, rank 0 and its planner (level 3)
  join           a fifth node joins, its interpreter cold: longest time from step to step on who was there before, over the median before
Cases of a join with large layers (--cases fill, level 3, --fill-shape, four microbatches a step): `beside steps`, as the engine moves
them where it is told of a link of 0.2 GB/s; `at once`: of one that takes no time, so that all wait while they move.

Cases of the decision alone (--cases decision): what each rank computes between the others' words and the plan's checksum, for N
ranks of which one is lost, in one process: everstep with the plans that were made beforehand, `anew` without. `book`: seconds in
which those are made, in the background. `uneven`: every layer sends another number of bytes.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, Results, free_port
from launching import end_in_order
from recovery import Node, marks, wait_for

SCRIPT = ROOT / "tests/bench/scripts/survivor.py"
TORCHFT = "torchft's survivors: 5.1 s"


def throughput(results: Results, args: argparse.Namespace) -> None:
    import by_hand  # PyTorch: only where it is needed

    for pipelines, stages in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
        case = f"throughput {pipelines} x {stages}"
        shape = by_hand.Shape(stages, pipelines, args.width, args.blocks)
        with tempfile.TemporaryDirectory(prefix="esb-") as folder:
            outcomes = by_hand.compare(shape, args.rounds, args.steps, Path(folder), args.seconds)
        for row in by_hand.figures(outcomes, args.steps):
            print(f"{case}: " + "  ".join(f"{name} {value:.3f} s" for name, value in row.items()), flush=True)
            for system in ("by hand", "everstep"):
                results.add(case, system, "step", "s", row[system])
                results.add(case, system, "processor", "s", row[f"{system} cpu"])
            results.add(case, "everstep / by hand", "step", "x", row["everstep"] / row["by hand"], "1.03")
            results.add(case, "everstep / by hand", "processor", "x", row["everstep cpu"] / row["by hand cpu"])


class Job:
    """Nodes of one rank each, and the steps that they mark."""

    def __init__(self, work: Path, level: int, nodes: int, env: dict[str, str]) -> None:
        self.work = work
        (work / "marks").mkdir()
        port = free_port()
        self.args = ["--max-restarts", "10", "--nnodes", "2:5", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", f"bench{port}"]
        self.env = {"LEVEL": str(level)} | env
        self.nodes: list[Node] = []
        for i in range(nodes):
            self.start()
            if i == 0:
                self.until("a controller", lambda: (work / "s0/controller/pid").exists(), 60)

    def start(self) -> None:
        self.nodes.append(Node("everstep", self.args, self.work, len(self.nodes), SCRIPT, self.env))

    def until(self, what: str, there: Callable[[], object], limit: float) -> None:
        if not wait_for(there, limit):
            said = "".join(line for node in self.nodes for _, line in node.said[-20:])
            raise SystemExit(f"error: not within {limit:.0f} s: {what}\n{said}")

    def steps(self) -> dict[int, list[dict[str, Any]]]:
        """Process id -> its steps."""
        found: dict[int, list[dict[str, Any]]] = {}
        for each in marks(self.work):
            found.setdefault(each["pid"], []).append(each)
        return found

    def at(self, world: int, count: int, limit: float) -> dict[int, int]:
        """Process id -> generation, once `world` ranks have made `count` steps in a generation of so many."""
        found: dict[int, int] = {}

        def there() -> bool:
            now = {pid: [s for s in each if s["generation"] == each[-1]["generation"]] for pid, each in self.steps().items()}
            found.clear()
            found.update({pid: each[-1]["generation"] for pid, each in now.items()
                          if each[-1]["world"] == world and len(each) >= count})
            newest = max(found.values(), default=0)
            for pid in [pid for pid, generation in found.items() if generation < newest]:
                del found[pid]
            return len(found) == world

        self.until(f"{count} steps of {world} ranks", there, limit)
        return dict(found)

    def planned(self, generation: int) -> dict[str, float | None]:
        """Of a pipeline's generation."""
        lines = [line.split("\t") for line in (self.work / "marks/planned.txt").read_text().splitlines()
                 ] if (self.work / "marks/planned.txt").exists() else []
        return {f"planned {how}": float(ms) for number, ms, how in lines if int(number) == generation}

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()
        for node in self.nodes:
            node.process.wait(10)


def loss(level: int, case: str, pause: float, limit: float) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory(prefix="esb-", dir="/tmp") as folder:
        job = Job(Path(folder), level, 4, {"PAUSE": str(pause)})
        try:
            before = job.at(4, 10, limit)
            victim = job.nodes[-1]  # the first one has the controller
            (pid,) = set(victim.pids()) & set(before)
            generation = max(before.values())
            killed = time.time()
            if case == "node_sigkill":
                victim.kill()
            else:
                os.kill(pid, signal.SIGKILL)

            def firsts() -> list[dict[str, Any]]:
                """The first step of the next generation on each survivor."""
                return [new[0] for p, each in job.steps().items() if p != pid and p in before
                        for new in [[s for s in each if s["generation"] > generation]] if new]

            if not wait_for(lambda: len(firsts()) == 3, limit):
                return {"next_step": None, "without_step": None}
            last = max(firsts(), key=lambda s: s["at"])
            usual = [s["seconds"] for s in job.steps()[last["pid"]] if s["generation"] == generation][-10:]
            return {"next_step": last["at"] - killed, "without_step": last["at"] - killed - last["seconds"],
                    "step": statistics.median(usual)} | job.planned(last["generation"])
        finally:
            job.stop()


def join(level: int, env: dict[str, str], limit: float) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory(prefix="esb-", dir="/tmp") as folder:
        job = Job(Path(folder), level, 4, env)
        try:
            before = job.at(4, 10, limit)
            began = time.time()
            job.start()
            after = job.at(5, 5, limit)
            stayed = set(before) & set(after)
            if len(stayed) != 4:
                raise SystemExit(f"error: {4 - len(stayed)} of 4 processes did not outlive a join")
            pid = min(stayed)
            times = [s["at"] for s in job.steps()[pid]]
            gaps = [(b, b - a) for a, b in zip(times, times[1:])]
            usual = statistics.median([gap for at, gap in gaps if at < began][-10:])
            longest = max(gap for at, gap in gaps if at >= began)
            return {"step": usual, "longest": longest, "longest / step": longest / usual}
        finally:
            job.stop()


def decision(results: Results, args: argparse.Namespace) -> None:
    from everstep.pipeline import _agree, _planner  # only where they are needed
    from everstep.pipeline._book import Book
    from everstep.pipeline._book import Job as Ahead

    def profile(memory_mib: int, uneven: bool) -> str:
        rows = [f"{i},{6 + i * 7 % 9},{12 + i * 5 % 17},1,100,{1 + i * 11 % 16 if uneven else 4},30000000" for i in range(96)]
        return "\n".join(["everstep-profile 1", "model = drawn", f"device-memory-mib = {memory_mib}",
                          "layer,forward_ms,backward_ms,optimizer_ms,activation_mib,output_mib,parameters", *rows, ""])

    for ranks, uneven in ((6, False), (64, False), (64, True), (256, False)):
        case, microbatches = f"decision-{ranks}{'-uneven' if uneven else ''}", 4 * ranks
        text = profile(30 << 10 if ranks < 10 else 16 << 10, uneven)
        statuses = [_agree.Status(f"m{i}", {}, {}) for i in range(ranks)]
        record, _ = _agree.next_record(statuses, 1, text, microbatches, 1, 600_000, True, lambda asked, _: _planner.ask(asked))
        statuses = [_agree.Status(f"m{i}", {}, {}, record=record) for i in range(ranks)]
        book = Book()
        began = time.perf_counter()
        book.open(Ahead(text, record.plan, list(range(ranks)), record.next_id, ranks, microbatches, 1, 600_000))
        if not book.whole(120):
            raise SystemExit(f"error: {case}: no book within 120 s")
        results.add(case, "everstep", "book", "s", time.perf_counter() - began)
        for run in range(max(5, args.runs)):
            lost = run * ranks // max(5, args.runs)
            left, plans = statuses[:lost] + statuses[lost + 1:], []
            for system, ask in (("everstep", book.ask), ("anew", lambda asked, _: _planner.ask(asked))):
                began = time.perf_counter()
                plans.append(_agree.next_record(left, 2, text, microbatches, 1, 600_000, False, ask)[0].plan)
                results.add(case, system, "planned", "ms", (time.perf_counter() - began) * 1e3, "10")
            if plans[0] != plans[1] or book.how != "from the book":
                raise SystemExit(f"error: {case}: rank {lost} lost: {book.how}, and another plan\n{plans[0].picture}\n{plans[1].picture}")
        book.close()


def main() -> None:
    end_in_order()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="throughput,recovery,join,decision")
    parser.add_argument("--runs", type=int, default=3, help="of recovery and join")
    parser.add_argument("--rounds", type=int, default=8, help="blocks of throughput")
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("--seconds", type=float, default=240.0, help="of a shape: then fewer blocks than --rounds")
    parser.add_argument("--shapes", default="1x2,2x2", help="of throughput: pipelines x stages")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a run counts as never recovered")
    parser.add_argument("--levels", default="2,3")
    parser.add_argument("--fill-shape", default="1024x6", help="width x blocks; a layer's state has 192 width^2 bytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    results = Results("pipeline")
    cases = args.cases.split(",")
    if unknown := set(cases) - {"throughput", "recovery", "join", "fill", "decision"}:
        sys.exit(f"error: no case {min(unknown)}: throughput, recovery, join, fill, decision")
    if "throughput" in cases:
        throughput(results, args)
    if "decision" in cases:
        decision(results, args)
    drills: list[tuple[str, Callable[[int], dict[str, float | None]]]] = []
    if "recovery" in cases:
        drills += [(case, lambda level, case=case: loss(level, case, args.pause, args.limit))  # type: ignore[misc]
                   for case in ("rank_sigkill", "node_sigkill")]
    if "join" in cases:
        drills.append(("join", lambda level: join(level, {"PAUSE": str(args.pause)}, args.limit)))
    if "fill" in cases:
        env = {"SHAPE": args.fill_shape, "BATCH": "8", "PAUSE": "0"}
        drills += [(f"fill, {how}", lambda _, link=link: join(3, env | {"LINK": link}, args.limit))  # type: ignore[misc]
                   for how, link in (("at once", "1e6"), ("beside steps", "0.2"))]
    goals = {"without_step": f"0.25; {TORCHFT}", "longest / step": "1.5"}
    for i in range(args.runs):
        for name, drill in drills:
            for level in [3] if name.startswith("fill") else map(int, args.levels.split(",")):
                out = drill(level)
                print(f"{name} level {level} {i + 1}/{args.runs}: " + "  ".join(
                    f"{metric} {'never' if value is None else f'{value:.3f}'}" for metric, value in out.items()), flush=True)
                for metric, value in out.items():
                    unit = "x" if "/" in metric else "ms" if metric.startswith("planned") else "s"
                    results.add(name, f"level {level}", metric, unit, value, goals.get(metric, ""))
    results.finish(args)


if __name__ == "__main__":
    main()
