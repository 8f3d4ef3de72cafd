"""The jobs that the soak breaks: how each is started, what may happen to it, and what must be true of it in the end.

    steps     scripts/ledger.py, a data-parallel job with checkpoints: two nodes with spares; who is lost is replaced
    pipeline  scripts/layered.py, an everstep.Pipeline on all nodes: who is lost is left out, who comes back joins
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections import Counter

import ledger
from cluster import ROOT, Cluster, Failure
from ledger import Entry

Fault = tuple[str, str, int]  # verb, what it happens to, weight


class Job:
    """One job of one soak."""

    faults: list[Fault]
    partitions = True
    same = False  # processes outlive faults: how long the job stood still is theirs to tell, not the ranks'

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def start(self, cluster: Cluster) -> None:
        raise NotImplementedError

    def before(self, cluster: Cluster, kind: str, which: str, pids: list[int]) -> None:
        """A fault is about to happen."""

    def after(self, cluster: Cluster, verb: str, kind: str, began: float) -> None:
        """The job makes steps again."""

    def wrong(self, cluster: Cluster, entries: list[Entry]) -> list[str]:
        """Of the whole run; prints what there is to tell."""
        raise NotImplementedError

    def close(self) -> None:
        """What it started itself ends."""


class StepsJob(Job):
    """No gap, one state a step, no committed step lost unless as many copies died as there were."""

    faults = [("kill", "worker", 5), ("stop", "worker", 2), ("kill", "agent", 3), ("stop", "agent", 2), ("kill", "keeper", 2),
              ("kill", "node", 4), ("stop", "node", 1), ("kill", "controller", 3), ("stop", "controller", 2),
              ("stop", "worker unheard", 1)]  # with the controller killed: nobody is there to hear of it
    takes_memory = ("kill keeper", "kill node", "stop node", "cut node")

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.deaths: list[float] = []  # when a node's memory was gone, or out of reach

    def start(self, cluster: Cluster) -> None:
        cluster.start_job("soak", nodes=self.args.members, spares=self.args.nodes - self.args.members)

    def after(self, cluster: Cluster, verb: str, kind: str, began: float) -> None:
        if f"{verb} {kind}" in self.takes_memory:
            self.deaths.append(began)

    def wrong(self, cluster: Cluster, entries: list[Entry]) -> list[str]:
        bare = without_commit(self.deaths, cluster.committed, self.args.limit)
        wrong = ledger.check(entries, cluster.committed, bare)
        print(f"{len({c for _, c in cluster.committed})} committed steps seen; memory of a node gone or out of reach "
              f"{len(self.deaths)} times, {len(bare)} times again before the next commit; committed steps lost: "
              f"{sum('was committed' in w for w in wrong)}")
        many = {g: n for g, n in ledger.redone(entries).items() if n > 1}
        if many:  # allowed for steps that were not committed: while an agent or the controller is stopped, nothing is
            print(f"more than one step redone, none of them committed: {many}")
        return wrong


def without_commit(deaths: list[float], committed: list[tuple[float, int]], limit: float) -> list[tuple[float, float]]:
    """The times after a second loss of a node's memory that came before anything was committed since the first."""
    spans = []
    for first, second in itertools.pairwise(deaths):
        before = max((c for at, c in committed if at <= first), default=-1)
        if max((c for at, c in committed if at <= second), default=-1) <= before:
            spans.append((second, second + limit))
    return spans


class PipelineJob(Job):
    """Every microbatch of every step once, losses bit-equal to a run that nothing happened to, and no process started
    anew that no fault hit. A drained node is given back when the others have gone on: a join, as is a node that died."""

    faults = [("kill", "worker", 6), ("stop", "worker", 2), ("kill", "node", 5), ("kill", "agent", 2), ("stop", "agent", 1),
              ("kill", "controller", 3), ("drain", "node", 4)]
    partitions, same = False, True
    script = ROOT / "tests/integration/scripts/layered.py"
    again = "this worker is started anew"  # what a survivor says that gloo does not let go

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.reference: subprocess.Popen[bytes] | None = None
        self.stood: dict[int, int] = {}  # process id -> rank, before the fault
        self.moved: list[str] = []
        self.which = ""

    def start(self, cluster: Cluster) -> None:
        files = cluster.work / "files"
        cluster.start_job("soak", nodes=f"2:{self.args.nodes}", spares=0, script=self.script, FILES=str(files), PAUSE="0.02")
        self.folder = cluster.work / "undisturbed"
        self.folder.mkdir()
        self.end = cluster.work / "undisturbed.stop"
        env = cluster.env | {"LEDGER": str(self.folder), "STOP_FILE": str(self.end), "PAUSE": "0", "MEMORY": "0", "FAULTS": "0",
                             "PYTHONPATH": str(ROOT / "worker/python")}
        with open(cluster.work / "undisturbed.log", "w") as log:
            self.reference = subprocess.Popen([sys.executable, str(self.script)], env=env, stdin=subprocess.DEVNULL, stdout=log,
                                              stderr=subprocess.STDOUT, start_new_session=True)

    def before(self, cluster: Cluster, kind: str, which: str, pids: list[int]) -> None:
        self.which = which
        newest = ledger.read(cluster.ledger, time.time() - 10)
        generation = max((e.generation for e in newest), default=0)
        self.stood = {e.pid: e.rank for e in newest if e.generation == generation}
        shown = (cluster.job() or {}).get("ranks", [])
        on = {int(r["rank"]) for r in shown if r["node"] == which}
        if kind == "worker":
            hit = set(pids)
        elif kind == "controller":
            hit = set()
        else:
            hit = {pid for pid, rank in self.stood.items() if rank in on or not shown}
        self.stood = {pid: rank for pid, rank in self.stood.items() if pid not in hit}

    def after(self, cluster: Cluster, verb: str, kind: str, began: float) -> None:
        deadline = time.time() + self.args.limit
        while verb == "drain" and self.which in [r["node"] for r in (cluster.job() or {}).get("ranks", [{"node": self.which}])]:
            if time.time() > deadline:
                raise Failure(f"{self.which} still trains {self.args.limit:.0f} s after its drain")
            time.sleep(0.05)
        now = [e for e in ledger.read(cluster.ledger, began) if e.at > began]
        generation = max(e.generation for e in now)
        there = {e.pid for e in now if e.generation == generation}
        self.moved += [f"{pid} (rank {rank}) after {verb} {kind}" for pid, rank in self.stood.items() if pid not in there]

    def wrong(self, cluster: Cluster, entries: list[Entry]) -> list[str]:
        from everstep.pipeline import verify  # PyTorch: only where it is needed

        wrong = ledger.check(entries, [])
        losses: dict[int, set[int]] = {}
        for e in entries:
            losses.setdefault(e.step, set()).add(e.crc)
        with open(cluster.ledger / "steps/ledger.jsonl") as lines:
            verdict = verify(lines)
        wrong += [f"the ledger of microbatches: {fault}" for fault in verdict.faults]
        if verdict.steps != max(losses) + 1:
            wrong.append(f"the ledger of microbatches has {verdict.steps} steps, the ranks made {max(losses) + 1}")
        undisturbed = self.undisturbed(max(losses) + 1)
        other = [step for step, crcs in losses.items() if crcs != {undisturbed[step]}]
        if other:
            wrong.append(f"the loss of step {min(other)} is not that of an undisturbed run ({len(other)} such)")
        told = (cluster.work / "soak.log").read_text(errors="replace").count(self.again)
        print(f"{verdict.steps} steps, {verdict.taken_back} taken back, {verdict.generations} generations; {len(losses) - len(other)} "
              f"losses bit-equal to an undisturbed run; worlds {dict(sorted(Counter(e.world for e in entries).items()))}")
        print(f"processes that no fault hit and that were started anew: {len(self.moved)}; of those, because gloo kept them: {told}")
        if len(self.moved) > told:
            wrong.append(f"{len(self.moved)} survivors are not there any more, {told} said why: {', '.join(self.moved[:3])}")
        return wrong

    def undisturbed(self, steps: int) -> dict[int, int]:
        """Step -> CRC, of a run of one rank that began beside this one."""
        assert self.reference is not None
        deadline = time.time() + 600
        while True:
            found = {e.step: e.crc for e in ledger.read(self.folder)}
            if len(found) >= steps:
                return found
            if self.reference.poll() is not None or time.time() > deadline:
                raise Failure(f"the undisturbed run made {len(found)} of {steps} steps; its output is in {self.folder}.log")
            time.sleep(0.1)

    def close(self) -> None:
        if self.reference is not None:
            self.reference.kill()
            self.reference.wait()


JOBS: dict[str, type[Job]] = {"steps": StepsJob, "pipeline": PipelineJob}
