"""Jobs that are kept by parities: what `everstep ckpt survive` foretells is what happens when those nodes are killed.

Real processes on loopback, ranks with states of their own. No node holds a copy of another's state: what a killed
node had comes back out of parities and of what its group has left, to the last bit, or it is said what is gone.
Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drills import BIN, ROOT, SHARD, Cluster

NODES = {f"n{i}": f"z{i}" for i in range(5)}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, NODES)
    try:
        cluster.wait("five nodes", lambda: list(cluster.nodes().values()).count("ALIVE") == 5)
        yield cluster
    finally:
        cluster.down()


def begin(cluster: Cluster, *flags: str) -> None:
    cluster.submit("--nnodes", "4", "--spares", "1", *flags)
    cluster.settled(4)
    cluster.wait("a warm spare", lambda: cluster.job()["spares"] == 1)


def lose(cluster: Cluster, step: int, *nodes: str, code: int = 0) -> dict[str, Any]:
    """Asks what would be, kills them; the next generation may go on five steps."""
    told = cluster.cli("ckpt", "survive", "drill", "--lose", ",".join(nodes), code=code)
    cluster.tell(step=step, generation=int(cluster.job()["generation"]))
    cluster.kill(*nodes)
    return told


def went_on(cluster: Cluster, after: int, from_step: int) -> None:
    """A later generation runs, and every rank found exactly the state after `from_step`."""
    cluster.wait("the job running", lambda: cluster.job()["state"] == "RUNNING" and int(cluster.job()["generation"]) > after)
    for found in cluster.began(int(cluster.job()["generation"])):
        assert found == {"step": from_step + 1, "made": from_step + 1, "wrong": 0}


def tiers(told: dict[str, Any]) -> list[str]:
    return sorted(s["tier"] for s in told["sources"])


def whole(cluster: Cluster) -> bool:
    shown = cluster.cli("ckpt", "show", "drill")
    return int(shown["parities"]) == int(shown["parities_wanted"]) > 0


def test_any_two_nodes_of_four_may_go(cluster: Cluster) -> None:
    begin(cluster, "--redundancy", "rs(2+2)")
    placement = cluster.cli("ckpt", "placement", "drill")
    assert placement["redundancy"] == "rs(2+2)"
    assert placement["copies"] == 1
    assert (placement["parities"], placement["parities_wanted"]) == (8, 8)
    assert [s["probability"] for s in placement["by_nodes"]] == [1, 1, 0, 0]
    assert [p["policy"] for p in placement["policies"] if p["in_force"]] == ["rs(2+2)"]
    # A node holds its own state and two parities of half a state (of five of its nine chunks), each in one slot or two.
    assert 2 * SHARD <= max(int(n["bytes"]) for n in placement["nodes"]) < 4.6 * SHARD
    shown = cluster.cli("ckpt", "show", "drill")
    assert [len(r["nodes"]) for r in shown["ranks"]] == [1, 1, 1, 1], "no state lies on two nodes"
    assert whole(cluster)
    assert "rs(2+2)" in cluster.run("ckpt", "show", "drill")

    # 1. One node, with a spare.
    generation, victim = int(cluster.job()["generation"]), cluster.job()["members"][1]
    told = lose(cluster, 4, victim)
    assert told["recoverable"]
    assert int(told["step"]) == 4
    assert tiers(told) == ["local", "local", "local", "parity"]
    assert int(told["bytes_to_move"]) >= 2 * SHARD, "two states are read for each that is made"
    went_on(cluster, generation, 4)
    assert cluster.job()["members"] == told["members"]
    (made,) = cluster.events("rebuild")
    assert made["facts"]["ranks"] == "1"
    cluster.settled(9)
    cluster.wait("all parities", lambda: whole(cluster))

    # 2. Two at once: it waits for nodes, and nothing is lost.
    cluster.join(victim)
    cluster.wait("a warm spare again", lambda: cluster.job()["spares"] == 1)
    generation, victims = int(cluster.job()["generation"]), cluster.job()["members"][2:]
    told = lose(cluster, 9, *victims)
    assert told["recoverable"]
    assert told["state"] == "WAITING"
    assert int(told["step"]) == 9
    assert tiers(told).count("parity") == 2
    cluster.wait("it waits", lambda: cluster.job()["state"] == "WAITING")
    for node in victims:
        cluster.join(node)
    went_on(cluster, generation, 9)
    assert cluster.events("rebuild")[-1]["facts"]["step"] == "9"
    cluster.settled(14)

    # 3. Three: more than the parities bring back, which is said before, and then done.
    cluster.wait("a warm spare once more", lambda: cluster.job()["spares"] == 1)
    members = cluster.job()["members"]
    generation, victims = int(cluster.job()["generation"]), members[:3]
    told = lose(cluster, -1, *victims, code=1)
    assert not told["recoverable"]
    assert told["ranks_lost"] == [0, 1, 2]
    assert "more than its group's parities bring back" in told["why"]
    for node in victims:
        cluster.join(node)
    went_on(cluster, generation, -1)


def test_beyond_its_parities_a_job_goes_back_to_files(cluster: Cluster, tmp_path: Path) -> None:
    begin(cluster, "--redundancy", "xor(3+1)", "--ckpt-dir", str(tmp_path / "ckpt"), "--ckpt-every", "3steps")
    # An agent that comes back finds its node's parity where it was: all three that are left are needed then.
    generation, (first, second, *_) = int(cluster.job()["generation"]), cluster.job()["members"]
    os.kill(int((cluster.work / "s/nodes" / first / "agent.pid").read_text().split()[0]), signal.SIGKILL)
    cluster.wait("the loss of the agent seen", lambda: cluster.nodes()[first] != "ALIVE")
    cluster.join(first)
    cluster.wait("the agent back", lambda: cluster.nodes()[first] == "ALIVE")
    assert whole(cluster)
    told = lose(cluster, 4, second)
    assert tiers(told) == ["local", "local", "local", "parity"]
    went_on(cluster, generation, 4)
    cluster.settled(9)
    cluster.join(second)
    cluster.wait("a warm spare again", lambda: cluster.job()["spares"] == 1)

    # Step 9 is written, too, unless step 6 still was when it came.
    cluster.wait("a later step in files", lambda: int(cluster.job()["persisted_step"]) >= 6)
    generation, victims = int(cluster.job()["generation"]), cluster.job()["members"][:2]
    told = lose(cluster, 9, *victims)
    assert told["recoverable"]
    assert {s["tier"] for s in told["sources"]} == {"file"}
    kept = int(told["step"])
    assert kept in (6, 9)
    for node in victims:
        cluster.join(node)
    went_on(cluster, generation, kept)
    assert len(cluster.events("rebuild")) == 1, "the first loss alone"


def test_a_policy_that_cannot_be_kept_is_refused(cluster: Cluster) -> None:
    done = subprocess.run([str(BIN / "everstep"), "run", "--controller", cluster.controller, "--nnodes", "4", "--redundancy", "rs(4+2)",
                           str(ROOT / "tests/integration/scripts/sharded.py")], check=False, capture_output=True, text=True, timeout=60, env=cluster.env)
    assert done.returncode != 0
    assert "--redundancy=rs(4+2) takes 6 nodes and --nnodes asks for up to 4; rs(2+2) fits" in done.stderr
