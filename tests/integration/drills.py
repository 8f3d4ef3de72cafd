"""A cluster of real processes on loopback for drills: a controller, agents by name and zone, one job whose ranks hold
states of their own (scripts/sharded.py).

Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(os.environ.get("EVERSTEP_BUILD", ROOT / "build/release")) / "bin"
SHARD = 8 << 20  # of a rank's state; a slot has a table beside it


class Cluster:
    def __init__(self, work: Path, zones: dict[str, str], ranks: int = 4, agent_args: tuple[str, ...] = ()) -> None:
        self.zones, self.ranks, self.agent_args = zones, ranks, agent_args
        self.work, self.ledger, self.hold = work, work / "ledger", work / "hold"
        self.ledger.mkdir()
        self.tell(step=4, generation=1000)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP", "TORCHELASTIC"))}
        self.env = clean | {"LEDGER": str(self.ledger), "HOLD": str(self.hold), "OMP_NUM_THREADS": "1",
                            "VIRTUAL_ENV": str(ROOT / ".venv"), "PYTHONPATH": str(ROOT / "worker/python"),
                            "EVERSTEP_LIBRARY": str(BIN.parent / "lib/libeverstep.so")}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.start("controller", "everstep-controller", "--listen", "127.0.0.1:0", "--state-dir", str(work / "c"),
                   "--address-file", str(work / "address"))
        self.wait("the controller", (work / "address").exists, 30)
        self.controller = (work / "address").read_text().split()[0]
        for node in zones:
            self.join(node)

    def start(self, name: str, program: str, *args: str) -> subprocess.Popen[bytes]:
        with (self.work / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([str(BIN / program), *args], env=self.env, stdout=log, stderr=log,
                                       stdin=subprocess.DEVNULL, start_new_session=True)
        self.processes.append(process)
        return process

    def join(self, node: str) -> None:
        self.start(node, "everstep-agent", "--controller", self.controller, "--node", node, "--state-dir", str(self.work / "s"),
                   "--label", f"zone={self.zones[node]}", "--label", f"host={node}", *self.agent_args)

    def kill(self, *nodes: str) -> None:
        """Each node's agent and keeper, as one event: a node is lost once its keeper is; its workers go with that."""
        for pid in [int((self.work / "s/nodes" / node / part).read_text().split()[0])
                    for part in ("agent.pid", "keeper.pid") for node in nodes]:
            os.kill(pid, signal.SIGKILL)

    def tell(self, step: int, generation: int) -> None:
        new = self.hold.with_suffix(".new")
        new.write_text(json.dumps({"step": step, "generation": generation}))
        new.rename(self.hold)

    def run(self, *args: str, code: int = 0) -> str:
        done = subprocess.run([str(BIN / "everstep"), *args, "--controller", self.controller], check=False,
                              capture_output=True, text=True, timeout=60, env=self.env)
        assert done.returncode == code, f"{args}: exit {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def cli(self, *args: str, code: int = 0) -> dict[str, Any]:
        return json.loads(self.run(*args, "-o", "json", code=code))

    def job(self) -> dict[str, Any]:
        return self.cli("job", "show", "drill")

    def nodes(self) -> dict[str, str]:
        return {n["node"]: n["state"] for n in self.cli("node", "list")["items"]}

    def restores(self) -> list[dict[str, str]]:
        """What the controller did, by its own account: the evidence of each restore event."""
        lines = self.run("events", "--type", "restore", "--job", "drill", "-o", "jsonl").splitlines()
        return [dict(word.split("=") for word in json.loads(line)["evidence"].split()) for line in lines]

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 90) -> None:
        deadline = time.time() + seconds
        while not condition():
            if time.time() > deadline:
                logs = "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in sorted(self.work.glob("*.log")))
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{logs}")
            time.sleep(0.05)

    def settled(self, step: int) -> None:
        """Everything up to `step` is committed, the job runs, and a spare is warm where there is one."""
        self.wait(f"step {step} committed", lambda: int(self.job()["committed_step"]) == step and self.job()["state"] == "RUNNING")

    def began(self, generation: int) -> list[dict[str, int]]:
        files = [self.ledger / f"{generation}-{rank}.json" for rank in range(self.ranks)]
        self.wait(f"the ranks of generation {generation}", lambda: all(f.exists() for f in files))
        return [json.loads(f.read_text()) for f in files]

    def submit(self, *args: str) -> None:
        self.start("run", "everstep", "run", "--controller", self.controller, "--name", "drill", "--nproc-per-node", "1", *args,
                   str(ROOT / "tests/integration/scripts/sharded.py"))
        self.wait("the job", lambda: any(j["job"] == "drill" for j in self.cli("job", "list")["items"]))

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of a type, each with its evidence as a dict beside it."""
        found = [json.loads(line) for line in self.run("events", "--type", kind, "-o", "jsonl").splitlines()]
        for event in found:
            event["facts"] = dict(w.split("=", 1) for w in event["evidence"].split() if "=" in w)
        return found

    def down(self) -> None:
        # The run first, while there is a controller that cancels its job: without one it waits for half a minute.
        for process in [p for p in self.processes if "run" in list(p.args)[1:2]]:  # type: ignore[call-overload]
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
