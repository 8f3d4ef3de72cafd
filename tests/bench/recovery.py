"""SIGKILL to first new step: the same unmodified script under everstep and torchrun, interleaved.

Cases
  worker_sigkill           one node, two ranks, rank 1 is killed
  node_sigkill             two nodes of one rank, --nnodes 1:2; the node without the rendezvous dies whole
  rendezvous_host_sigkill  the same; the node that hosts the rendezvous dies
  spare_sigkill            everstep only: --nnodes 2 --spares 1, one of three nodes dies (torchrun has no spares)

Metrics, seconds after the kill: detect (the launcher says so), spawn (the new generation's last process is born),
imports, process_group, first_step (each: the slowest rank of the new generation). "never": not within --limit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import BIN, ROOT, Results, free_port

SCRIPT = ROOT / "tests/bench/scripts/ddp.py"
DETECTED = re.compile(r"failed \(exitcode|Sending process|RendezvousConnectionError|worker_killed|node_died|node_lost|worker_exited")


def children(pid: int) -> list[int]:
    """Every live descendant of `pid`."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                ppid = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            parents.setdefault(ppid, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


class Node:
    """One launcher process and whatever it brought."""

    def __init__(self, system: str, args: list[str], work: Path, index: int, script: Path = SCRIPT,
                 env_more: dict[str, str] | None = None) -> None:
        self.system, self.state = system, work / f"s{index}"
        self.said: list[tuple[float, str]] = []
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP", "TORCHELASTIC"))}
        env |= {"MARKS": str(work / "marks"), "OMP_NUM_THREADS": "1"} | (env_more or {})
        command = [str(BIN / "torchrun")] if system == "torchrun" else [str(BIN / "everstep"), "run", "--state-dir", str(self.state)]
        self.process = subprocess.Popen([*command, *args, str(script)], env=env, stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append((time.time(), line))

    def pids(self) -> list[int]:
        pids = [self.process.pid, *children(self.process.pid)]
        for name in ("nodes/*/agent.pid", "nodes/*/keeper.pid", "controller/pid"):
            for file in self.state.glob(name):
                pid = int(file.read_text().split()[0])
                pids += [pid, *children(pid)]
        return [p for p in dict.fromkeys(pids) if Path(f"/proc/{p}").exists()]

    def kill(self) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
        self.process.wait(10)


def marks(work: Path) -> list[dict]:
    found = []
    for file in (work / "marks").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                pass  # the line under way when its writer was killed
    return found


def wait_for(condition, seconds: float) -> bool:
    deadline = time.time() + seconds
    while time.time() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def run(case: str, system: str, limit: float, verbose: bool) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory(prefix="esb-", dir="/tmp") as folder:
        work = Path(folder)
        (work / "marks").mkdir()
        port = free_port()
        common = ["--max-restarts", "10"]
        if system == "torchrun":
            common += ["--monitor-interval", "0.1"]
        if case == "worker_sigkill":
            layouts = [["--standalone", "--nproc-per-node", "2"]]
        else:
            nnodes = "2" if case == "spare_sigkill" else "1:2"
            args = ["--nnodes", nnodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", f"bench{port}"]
            layouts = [args + (["--spares", "1"] if case == "spare_sigkill" else [])] * (3 if case == "spare_sigkill" else 2)
        nodes: list[Node] = []
        try:
            for i, args in enumerate(layouts):
                nodes.append(Node(system, common + args, work, i))
                if i + 1 < len(layouts):  # the first one owns the endpoint
                    wait_for(lambda: any(s.connect_ex(("127.0.0.1", port)) == 0 for s in [socket.socket()]), 30)
            ready = lambda: {m["rank"] for m in marks(work) if m["mark"] == "step" and m["step"] >= 20} == {0, 1}
            if not wait_for(ready, 120):
                output = "".join(line for n in nodes for _, line in n.said)
                raise SystemExit(f"error: {system} {case}: no 20 steps within 120 s\n{output}")
            old = {m["pid"]: m["rank"] for m in marks(work)}
            if case == "worker_sigkill":
                victim = nodes[0]
                pid = next(p for p, r in old.items() if r == 1)
                killed = time.time()
                os.kill(pid, signal.SIGKILL)
            else:
                if case == "rendezvous_host_sigkill":
                    victim = nodes[0]
                else:  # a node that trains and is not the host
                    active = [n for n in nodes[1:] if set(n.pids()) & set(old)]
                    victim = active[0]
                killed = time.time()
                victim.kill()
            survivors = [n for n in nodes if n is not victim] or nodes

            def fresh(name: str) -> list[dict]:
                return [m for m in marks(work) if m["mark"] == name and m["pid"] not in old and m["at"] > killed]

            want = 2 if case in ("worker_sigkill", "spare_sigkill") else 1
            done = wait_for(lambda: len({m["rank"] for m in fresh("step")}) >= want, limit)
            out: dict[str, float | None] = {}
            heard = [t for n in survivors for t, line in list(n.said) if t > killed and DETECTED.search(line)]
            out["detect"] = min(heard) - killed if heard else None
            for metric, name in (("spawn", "born"), ("imports", "imports"), ("process_group", "group"), ("first_step", "step")):
                first: dict[int, float] = {}
                for m in fresh(name):
                    first[m["rank"]] = min(m["at"], first.get(m["rank"], m["at"]))
                out[metric] = max(first.values()) - killed if done and len(first) >= want else None
            if verbose or not done:
                for n in nodes:
                    print("".join(f"    {t - killed:7.3f} {line}" for t, line in n.said[-30:]), file=sys.stderr)
            return out
        finally:
            for n in nodes:
                n.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", default="worker_sigkill,node_sigkill,rendezvous_host_sigkill,spare_sigkill")
    parser.add_argument("--systems", default="everstep,torchrun")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which a run counts as never recovered")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    results = Results("recovery")
    for case in args.cases.split(","):
        for i in range(args.runs):
            for system in args.systems.split(","):
                if system == "torchrun" and case == "spare_sigkill":
                    continue
                out = run(case, system, args.limit, args.verbose)
                print(f"{case} {system} {i + 1}/{args.runs}: " + "  ".join(f"{k} {'never' if v is None else f'{v:.3f}'}" for k, v in out.items()), flush=True)
                for metric, value in out.items():
                    results.add(case, system, metric, "s", value)
    results.print()
    results.write(args.json)


if __name__ == "__main__":
    main()
