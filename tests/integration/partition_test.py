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

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "build/release/bin"
VENV = ROOT / ".venv/bin"
NODES = 3


def sh(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Network:
    """One namespace a node and one for the controller, on a bridge in the controller's: 10.99.0.(1 + n)."""

    def __init__(self) -> None:
        tag = f"es{os.getpid() % 100000}"
        self.hub = f"{tag}c"
        self.names = [f"{tag}n{i}" for i in range(NODES)]

    def make(self) -> None:
        sh("ip", "netns", "add", self.hub)
        inside = ("ip", "netns", "exec", self.hub, "ip")
        sh(*inside, "link", "set", "lo", "up")
        sh(*inside, "link", "add", "br0", "type", "bridge")
        sh(*inside, "addr", "add", "10.99.0.1/24", "dev", "br0")
        sh(*inside, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            sh("ip", "netns", "add", name)
            sh("ip", "link", "add", f"v{i}", "netns", self.hub, "type", "veth", "peer", "name", "eth0", "netns", name)
            sh(*inside, "link", "set", f"v{i}", "master", "br0", "up")
            node = ("ip", "netns", "exec", name, "ip")
            sh(*node, "link", "set", "lo", "up")
            sh(*node, "addr", "add", f"10.99.0.{10 + i}/24", "dev", "eth0")
            sh(*node, "link", "set", "eth0", "up")

    def cut(self, node: int, down: bool) -> None:
        sh("ip", "netns", "exec", self.hub, "ip", "link", "set", f"v{node}", "down" if down else "up")

    def remove(self) -> None:
        for name in [self.hub, *self.names]:
            sh("ip", "netns", "del", name, check=False)

    def run(self, namespace: str, *command: str, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            return subprocess.Popen(["ip", "netns", "exec", namespace, *command], env=env, stdout=out, stderr=out,
                                    stdin=subprocess.DEVNULL, start_new_session=True)


@pytest.fixture
def network() -> Iterator[Network]:
    net = Network()
    try:
        net.make()
    except (AssertionError, FileNotFoundError) as e:
        net.remove()
        pytest.skip(f"no network namespaces here: {e}")
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
                                              "--state-dir", str(work / "s"), "--address", f"10.99.0.{10 + i}", env=self.env,
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
        starts = {e.generation: min(x.at for x in entries if x.generation == e.generation) for e in entries}
        ends = {e.generation: max(x.at for x in entries if x.generation == e.generation) for e in entries}
        generations = sorted(starts)
        assert all(ends[a] <= starts[b] for a, b in itertools.pairwise(generations)), "two generations trained at once"
        assert {e["reason"] for e in cluster.events() if e["type"] == "node_lost"} == {"node_lost"}
    finally:
        if job is not None and job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait(10)
        cluster.down()
