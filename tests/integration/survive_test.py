"""What `everstep ckpt survive` foretells is what happens: the same nodes are then killed.

Real processes on loopback: four members in two zones and a spare, ranks with states of their own, or with one state
that they capture once together. Each drill asks,
kills exactly those nodes (agent, keeper, workers), and compares the step, the sources and the bytes with what the
controller did and with what the ranks found in their state.
Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drills import SHARD, Cluster

ZONES = {"n0": "a", "n1": "a", "n2": "b", "n3": "b", "n4": "a"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, ZONES)
    try:
        yield cluster
    finally:
        cluster.down()


def compare(cluster: Cluster, told: dict[str, Any], restores_before: int) -> None:
    """The forecast beside the controller's own account and what the ranks found."""
    cluster.wait("a restore", lambda: len(cluster.restores()) > restores_before)
    did = cluster.restores()[-1]
    tiers = [s["tier"] for s in told["sources"]]
    assert int(did["step"]) == int(told["step"])
    assert int(did["ranks_local"]) == tiers.count("local")
    assert int(did["ranks_from_peers"]) == tiers.count("peer")
    assert int(did.get("ranks_by_ranges", 0)) == tiers.count("ranges")
    assert int(did["bytes"]) == int(told["bytes_to_move"])
    cluster.wait("the job running", lambda: cluster.job()["state"] == "RUNNING")
    for found in cluster.began(int(cluster.job()["generation"])):
        assert found == {"step": int(told["step"]) + 1, "made": int(told["step"]) + 1, "wrong": 0}


def lose(cluster: Cluster, step: int, *nodes: str, asked: tuple[str, ...], code: int = 0) -> tuple[dict[str, Any], int]:
    """Asks, kills; the next generation may go on five steps. The forecast, and how many restores there were."""
    told = cluster.cli("ckpt", "survive", "drill", *asked, code=code)
    assert set(told["lost"]) == set(nodes)
    restores = len(cluster.restores())
    generation = int(cluster.job()["generation"])
    cluster.tell(step=step, generation=generation)
    cluster.kill(*nodes)
    return told, restores


def begin(cluster: Cluster) -> None:
    """Four of five nodes train and stand at step 4, the fifth is a warm spare."""
    cluster.wait("five nodes", lambda: list(cluster.nodes().values()).count("ALIVE") == 5)
    cluster.submit("--nnodes", "4", "--spares", "1")
    cluster.settled(4)
    cluster.wait("a warm spare", lambda: cluster.job()["spares"] == 1)


def test_what_is_foretold_happens(cluster: Cluster) -> None:
    begin(cluster)

    placement = cluster.cli("ckpt", "placement", "drill")
    assert placement["layout"] == "sharded"
    assert placement["fatal"] == [], "every copy is in the other zone"
    members = [n["node"] for n in placement["nodes"]]
    peers = {n["node"]: n["peers"][0] for n in placement["nodes"]}
    assert {ZONES[n] for n in members} == {"a", "b"}
    by_lost = {s["lost"]: s["probability"] for s in placement["by_nodes"]}
    assert by_lost[1] == 1
    assert by_lost[2] == pytest.approx(2 / 3)

    # What other policies would cost is told beside the one in force, in bytes of what is committed.
    assert int(placement["node_bytes"]) > SHARD
    policies = {p["policy"]: p for p in placement["policies"]}
    assert [p for p in policies if policies[p]["in_force"]] == ["replicate(2)"]
    assert policies["replicate(2)"]["survival"][1]["probability"] == pytest.approx(by_lost[2])
    assert policies["xor(3+1)"]["memory"] == pytest.approx(1 / 3)
    assert policies["xor(3+1)"]["fatal_domains"] == 2, "two of four nodes lie in each zone"
    assert policies["rs(2+2)"]["fatal_domains"] == 0

    # 1. One member, with a spare: its rank's bytes come from the peer.
    victim = next(n for n in members if ZONES[n] == "a")
    told, restores = lose(cluster, 4, victim, asked=("--lose", victim))
    assert told["recoverable"]
    assert told["state"] == "ACTIVATING"
    assert [s["source_node"] for s in told["sources"] if s["tier"] == "peer"] == [peers[victim]]
    assert int(told["bytes_to_move"]) > SHARD
    compare(cluster, told, restores)
    assert cluster.job()["members"] == told["members"]
    cluster.settled(9)

    # 2. The same again, the estimate now from what this job measured. Others may want the processors for a while: of
    # three drills one must come to what was foretold.
    step, seconds = 9, []
    for drill in range(1, 4):
        cluster.join(victim)
        cluster.wait("a warm spare again", lambda: cluster.job()["spares"] == 1)
        victim = next(n for n in cluster.job()["members"] if ZONES[n] == "a")
        told, restores = lose(cluster, step, victim, asked=("--lose", victim))
        assert "measured" in told["basis"]
        assert ("1 recovery" if drill == 1 else f"{drill} recoveries") in told["basis"]
        compare(cluster, told, restores)
        step += 5
        cluster.settled(step)
        took = float(cluster.job()["faults"][-1]["recovery_seconds"])
        estimate = float(told["estimated_seconds"])
        seconds.append((estimate, took))
        if estimate / 2 - 0.5 < took < 2 * estimate + 0.5:
            break
    else:
        raise AssertionError(f"seconds estimated, and taken: {seconds}")

    # 3. A zone: too few nodes are left, but a copy of everything; it goes on when there are nodes.
    cluster.join(victim)
    cluster.wait("a warm spare again", lambda: cluster.job()["spares"] == 1)
    nodes = [n for n, zone in ZONES.items() if zone == "b"]
    told, restores = lose(cluster, step, *nodes, asked=("--domain", "zone=b"))
    assert told["recoverable"]
    assert told["state"] == "WAITING"
    cluster.wait("it waits", lambda: cluster.job()["state"] == "WAITING")
    assert len(cluster.restores()) == restores
    for node in nodes:
        cluster.join(node)
    compare(cluster, told, restores)
    cluster.settled(step + 5)

    # 4. A pair: nothing is left of two ranks, and that is said before.
    told = cluster.cli("ckpt", "survive", "drill", "--nodes", "2", code=1)
    assert told["survival"]["probability"] == pytest.approx(2 / 3)
    pair, members = told["lost"], cluster.job()["members"]
    told, restores = lose(cluster, -1, *pair, asked=("--lose", ",".join(pair)), code=1)
    assert not told["recoverable"]
    assert int(told["step"]) == -1
    assert told["ranks_lost"] == sorted(members.index(n) for n in pair)
    for node in pair:
        cluster.join(node)
    cluster.wait("a restore", lambda: len(cluster.restores()) > restores)
    assert cluster.restores()[-1]["step"] == "-1"
    cluster.wait("the job running", lambda: cluster.job()["state"] == "RUNNING")
    assert [f["made"] for f in cluster.began(int(cluster.job()["generation"]))] == [0] * 4


def test_what_is_foretold_of_a_state_in_shares_happens(cluster: Cluster) -> None:
    cluster.env["SHARES"] = "1"
    begin(cluster)
    placement = cluster.cli("ckpt", "placement", "drill")
    assert placement["layout"] == "shares"
    members = cluster.job()["members"]

    # 1. One member: each rank reads the shares of all, the lost one's from its copy.
    victim = next(n for n in members if ZONES[n] == "a")
    told, restores = lose(cluster, 4, victim, asked=("--lose", victim))
    assert told["recoverable"]
    assert int(told["step"]) == 4
    assert [s["tier"] for s in told["sources"]] == ["ranges"] * 4
    # Of four quarters a node holds two, its own and a peer's; the spare, none.
    assert 2.5 * SHARD <= int(told["bytes_to_move"]) < 2.7 * SHARD
    compare(cluster, told, restores)
    assert cluster.job()["members"] == told["members"]
    cluster.settled(9)

    # 2. A pair that holds both copies of a share: nothing is left of the state, and that is said before.
    told = cluster.cli("ckpt", "survive", "drill", "--nodes", "2", code=1)
    assert told["survival"]["probability"] == pytest.approx(2 / 3)
    pair = told["lost"]
    told, restores = lose(cluster, -1, *pair, asked=("--lose", ",".join(pair)), code=1)
    assert not told["recoverable"]
    assert int(told["step"]) == -1
    assert len(told["ranks_lost"]) == 2
    for node in [*pair, victim]:
        cluster.join(node)
    cluster.wait("a restore", lambda: len(cluster.restores()) > restores)
    assert cluster.restores()[-1]["step"] == "-1"
    cluster.wait("the job running", lambda: cluster.job()["state"] == "RUNNING")
    assert [f["made"] for f in cluster.began(int(cluster.job()["generation"]))] == [0] * 4
