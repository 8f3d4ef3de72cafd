"""A cluster of real processes and one job on it, for tests that break things: the soak, the kill points.

Cluster is `everstep cluster up` on loopback; PartedCluster has each node in a network namespace of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import ledger
from network import Network

ROOT = Path(__file__).resolve().parents[2]
EVERSTEP = str(Path(os.environ.get("EVERSTEP_PROGRAMS", ROOT / ".venv/bin")) / "everstep")
BIN = Path(os.environ.get("EVERSTEP_PROGRAMS", ROOT / "build/release/bin"))
SCRIPT = ROOT / "tests/integration/scripts/ledger.py"


class Failure(Exception):
    """What went wrong, for the last line of a report."""


def verdict(name: str, drill: Callable[[Path], None], again: str, *, keep: bool) -> int:
    """Runs it in a directory of its own, which stays when it fails; prints the outcome and gives the exit code."""
    work = Path(tempfile.mkdtemp(prefix=f"{name}-", dir="/tmp"))
    try:
        drill(work)
    except Failure as e:
        print(f"error: {e}\n  logs: {work}\n  again: {again}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not keep:
        shutil.rmtree(work)
    print(f"{name}: clean")
    return 0


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
    """`everstep cluster up` in a directory of its own, and one job at a time on it."""

    def __init__(self, work: Path, nodes: int, extra: dict[str, str] | None = None) -> None:
        """extra: environment of every process of the cluster and of its jobs."""
        self.work, self.state = work, work / "c"
        self.name = f"test-{os.getpid()}"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP", "TORCHELASTIC"))}
        self.env |= {"PYTHON_EXEC": sys.executable, "OMP_NUM_THREADS": "1"} | (extra or {})
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

    def start_job(self, name: str, nodes: int | str, spares: int, *flags: str, per_node: int = 1, script: Path = SCRIPT,
                  **extra: str) -> None:
        """scripts/ledger.py (or another script that writes such a ledger) on `nodes` nodes (or MIN:MAX); its ledger is work/NAME. extra: more of its environment."""
        self.job_name, self.world = name, int(str(nodes).rpartition(":")[2]) * per_node
        self.ledger, self.stop_file = self.work / name, self.work / f"{name}.stop"
        self.ledger.mkdir()
        self.committed: list[tuple[float, int]] = []
        env = self.env | {"LEDGER": str(self.ledger), "STOP_FILE": str(self.stop_file)} | extra
        command = [EVERSTEP, "run", "--name", name, "--nnodes", str(nodes), "--spares", str(spares), "--nproc-per-node",
                   str(per_node), "--max-restarts", "1000000", *flags, str(script)]
        with open(self.work / f"{name}.log", "w") as output:
            self.run = subprocess.Popen(self.inside(*command), stdout=output, stderr=subprocess.STDOUT, env=env, stdin=subprocess.DEVNULL)

    def end_job(self, limit: float) -> dict:
        """Asks the job to end, and how `job show` tells of it then."""
        self.stop_file.touch()
        try:
            code = self.run.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failure(f"the job did not end within {limit:.0f} s of being asked to") from None
        if code:
            raise Failure(f"the run ended with {code}; its output is in {self.work}/{self.job_name}.log")
        return self.job() or {}

    def job(self) -> dict | None:
        """`job show`, or nothing while the controller is away."""
        text = self.cli("job", "show", self.job_name, "-o", "json", check=False)
        try:
            shown = json.loads(text)
        except json.JSONDecodeError:
            return None
        self.committed.append((time.time(), int(shown.get("committed_step", -1))))
        return shown

    def wait_steps(self, after: float, count: int, limit: float) -> None:
        """Until every rank of the newest generation has made `count` steps that ended after `after`."""
        deadline = time.time() + limit
        while time.time() < deadline:
            if self.run.poll() is not None:
                raise Failure(f"the run ended with {self.run.returncode}; its output is in {self.work}/{self.job_name}.log")
            fresh = [e for e in ledger.read(self.ledger, after) if e.at > after]
            newest = max((e.generation for e in fresh), default=0)
            mine = [e for e in fresh if e.generation == newest]
            counts = Counter(e.rank for e in mine)
            if mine and len(counts) == mine[0].world and min(counts.values()) >= count:
                return
            time.sleep(0.05)
        raise Failure(f"no {count} steps of every rank within {limit:.0f} s")

    def longest_gap(self, since: float, same: bool = False) -> float:
        """Seconds from one rank's step to its next, at most, from the last ones before `since` on. same: of processes
        that still make steps, whatever their ranks."""
        entries = ledger.read(self.ledger, since - 10)
        newest = max((e.generation for e in entries), default=0)
        whose = [[e.at for e in entries if e.pid == pid] for pid in {e.pid for e in entries if e.generation == newest}] if same else \
            [[e.at for e in entries if e.rank == rank] for rank in range(self.world)]
        worst = 0.0
        for times in whose:
            times = times[max(0, sum(at <= since for at in times) - 1):]
            worst = max([worst, *(b - a for a, b in itertools.pairwise(times))])
        return worst

    def hosts(self) -> list[str]:
        """The node of each rank, by the controller's account."""
        ranks = {int(r["rank"]): r["node"] for r in (self.job() or {}).get("ranks", [])}
        if missing := [r for r in range(self.world) if r not in ranks]:
            raise Failure(f"rank {missing[0]} of {self.job_name} runs nowhere")
        return [ranks[r] for r in range(self.world)]

    def node_names(self) -> list[str]:
        return sorted(p.name for p in (self.state / "nodes").iterdir() if (p / "agent.pid").exists())

    def pids(self, kind: str, which: str) -> list[int]:
        """The pids of one victim: kind is agent, keeper, node, controller or worker (which: a rank)."""
        if kind == "controller":
            files = [self.state / "controller/pid"]
        elif kind == "worker":
            newest = ledger.read(self.ledger, time.time() - 10)
            generation = max((e.generation for e in newest), default=0)  # in an earlier one it may have been another rank
            return [e.pid for e in newest if e.generation == generation and e.rank == int(which)][-1:]
        else:
            node = self.state / "nodes" / which
            files = [node / "agent.pid"] if kind == "agent" else [node / "keeper.pid"] if kind == "keeper" else [node / "agent.pid", node / "keeper.pid"]
        return [pid for pid in map(pid_of, files) if pid]

    def autopsy(self) -> None:
        """Writes down where everything stands that still lives, before it is taken down: work/autopsy.txt."""
        processes = cluster_processes(self.state)
        parts = [f"{time.time():.3f} of the wall clock\n", self.cli("job", "show", self.job_name, check=False),
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
        """Takes the cluster down; its logs stay in the work directory."""
        for file in self.state.rglob("*.log"):
            kept = self.work / "logs" / file.relative_to(self.state)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, kept)
        self.end()

    def end(self) -> None:
        self.cli("cluster", "down", self.name, check=False)


class PartedCluster(Cluster):
    """Each node in a network namespace of its own. Whoever dies is started again, as `cluster up` does it."""

    def __init__(self, work: Path, nodes: int, network: Network, extra: dict[str, str] | None = None) -> None:
        self.network = network
        self.ending = threading.Event()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        super().__init__(work, nodes, extra)

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


def shared_memory() -> set[str]:
    """What lies in /dev/shm but other programs' things: semaphores of Python's multiprocessing, work folders of tests."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("sem.mp-", "es"))}


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
