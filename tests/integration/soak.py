"""A soak: N random real faults on a running job, then proof that nothing was lost and nothing is left.

    tests/run.sh soak [--faults 200] [--seed S] [--nodes 4] [--keep] [--spin]

A cluster of separate processes on loopback trains scripts/ledger.py on two nodes with spares. Faults are drawn from
a seed: SIGKILL or SIGSTOP of a worker, an agent, a keeper, a whole node, the controller. After each the job must
make new steps on every rank within --limit seconds; stopped processes go on after a drawn time (a stopped worker
is left to the controller). At the end the ledger of steps has no gap, one state a step, no committed step redone,
and no process, socket, memfd or file of the cluster is left.

--spin instead: eight busy processes for a minute on this machine; no node may be taken for lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import ledger

ROOT = Path(__file__).resolve().parents[2]
EVERSTEP = str(ROOT / ".venv/bin/everstep")
WORLD = 2


class Failure(Exception):
    """What went wrong, for the last line of the report."""


def pid_of(file: Path) -> int | None:
    try:
        pid = int(file.read_text().split()[0])
        os.kill(pid, 0)
    except (OSError, ValueError, IndexError):
        return None
    return pid


def cluster_processes(state: Path) -> dict[int, str]:
    """Every live process whose command line or environment names the state directory."""
    found = {}
    mark = str(state).encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command, env = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            zombie = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            continue
        if (mark in command or mark in env) and not zombie:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


class Cluster:
    """`everstep cluster up` in a directory of its own, and one job on it."""

    def __init__(self, work: Path, nodes: int) -> None:
        self.work, self.state = work, work / "c"
        self.name = f"soak-{os.getpid()}"
        self.ledger, self.stop_file = work / "ledger", work / "stop"
        self.ledger.mkdir()
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP", "TORCHELASTIC"))}
        self.env |= {"OMP_NUM_THREADS": "1", "LEDGER": str(self.ledger), "STOP_FILE": str(self.stop_file)}
        self.committed: list[tuple[float, int]] = []
        self.cli("cluster", "up", "--nodes", str(nodes), "--name", self.name, "--state-dir", str(self.state))
        listing = json.loads(self.cli("cluster", "list", "-o", "json"))
        self.env["EVERSTEP_CONTROLLER"] = next(c for c in listing["items"] if c["name"] == self.name)["controller"]

    def cli(self, *args: str, check: bool = True) -> str:
        done = subprocess.run([EVERSTEP, *args], check=False, capture_output=True, text=True, timeout=60, env=self.env)
        if check and done.returncode:
            raise Failure(f"everstep {' '.join(args)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def start_job(self, nodes: int, spares: int) -> None:
        command = [EVERSTEP, "run", "--name", "soak", "--nnodes", str(nodes), "--spares", str(spares), "--nproc-per-node",
                   str(WORLD // nodes), "--max-restarts", "1000000", str(ROOT / "tests/integration/scripts/ledger.py")]
        with open(self.work / "run.log", "w") as output:
            self.run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=self.env, stdin=subprocess.DEVNULL)

    def job(self) -> dict | None:
        """`job show`, or nothing while the controller is away."""
        text = self.cli("job", "show", "soak", "-o", "json", check=False)
        try:
            shown = json.loads(text)
        except json.JSONDecodeError:
            return None
        self.committed.append((time.time(), int(shown.get("committed_step", -1))))
        return shown

    def wait_steps(self, after: float, count: int, limit: float) -> float:
        """Until every rank has made `count` steps that ended after `after`; the wall clock of the last rank's first."""
        deadline = time.time() + limit
        while time.time() < deadline:
            if self.run.poll() is not None:
                raise Failure(f"the run ended with {self.run.returncode}; its output is in {self.work}/run.log")
            fresh = [e for e in ledger.read(self.ledger) if e.at > after]
            counts = Counter(e.rank for e in fresh)
            if len(counts) == WORLD and min(counts.values()) >= count:
                return max(min(e.at for e in fresh if e.rank == rank) for rank in range(WORLD))
            time.sleep(0.05)
        raise Failure(f"no {count} steps of every rank within {limit:.0f} s")

    def node_names(self) -> list[str]:
        return sorted(p.name for p in (self.state / "nodes").iterdir() if (p / "agent.pid").exists())

    def pids(self, kind: str, which: str) -> list[int]:
        """The pids of one victim: kind is agent, keeper, node, controller or worker (which: a rank)."""
        if kind == "controller":
            files = [self.state / "controller/pid"]
        elif kind == "worker":
            newest = [e for e in ledger.read(self.ledger) if e.rank == int(which)]
            return [newest[-1].pid] if newest else []
        else:
            node = self.state / "nodes" / which
            files = [node / "agent.pid"] if kind == "agent" else [node / "keeper.pid"] if kind == "keeper" else [node / "agent.pid", node / "keeper.pid"]
        return [pid for pid in map(pid_of, files) if pid]

    def autopsy(self) -> None:
        """Writes down where everything stands that still lives, before it is taken down: work/autopsy.txt."""
        processes = cluster_processes(self.state)
        parts = [f"{time.time():.3f} of the wall clock\n", self.cli("job", "show", "soak", check=False),
                 self.cli("node", "list", check=False), self.cli("events", "-o", "jsonl", check=False)]
        workers = {e.pid for e in ledger.read(self.ledger)} & set(processes)
        for pid in workers:
            os.kill(pid, signal.SIGUSR1)  # its Python stacks go to its log
        # Workers first: a debugger stops its process, and a stopped agent loses its node.
        for pid, command in sorted(processes.items(), key=lambda item: item[0] not in workers):
            parts.append(f"\n==== {pid}: {command[:160]}\n")
            for file in ("wchan", "status"):
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{pid}/{file}").read_text()
                    parts.append("\n".join(line for line in text.splitlines() if not line.startswith(("Vm", "Rss", "Hugetlb"))) + "\n")
            if shutil.which("gdb"):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    parts.append(subprocess.run(["gdb", "-p", str(pid), "-batch", "-ex", "thread apply all bt 24"], check=False,
                                                capture_output=True, text=True, timeout=30).stdout)
        (self.work / "autopsy.txt").write_text("".join(parts))

    def down(self) -> None:
        """Takes the cluster down; its logs stay in the soak's directory."""
        for file in self.state.rglob("*.log"):
            kept = self.work / "logs" / file.relative_to(self.state)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, kept)
        self.cli("cluster", "down", self.name, check=False)


FAULTS = [("kill", "worker", 5), ("stop", "worker", 2), ("kill", "agent", 3), ("stop", "agent", 2), ("kill", "keeper", 2),
          ("kill", "node", 4), ("stop", "node", 1), ("kill", "controller", 3), ("stop", "controller", 2)]


def one_fault(cluster: Cluster, draw: random.Random, number: int, limit: float) -> tuple[str, float]:
    verb, kind, _ = draw.choices(FAULTS, weights=[f[2] for f in FAULTS])[0]
    which = str(draw.randrange(WORLD)) if kind == "worker" else draw.choice(cluster.node_names())
    pids = cluster.pids(kind, which)
    pause = draw.uniform(0.2, 6.0)
    label = f"{verb} {kind}" + ("" if kind == "controller" else f" {which}") + (f" for {pause:.1f} s" if verb == "stop" else "")
    began = time.time()
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL if verb == "kill" else signal.SIGSTOP)
        except ProcessLookupError:
            pass
    if verb == "stop" and kind != "worker":  # somebody types `fg`; a stopped worker is the controller's to notice
        time.sleep(pause)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                pass
    try:
        first = cluster.wait_steps(began, 3, limit)
    except Failure as e:
        raise Failure(f"fault {number} ({label}): {e}") from e
    cluster.job()
    print(f"{number:4d} {label:34s} pids {pids}: next step of every rank after {first - began:.2f} s", flush=True)
    return f"{verb} {kind}", first - began


def soak(args: argparse.Namespace, work: Path) -> None:
    shm_before = set(os.listdir("/dev/shm"))
    cluster = Cluster(work, args.nodes)
    draw = random.Random(args.seed)
    times: dict[str, list[float]] = {}
    try:
        cluster.start_job(nodes=WORLD, spares=args.nodes - WORLD)
        cluster.wait_steps(0, 5, 60)
        for number in range(1, args.faults + 1):
            what, took = one_fault(cluster, draw, number, args.limit)
            times.setdefault(what, []).append(took)
            time.sleep(draw.choice([0.0, 0.1, 0.5, 1.0, 2.0]))
        cluster.job()
        cluster.stop_file.touch()
        try:
            code = cluster.run.wait(args.limit)
        except subprocess.TimeoutExpired:
            raise Failure(f"the job did not end within {args.limit:.0f} s of being asked to") from None
        if code:
            raise Failure(f"the run ended with {code}; its output is in {work}/run.log")
        shown = cluster.job() or {}
    except Failure:
        cluster.autopsy()
        raise
    finally:
        if cluster.run.poll() is None:
            cluster.run.kill()
        cluster.down()
    entries = ledger.read(cluster.ledger)
    wrong = ledger.check(entries, cluster.committed)
    left = cluster_processes(cluster.state)
    wrong += [f"process {pid} is left: {command[:120]}" for pid, command in left.items()]
    wrong += [f"file {p} is left" for p in cluster.state.rglob("*.sock")] if cluster.state.exists() else []
    # Semaphores of Python's multiprocessing are other programs': nothing here makes any.
    shm = {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}
    wrong += [f"/dev/shm/{name} is left" for name in shm - shm_before]
    redone = ledger.redone(entries)
    print(f"\n{'FAULT':20s} {'COUNT':>6s} {'MEDIAN s':>9s} {'MAX s':>7s}")
    for what, values in sorted(times.items()):
        print(f"{what:20s} {len(values):6d} {sorted(values)[len(values) // 2]:9.2f} {max(values):7.2f}")
    print(f"{len(entries)} entries, {max(e.step for e in entries) + 1} steps, {len(redone) + 1} generations that trained, "
          f"steps redone a generation: {dict(sorted(Counter(redone.values()).items()))}, state {shown.get('state')}")
    many = {g: n for g, n in redone.items() if n > 1}
    if many:  # allowed for steps that were not committed: while an agent or the controller is stopped, nothing is
        print(f"more than one step redone, none of them committed: {many}")
    if wrong:
        raise Failure("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))


def spin(args: argparse.Namespace, work: Path) -> None:
    cluster = Cluster(work, args.nodes)
    burners: list[subprocess.Popen[bytes]] = []
    try:
        cluster.start_job(nodes=WORLD, spares=args.nodes - WORLD)
        cluster.wait_steps(0, 5, 60)
        burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(8)]
        time.sleep(args.seconds)
        cluster.wait_steps(time.time() - 5, 1, 60)
        events = [json.loads(line) for line in cluster.cli("events", "-o", "jsonl").splitlines()]
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
        cluster.stop_file.touch()
        try:
            cluster.run.wait(60)
        except subprocess.TimeoutExpired:
            cluster.run.kill()
        cluster.down()
    lost = [e for e in events if e.get("type") == "node_lost"]
    suspect = [e for e in events if e.get("type") == "node_suspect"]
    print(f"8 busy processes for {args.seconds:.0f} s: {len(lost)} nodes lost, {len(suspect)} times suspect, "
          f"{max(e.step for e in ledger.read(cluster.ledger)) + 1} steps")
    if lost:
        raise Failure(f"a node was falsely lost: {lost[0].get('evidence')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a recovery may take")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    parser.add_argument("--spin", action="store_true", help="eight busy processes; no node may be lost")
    parser.add_argument("--seconds", type=float, default=60.0, help="of --spin")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    again = f"tests/run.sh soak --faults {args.faults} --seed {args.seed} --nodes {args.nodes}" if not args.spin else "tests/run.sh soak --spin"
    try:
        (spin if args.spin else soak)(args, work)
    except Failure as e:
        print(f"error: {e}\n  logs: {work}\n  again: {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not args.keep:
        shutil.rmtree(work)
    print("soak: clean")
    return 0


if __name__ == "__main__":
    sys.exit(main())
