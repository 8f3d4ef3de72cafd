"""A node that is cut off, not dead: network namespaces of this test's own, joined by a bridge that it can cut.

The node's processes all live on behind the cut. The controller must take it for lost by its lease, go on with the
spare, and when the cut heals fence what the old registration left: one generation trains, never two.
Needs root and the right to make namespaces; skipped with a message where that is not allowed.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import ledger
import pytest
from network import Network, NotAllowed, sh

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "build/release/bin"
VENV = ROOT / ".venv/bin"
NODES = 3


@pytest.fixture
def network() -> Iterator[Network]:
    net = Network(NODES)
    try:
        net.make()
    except NotAllowed as e:
        pytest.skip(str(e))
    yield net
    net.remove()


class Cluster:
    def __init__(self, network: Network, work: Path) -> None:
        self.network, self.work, self.ledger = network, work, work / "ledger"
        self.ledger.mkdir()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP", "TORCHELASTIC"))}
        self.env = clean | {"LEDGER": str(self.ledger), "STOP_FILE": str(work / "stop"), "OMP_NUM_THREADS": "1",
                            "GLOO_SOCKET_IFNAME": "eth0", "VIRTUAL_ENV": str(ROOT / ".venv")}
        self.controller = "10.99.0.1:7600"
        self.processes = [network.run(network.hub, str(BIN / "everstep-controller"), "--listen", self.controller, "--state-dir",
                                      str(work / "c"), "--address-file", str(work / "address"), env=self.env, log=work / "controller.log")]
        deadline = time.time() + 20
        while not (work / "address").exists():
            assert time.time() < deadline, (work / "controller.log").read_text()
            time.sleep(0.02)
        for i, name in enumerate(network.names):
            self.processes.append(network.run(name, str(BIN / "everstep-agent"), "--controller", self.controller, "--node", f"n{i}",
                                              "--state-dir", str(work / "s"), "--address", network.address(i), env=self.env,
                                              log=work / f"n{i}.log"))

    def cli(self, *args: str, check: bool = True) -> str:
        return sh("ip", "netns", "exec", self.network.hub, str(BIN / "everstep"), *args, "--controller", self.controller, check=check)

    def job(self) -> dict:
        return json.loads(self.cli("job", "show", "cut", "-o", "json"))

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.cli("events", "-o", "jsonl").splitlines()]

    def wait(self, what: str, condition, seconds: float = 60) -> None:
        deadline = time.time() + seconds
        while not condition():
            assert time.time() < deadline, f"not within {seconds:.0f} s: {what}\n{self.cli('events', check=False)[-3000:]}"
            time.sleep(0.05)

    def fresh(self, after: float) -> bool:
        ranks = {e.rank for e in ledger.read(self.ledger) if e.at > after}
        return ranks == {0, 1}

    def down(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def test_a_cut_off_node_is_replaced_and_fenced(network: Network, tmp_path: Path) -> None:
    cluster = Cluster(network, tmp_path)
    job = None
    try:
        cluster.wait("three nodes", lambda: sum(n["state"] == "ALIVE" for n in json.loads(cluster.cli("node", "list", "-o", "json"))["items"]) == NODES)
        job = network.run(network.hub, str(BIN / "everstep"), "run", "--controller", cluster.controller, "--name", "cut", "--nnodes", "2",
                          "--spares", "1", "--nproc-per-node", "1", str(ROOT / "tests/integration/scripts/ledger.py"),
                          env=cluster.env, log=tmp_path / "run.log")
        cluster.wait("first steps", lambda: cluster.fresh(0), 90)
        cluster.wait("a warm spare", lambda: cluster.job()["spares"] == 1)
        before = cluster.job()
        victim = before["members"][1]
        cut = time.time()
        network.cut(int(victim[1:]), down=True)
        cluster.wait("steps on the spare", lambda: cluster.job()["generation"] > before["generation"] and cluster.fresh(cut + 1), 60)
        shown = cluster.job()
        assert victim not in shown["members"]
        assert shown["faults"][0]["reason"] == "node_lost"
        assert not [e for e in ledger.read(cluster.ledger) if e.generation == before["generation"] and e.at > cut + 20]
        healed = time.time()
        network.cut(int(victim[1:]), down=False)
        cluster.wait("the node back", lambda: next(n for n in json.loads(cluster.cli("node", "list", "-o", "json"))["items"]
                                                  if n["node"] == victim)["state"] == "ALIVE")
        cluster.wait("steps after the cut has healed", lambda: cluster.fresh(healed + 2))
        assert cluster.job()["generation"] == shown["generation"], "a healed cut is no reason to restart anything"
        (tmp_path / "stop").touch()
        assert job.wait(60) == 0, (tmp_path / "run.log").read_text()
        entries = ledger.read(cluster.ledger)
        assert ledger.check(entries, []) == []
        by_generation = {g: [e for e in entries if e.generation == g] for g in sorted({e.generation for e in entries})}
        for old, new in itertools.pairwise(by_generation.values()):
            # Behind the cut a worker may come to the end of the step that its peer had finished, and write it down; no further.
            late = [e for e in old if e.at > new[0].at and e.step >= min(x.step for x in new)]
            assert not late, f"two generations trained at once: {late}"
        assert {e["reason"] for e in cluster.events() if e["type"] == "node_lost"} == {"node_lost"}
    finally:
        if job is not None and job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait(10)
        cluster.down()
