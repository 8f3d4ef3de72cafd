"""The nine scenarios of a checkpoint system, against Everstep and its rivals, as one table with the evidence below it.

 1 save     what training waits for a save, p50/p95, in memcpys of the same bytes
 2 lag      from the save's begin to its completion, p50/p95, seconds
 3 step     a step of fixed work with a save beside it, over one without, medians
 4 clean    the job ends in order and starts again
 5 midsave  rank 0's trainer is killed by SIGKILL in the middle of a save, at several points
 6 node     one of two nodes is lost with its memory and its local files, and replaced
 7 flip     the same after one bit of the stored copy that will be needed was flipped
 8 shrink   the same without a replacement: two ranks of a replicated state go on as one
 9 memory   growth of memory in units of the state, and of rank 0's open files

4 to 8 end with a restore whose bits are all compared. Passed: every rank has the right bits of the newest complete step or a
later one (7: of a step at all, an older one is shown). Two ranks on this machine. A rank's "node" is, for Everstep, an agent
and keeper of its own; for the others a folder of its own on tmpfs, which is wiped (6, 7, 8), and what they set on shared storage
stays; DLRover's two ranks share a node, which is lost whole. Everstep's spare node is there from the start; the others are launched again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import time
from pathlib import Path

import environments
from common import command, figure, free_port, machine
from launching import Failed, Job, Late, end_in_order, version
from rivals import SIZES, SYSTEMS

SAVES = 3
PLANS = ("steps", "clean", "midsave", "node", "flip", "shrink")


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


class Case:
    """One plan of one system; run() gives the rows of all starts."""

    def __init__(self, system: str, plan: str, args: argparse.Namespace, kill: float = 0.0) -> None:
        self.plan, self.ours = plan, system.startswith("everstep")
        env = {"RIVAL_PLAN": plan, "RIVAL_BYTES": str(SIZES[args.size]), "RIVAL_SAVES": str(SAVES), "RIVAL_STEPS": str(args.steps),
               "RIVAL_KILL": str(kill)} | ({"RIVAL_REPLICATED": "1"} if plan == "shrink" else {})
        self.job = Job(system, 2, "scenario.py", env, args.realtime, args.limit)

    def run(self) -> list[dict]:
        with self.job as job:
            try:
                (self._ours if self.ours else self._theirs)(job)
            except Failed as error:
                told = [row["error"] for row in sorted(job.rows(), key=lambda row: not row.get("again")) if "trace" in row]
                raise type(error)(told[0] if told else str(error)) from None
            rows = job.rows()
            if not any(row.get("metric") == "first" for row in rows):
                raise Failed(next((row["error"] for row in rows if "trace" in row), job.said()))
            # What the first start's other rank says when rank 0 is gone is no news.
            return [row for row in rows if "trace" not in row or row["again"] or self.plan in ("steps", "clean")]

    def _ours(self, job: Job) -> None:
        port, files = free_port(), ("--ckpt-dir", str(job.folder / "files"))
        range_ = "1:2" if self.plan == "shrink" else "2"
        spares = ("--spares", "1") if self.plan in ("node", "flip") else ()
        nodes = [job.everstep_node(i, port, "--nnodes", range_, *spares, *files) for i in range(3 if spares else 2)]
        if self.plan in ("node", "flip", "shrink"):
            for rank in (0, 1):
                wait_for(job, f"ready-{rank}")
            state = Path((job.folder / "ready-1").read_text().split()[1]).parents[2]
            lost = nodes[int(state.name[1:])]
            for pid in [lost.pid, *(p for p in job.processes() if belongs(p, state))]:
                kill(pid)
            lost.wait(10)
            nodes.remove(lost)
        job.wait(nodes)
        if self.plan == "clean":
            port = free_port()
            job.wait([job.everstep_node(i, port, "--nnodes", "2", *files) for i in range(2)])

    def _theirs(self, job: Job) -> None:
        begin = job.dlrover if job.system == "dlrover" else job.torchrun
        process = begin()
        if self.plan in ("node", "flip", "shrink"):
            for rank in (0, 1):
                wait_for(job, f"ready-{rank}")
            kill(int((job.folder / "ready-1").read_text().split()[0]))
        if self.plan == "steps" or (job.system == "dlrover" and self.plan in ("midsave", "flip")):
            job.wait([process])  # DLRover's launcher starts the workers again by itself, and keeps their memory
            return
        if job.system == "dlrover" and self.plan in ("node", "shrink"):
            # Its two ranks share a node: lost whole, agent and memory, or, with one rank fewer, told to end.
            for pid in job.processes() if self.plan == "node" else []:
                kill(pid)
            process.terminate()
        job.wait([process])
        if self.plan in ("node", "flip", "shrink"):
            shutil.rmtree(job.folder / "node1", ignore_errors=True)
            if job.system == "dlrover":
                for name in job.new_segments():
                    (Path("/dev/shm") / name).unlink(missing_ok=True)
        if self.plan == "shrink":
            job.ranks = 1
        for _ in range(3):  # gloo sometimes does not connect its ranks at all: nobody's checkpoint is to blame
            process = begin()
            job.wait([process])
            if "connectFullMesh" not in str([row for row in job.rows() if "trace" in row]):
                return
            job.drop_last_error()


def wait_for(job: Job, name: str) -> None:
    deadline = time.monotonic() + job.limit
    while not (job.folder / name).exists() or not (job.folder / name).read_text():
        if time.monotonic() > deadline or all(p.poll() is not None for p in job.started):
            kind = Late if time.monotonic() > deadline else Failed
            raise kind(f"its ranks did not get as far as {name}: {job.said()}")
        time.sleep(0.02)


def belongs(pid: int, state: Path) -> bool:
    """An agent, keeper or worker of the node whose state directory that is."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return str(state).encode() + b"/" in words


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def verdict(rows: list[dict], plan: str, ranks: int) -> tuple[bool, str]:
    """Passed, and what came back, of the restores in `rows`."""
    told = [row["error"] for row in rows if "trace" in row]
    if told:
        return False, f"raises {told[0][:160]}"
    newest: dict[int, dict] = {row["rank"]: row for row in rows if "restored" in row and row["world"] == ranks}
    if len(newest) < ranks:
        return False, "was not started again"
    if any(row["restored"] is None for row in newest.values()):
        return False, "nothing to restore"
    found = {row["restored"] for row in newest.values()}
    if len(found) > 1:
        return False, f"ranks are at steps {sorted(found)}"
    step = found.pop()
    if not all(row["right"] for row in newest.values()):
        return False, f"WRONG BITS of step {step}, silently"
    if step < SAVES and plan != "flip":
        return False, f"step {step}, {SAVES} was complete"
    return True, f"step {step}" + (f", older than the newest {SAVES}" if step < SAVES else " of " + str(SAVES) if plan != "midsave" else "")


def numbers(rows: list[dict]) -> dict[str, str]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if "metric" in row:
            values.setdefault(row["metric"], []).append(row["value"])
    two = lambda v: f"{figure(statistics.median(v))} / {figure(quantile(v, 0.95))}"
    return {"1 save": two(values["blocked"]) + f"; first {figure(values['first'][0])} s in all", "2 lag": two(values["lag"]) + " s",
            "3 step": figure(values["inflation"][0]), "9 memory": f"{figure(values['memory'][0])}x, {values['descriptors'][0]:.0f} files"}


def scenario(system: str, plan: str, args: argparse.Namespace) -> tuple[dict[str, str], list[str], bool]:
    """Cells of the table, evidence, and whether it passed."""
    if plan == "steps":
        try:
            return numbers(Case(system, plan, args).run()), [], True
        except (Failed, KeyError) as error:
            return {"1 save": "failed"}, [f"{system}, 1 to 3 and 9: {error}"], False
    name = {"clean": "4 clean", "midsave": "5 midsave", "node": "6 node", "flip": "7 flip", "shrink": "8 shrink"}[plan]
    results = []
    evidence = []
    kills = [(i + 0.5) / args.kills for i in range(args.kills)] if plan == "midsave" else [0.0]
    for at in kills:
        try:
            rows = Case(system, plan, args, at).run()
            results.append(verdict(rows, plan, 1 if plan == "shrink" else 2))
            evidence += [f"{system}, {name}: flipped {row['damaged']}" for row in rows if "damaged" in row]
        except Late as error:
            return {name: f"no result in {args.limit:.0f} s"}, [f"{system}, {name}: no result: {error}"], False
        except Failed as error:
            results.append((False, f"fails: {str(error)[:200]}"))
    passed = all(ok for ok, _ in results)
    texts = list(dict.fromkeys(text for _, text in results))
    count = f"{sum(ok for ok, _ in results)} of {len(results)}: " if len(results) > 1 else ""
    short = count + "; ".join(texts) if passed else "**no**: " + count + "; ".join(t[:60] for t in texts)
    if not passed:
        evidence += [f"{system}, {name}: {text}" for text in texts]
    return {name: short}, evidence, passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="64MiB", choices=SIZES, help="of a rank's state")
    parser.add_argument("--steps", type=int, default=10, help="saves in the scenarios 1 to 3")
    parser.add_argument("--kills", type=int, default=5, help="points of a save at which its trainer is killed")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--realtime", action="store_true", help="before all other processes of a busy machine (as root)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one job")
    args = parser.parse_args()
    end_in_order()
    table: dict[str, dict[str, str]] = {}
    evidence: list[str] = []
    passed: dict[str, int] = {}
    versions: dict[str, str] = {}
    for system in args.systems.split(","):
        try:
            environments.python(system)
            versions[system] = version(system)
        except environments.Unavailable as error:
            evidence.append(f"{system}: {error}")
            continue
        for plan in args.plans.split(","):
            cells, told, ok = scenario(system, plan, args)
            table.setdefault(system, {}).update(cells)
            passed[system] = passed.get(system, 0) + ok
            evidence += told
            print(f"{system} {plan}: " + "  ".join(f"{k}: {v}" for k, v in cells.items()), flush=True)
            for line in told:
                print(f"    {line}", flush=True)
    columns = ["1 save", "2 lag", "3 step", "4 clean", "5 midsave", "6 node", "7 flip", "8 shrink", "9 memory"]
    print(f"\n`{command()}`; {machine()}.\n\n| system | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for system, cells in table.items():
        print(f"| {system} ({versions[system]}) | " + " | ".join(cells.get(c, "-") for c in columns) + " |")
    print()
    for line in evidence:
        print(f"- {line}")
    if args.json:
        args.json.write_text(json.dumps({"benchmark": "scenarios", "machine": machine(), "systems": table, "evidence": evidence}, indent=1) + "\n")


if __name__ == "__main__":
    main()
