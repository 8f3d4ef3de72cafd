"""A soak: N random real faults on a running job, then proof that nothing was lost and nothing is left.

    tests/run.sh soak [--faults 200] [--seed S] [--nodes 4] [--no-partitions] [--keep] [--spin]

A cluster of separate processes trains scripts/ledger.py on two nodes with spares. Faults are drawn from a seed:
SIGKILL or SIGSTOP of a worker, an agent, a keeper, a whole node, the controller. Where network namespaces are allowed
(root, `ip netns`), each node lives in one of its own, and a node may also be cut off from all the others, for longer or
shorter than its lease; else the cluster is on loopback, and that is said. After each fault the job must make new steps
on every rank within --limit seconds; stopped processes go on, and cuts heal, after a drawn time (a stopped worker
is left to the controller). At the end the ledger of steps has no gap, one state a step, no committed step redone,
and no process, socket, memfd, file or namespace of the cluster is left.

--spin instead: eight busy processes for a minute on this machine; no node may be taken for lost.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import ledger
from network import Network, NotAllowed

ROOT = Path(__file__).resolve().parents[2]
EVERSTEP = str(Path(os.environ.get("EVERSTEP_PROGRAMS", ROOT / ".venv/bin")) / "everstep")
BIN = Path(os.environ.get("EVERSTEP_PROGRAMS", ROOT / "build/release/bin"))
WORLD = 2
START_LIMIT = 240.0  # seconds: four nodes import torch at once, and other programs may want the processors, too


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
        self.env |= {"PYTHON_EXEC": sys.executable, "OMP_NUM_THREADS": "1", "LEDGER": str(self.ledger), "STOP_FILE": str(self.stop_file)}
        self.committed: list[tuple[float, int]] = []
        self.up(nodes)

    def up(self, nodes: int) -> None:
        self.cli("cluster", "up", "--nodes", str(nodes), "--name", self.name, "--state-dir", str(self.state))
        listing = json.loads(self.cli("cluster", "list", "-o", "json"))
        self.env["EVERSTEP_CONTROLLER"] = next(c for c in listing["items"] if c["name"] == self.name)["controller"]

    def inside(self, *command: str) -> list[str]:
        """The command line that runs `command` where the controller can be reached."""
        return list(command)

    def cli(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(self.inside(EVERSTEP, *args), check=False, capture_output=True, text=True, timeout=60, env=self.env)
        if check and done.returncode:
            raise Failure(f"everstep {' '.join(args)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def start_job(self, nodes: int, spares: int) -> None:
        command = [EVERSTEP, "run", "--name", "soak", "--nnodes", str(nodes), "--spares", str(spares), "--nproc-per-node",
                   str(WORLD // nodes), "--max-restarts", "1000000", str(ROOT / "tests/integration/scripts/ledger.py")]
        with open(self.work / "run.log", "w") as output:
            self.run = subprocess.Popen(self.inside(*command), stdout=output, stderr=subprocess.STDOUT, env=self.env, stdin=subprocess.DEVNULL)

    def job(self) -> dict | None:
        """`job show`, or nothing while the controller is away."""
        text = self.cli("job", "show", "soak", "-o", "json", check=False)
        try:
            shown = json.loads(text)
        except json.JSONDecodeError:
            return None
        self.committed.append((time.time(), int(shown.get("committed_step", -1))))
        return shown

    def wait_steps(self, after: float, count: int, limit: float) -> None:
        """Until every rank has made `count` steps that ended after `after`."""
        deadline = time.time() + limit
        while time.time() < deadline:
            if self.run.poll() is not None:
                raise Failure(f"the run ended with {self.run.returncode}; its output is in {self.work}/run.log")
            fresh = [e for e in ledger.read(self.ledger, after) if e.at > after]
            counts = Counter(e.rank for e in fresh)
            if len(counts) == WORLD and min(counts.values()) >= count:
                return
            time.sleep(0.05)
        raise Failure(f"no {count} steps of every rank within {limit:.0f} s")

    def longest_gap(self, since: float) -> float:
        """Seconds from one rank's step to its next, at most, from the last ones before `since` on."""
        entries = ledger.read(self.ledger, since - 10)
        worst = 0.0
        for rank in range(WORLD):
            times = [e.at for e in entries if e.rank == rank]
            times = times[max(0, sum(at <= since for at in times) - 1):]
            worst = max([worst, *(b - a for a, b in itertools.pairwise(times))])
        return worst

    def node_names(self) -> list[str]:
        return sorted(p.name for p in (self.state / "nodes").iterdir() if (p / "agent.pid").exists())

    def pids(self, kind: str, which: str) -> list[int]:
        """The pids of one victim: kind is agent, keeper, node, controller or worker (which: a rank)."""
        if kind == "controller":
            files = [self.state / "controller/pid"]
        elif kind == "worker":
            newest = [e for e in ledger.read(self.ledger, time.time() - 10) if e.rank == int(which)]
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
        self.end()

    def end(self) -> None:
        self.cli("cluster", "down", self.name, check=False)


class PartedCluster(Cluster):
    """Each node in a network namespace of its own. Whoever dies is started again, as `cluster up` does it."""

    def __init__(self, work: Path, nodes: int, network: Network) -> None:
        self.network = network
        self.ending = threading.Event()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        super().__init__(work, nodes)

    def up(self, nodes: int) -> None:
        self.env |= {"EVERSTEP_CONTROLLER": f"{self.network.HUB_ADDRESS}:7600", "GLOO_SOCKET_IFNAME": "eth0",
                     "VIRTUAL_ENV": str(ROOT / ".venv")}
        (self.state / "nodes").mkdir(parents=True)
        (self.state / "controller").mkdir()
        for name in ["controller", *(f"n{i}" for i in range(nodes))]:
            self.start(name)
        self.keeping = threading.Thread(target=self.keep_up, daemon=True)
        self.keeping.start()
        deadline = time.time() + 30
        while len(self.node_names()) < nodes or self.cli("node", "list", check=False).count("ALIVE") < nodes:
            if time.time() > deadline:
                raise Failure(f"the cluster did not come up within 30 s; its logs are in {self.state}")
            time.sleep(0.1)

    def start(self, name: str) -> None:
        if name == "controller":
            where, log = self.network.hub, self.state / "controller/controller.log"
            command = [str(BIN / "everstep-controller"), "--listen", self.env["EVERSTEP_CONTROLLER"],
                       "--state-dir", str(self.state / "controller"), "--cluster", self.name]
        else:
            node = int(name[1:])
            where, log = self.network.names[node], self.state / f"{name}.log"
            command = [str(BIN / "everstep-agent"), "--controller", self.env["EVERSTEP_CONTROLLER"], "--node", name,
                       "--state-dir", str(self.state), "--address", self.network.address(node)]
        self.running[name] = self.network.run(where, *command, env=self.env, log=log)

    def keep_up(self) -> None:
        while not self.ending.wait(0.05):
            for name, process in list(self.running.items()):
                if process.poll() is not None and not self.ending.is_set():
                    self.start(name)

    def inside(self, *command: str) -> list[str]:
        return self.network.inside(self.network.hub, *command)

    def pids(self, kind: str, which: str) -> list[int]:
        if kind == "controller":
            return [self.running["controller"].pid] if self.running["controller"].poll() is None else []
        return super().pids(kind, which)

    def end(self) -> None:
        self.ending.set()
        self.keeping.join()
        for name in sorted(self.running, key="controller".__eq__):  # the controller last
            if self.running[name].poll() is None:
                self.running[name].terminate()
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()  # what it leaves behind the verdict finds
                process.wait()


FAULTS = [("kill", "worker", 5), ("stop", "worker", 2), ("kill", "agent", 3), ("stop", "agent", 2), ("kill", "keeper", 2),
          ("kill", "node", 4), ("stop", "node", 1), ("kill", "controller", 3), ("stop", "controller", 2),
          ("stop", "worker unheard", 1)]  # with the controller killed: nobody is there to hear of it
CUTS = [("cut", "node", 5)]


def one_fault(cluster: Cluster, draw: random.Random, number: int, limit: float) -> tuple[str, float]:
    faults = FAULTS + (CUTS if isinstance(cluster, PartedCluster) else [])
    verb, kind, _ = draw.choices(faults, weights=[f[2] for f in faults])[0]
    which = str(draw.randrange(WORLD)) if kind.startswith("worker") else draw.choice(cluster.node_names())
    pids = cluster.pids(kind.partition(" ")[0], which)
    pause = draw.uniform(0.2, 6.0)
    label = f"{verb} {kind}" + ("" if kind == "controller" else f" {which}") + (f" for {pause:.1f} s" if verb != "kill" else "")
    began = time.time()
    if verb == "cut":
        assert isinstance(cluster, PartedCluster)
        cluster.network.cut(int(which[1:]), down=True)
        time.sleep(pause)
        cluster.network.cut(int(which[1:]), down=False)
        pids = []
    if kind == "worker unheard":
        send(cluster.pids("controller", ""), signal.SIGKILL)
    send(pids, signal.SIGKILL if verb == "kill" else signal.SIGSTOP)
    if verb == "stop" and not kind.startswith("worker"):  # somebody types `fg`; a stopped worker is the controller's to notice
        time.sleep(pause)
        send(pids, signal.SIGCONT)
    try:
        cluster.wait_steps(time.time(), 3, limit)
    except Failure as e:
        raise Failure(f"fault {number} ({label}): {e}") from e
    stood = cluster.longest_gap(began)
    cluster.job()
    print(f"{number:4d} {label:34s} pids {pids}: stood still for {stood:.2f} s", flush=True)
    return f"{verb} {kind}", stood


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def soak(args: argparse.Namespace, work: Path) -> None:
    shm_before = set(os.listdir("/dev/shm"))
    network = Network(args.nodes)
    parted = args.partitions
    if parted:
        try:
            network.make()
        except NotAllowed as e:
            print(f"without partitions: {e}", flush=True)
            parted = False
    try:
        cluster = PartedCluster(work, args.nodes, network) if parted else Cluster(work, args.nodes)
        run_soak(args, work, cluster, shm_before)
    finally:
        network.remove()
    if network.left():
        raise Failure(f"namespaces are left: {' '.join(network.left())}")


def run_soak(args: argparse.Namespace, work: Path, cluster: Cluster, shm_before: set[str]) -> None:
    draw = random.Random(args.seed)
    times: dict[str, list[float]] = {}
    try:
        cluster.start_job(nodes=WORLD, spares=args.nodes - WORLD)
        cluster.wait_steps(0, 5, START_LIMIT)
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
        cluster.wait_steps(0, 5, START_LIMIT)
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
    parser.add_argument("--partitions", action=argparse.BooleanOptionalAction, default=True,
                        help="nodes in network namespaces, cut off now and then (needs root; said when it cannot be)")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    parser.add_argument("--spin", action="store_true", help="eight busy processes; no node may be lost")
    parser.add_argument("--seconds", type=float, default=60.0, help="of --spin")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    again = f"tests/run.sh soak --faults {args.faults} --seed {args.seed} --nodes {args.nodes}{'' if args.partitions else ' --no-partitions'}" if not args.spin else "tests/run.sh soak --spin"
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
