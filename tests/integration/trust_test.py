"""Copies that go bad or missing, checkpoints that are trusted, and going back: real processes on loopback.

Two members and a spare, ranks with states of their own (scripts/sharded.py). Bytes are flipped where they lie, in the
memfd of a node's keeper; agents look over their memory many times a second here.
Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drills import SHARD, Cluster

ZONES = {"n0": "a", "n1": "b", "n2": "a"}
CHUNK = 1 << 20


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    clusters: list[Cluster] = []

    def begin(*job: str, scrub: bool = True, zones: dict[str, str] | None = None, nodes: int = 2) -> Cluster:
        args = ("--ckpt-scrub-every", "0.2", "--ckpt-scrub-rate", "4096" if scrub else "0")
        clusters.append(Cluster(tmp_path, zones or ZONES, ranks=nodes, agent_args=args))
        cluster = clusters[-1]
        cluster.wait("all nodes", lambda: list(cluster.nodes().values()).count("ALIVE") == len(cluster.zones))
        cluster.submit("--nnodes", str(nodes), "--spares", str(len(cluster.zones) - nodes), *job)
        return cluster

    yield begin
    for cluster in clusters:
        cluster.down()


class Slot:
    """A finished slot of an arena, as docs/internals/arena.md lays it out."""

    def __init__(self, path: str, header: bytes, slot: int) -> None:
        self.path = path
        self.rank, self.replica = struct.unpack_from("<iI", header, 152)
        base = 576 + 192 * slot
        self.seq, self.offset, _, _, self.step = struct.unpack_from("<QQQQq", header, base)

    def flip(self, chunk: int, at: int = 4711) -> None:
        """One bit."""
        with open(self.path, "r+b", buffering=0) as memory:
            where = self.offset + chunk * CHUNK + at
            byte = os.pread(memory.fileno(), 1, where)[0]
            os.pwrite(memory.fileno(), bytes([byte ^ 16]), where)


def slots(cluster: Cluster, node: str) -> list[Slot]:
    pid = int((cluster.work / "s/nodes" / node / "keeper.pid").read_text().split()[0])
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if "memfd:" not in os.readlink(path):
                continue
            with open(path, "rb", buffering=0) as memory:
                header = os.pread(memory.fileno(), 8192, 0)
        except FileNotFoundError:  # closed meanwhile
            continue
        if header[:8] == b"EVSARENA":
            found += [s for s in (Slot(path, header, i) for i in range(2)) if s.seq and s.seq % 2 == 0]
    return found


def slot(cluster: Cluster, node: str, rank: int, step: int, replica: bool) -> Slot:
    return next(s for s in slots(cluster, node) if (s.rank, bool(s.replica), s.step) == (rank, replica, step))


def checkpoints(cluster: Cluster) -> dict[str, Any]:
    return cluster.cli("ckpt", "show", "drill")


def copies(cluster: Cluster) -> list[int]:
    """Nodes that hold each rank's shard of the newest committed step."""
    return [len(r.get("nodes", [])) for r in checkpoints(cluster).get("ranks", [])]


def right(cluster: Cluster, generation: int, step: int) -> None:
    for found in cluster.began(generation):
        assert found == {"step": step + 1, "made": step + 1, "wrong": 0}


def test_a_flipped_bit_is_found_named_and_put_right(start: Callable[..., Cluster]) -> None:
    cluster = start()
    cluster.settled(4)
    members = cluster.job()["members"]
    cluster.wait("two copies of each", lambda: copies(cluster) == [2, 2])

    flips = [(members[0], 0, False, 3), (members[1], 0, True, 0), (members[0], 0, False, 5), (members[0], 1, True, 7)]
    for done, (node, rank, replica, chunk) in enumerate(flips, 1):
        slot(cluster, node, rank, 4, replica).flip(chunk)
        cluster.wait(f"flip {done} repaired", lambda done=done: len(cluster.events("shard_repaired")) == done)
        told = cluster.events("shard_damaged")
        assert len(told) == done
        assert (told[-1]["node"], told[-1]["rank"]) == (node, rank)
        facts = told[-1]["facts"]
        assert (facts["step"], facts["chunk"], facts["copy"]) == ("4", str(chunk), "replica" if replica else "own")
        assert facts["source"] == next(n for n in members if n != node)
    shown = checkpoints(cluster)
    assert (int(shown["shards_damaged"]), int(shown["shards_repaired"])) == (4, 4)
    assert copies(cluster) == [2, 2]

    # Three of the four were in one node's memory.
    suspect = cluster.events("memory_suspect")
    assert [e["node"] for e in suspect] == [members[0]]
    assert "everstep node drain" in suspect[0]["message"]
    assert shown["suspect_nodes"] == [members[0]]

    # What was put right is right: it is all that is left of both ranks when the other node dies.
    cluster.tell(step=4, generation=1000)
    cluster.kill(members[1])
    cluster.wait("the next generation", lambda: int(cluster.job()["generation"]) == 2)
    right(cluster, 2, 4)


def test_of_a_job_of_parities_a_flipped_bit_is_put_right_too(start: Callable[..., Cluster]) -> None:
    """Nobody has another copy: a state is made anew out of parities, a parity out of states."""
    cluster = start("--redundancy", "xor(2+1)", nodes=3)
    cluster.settled(4)
    members = cluster.job()["members"]
    # Parity 4 is what rank 1 holds of the two others (docs/internals/arena.md, "Parities").
    for done, (node, rank, replica, chunk) in enumerate([(members[0], 0, False, 3), (members[1], 4, True, 0), (members[2], 2, False, 5)], 1):
        slot(cluster, node, rank, 4, replica).flip(chunk)
        cluster.wait(f"flip {done} repaired", lambda done=done: len(cluster.events("shard_repaired")) == done)
        told = cluster.events("shard_damaged")[-1]
        assert (told["node"], told["rank"], told["facts"]["source"]) == (node, rank, "parity")
        assert "made anew out of parities" in told["message"]
    shown = checkpoints(cluster)
    assert (int(shown["shards_damaged"]), int(shown["shards_repaired"])) == (3, 3)
    assert (shown["parities"], shown["parities_wanted"]) == (3, 3)
    # It is the very state again: a loss is undone with it.
    generation = int(cluster.job()["generation"])
    cluster.tell(step=4, generation=generation)
    cluster.kill(members[1])
    cluster.join(members[1])
    cluster.wait("a later generation", lambda: int(cluster.job()["generation"]) > generation and cluster.job()["state"] == "RUNNING")
    right(cluster, int(cluster.job()["generation"]), 4)


def test_a_damaged_copy_is_never_restored_from(start: Callable[..., Cluster]) -> None:
    cluster = start(scrub=False)
    cluster.settled(4)
    members = cluster.job()["members"]
    for each in slots(cluster, members[0]):
        if each.rank == 0:
            each.flip(2)
    rank = next(r for r in cluster.job()["ranks"] if r["node"] == members[0])
    os.kill(int(rank["pid"]), 9)
    cluster.wait("a restore", lambda: len(cluster.restores()) > 0)
    assert cluster.restores()[-1]["step"] == "4"
    right(cluster, 2, 4)
    told = cluster.events("shard_damaged")
    assert {(e["node"], e["facts"]["found_by"]) for e in told} == {(members[0], "survey")}
    assert cluster.restores()[-1]["ranks_from_peers"] == "1"


def test_after_a_loss_every_copy_is_made_again_and_the_other_holder_may_go(start: Callable[..., Cluster]) -> None:
    cluster = start()
    cluster.settled(4)
    first = cluster.job()["members"]
    cluster.wait("two copies of each", lambda: copies(cluster) == [2, 2])

    # No step is made any more: what is copied again is the step that was committed before.
    cluster.kill(first[1])
    cluster.wait("the spare's turn", lambda: int(cluster.job()["generation"]) == 2 and cluster.job()["state"] == "RUNNING")
    right(cluster, 2, 4)
    cluster.wait("full copies again", lambda: copies(cluster) == [2, 2])
    assert int(checkpoints(cluster)["committed_step"]) == 4
    again = cluster.events("copies_restored")
    assert again[-1]["facts"]["step"] == "4"
    assert again[-1]["facts"]["copies"] == "2"

    cluster.kill(first[0])
    cluster.join(first[1])
    cluster.wait("on what was copied", lambda: int(cluster.job()["generation"]) > 2 and cluster.job()["state"] == "RUNNING")
    right(cluster, int(cluster.job()["generation"]), 4)


def test_rolled_back_to_what_is_verified_and_planned_from_files(start: Callable[..., Cluster], tmp_path: Path) -> None:
    files = tmp_path / "files"
    cluster = start("--ckpt-dir", str(files), "--ckpt-every", "4steps", "--verify-after", "3")
    cluster.settled(4)
    cluster.wait("step 4 in files", lambda: int(cluster.job()["persisted_step"]) == 4)
    assert int(checkpoints(cluster)["verified_step"]) < 4
    cluster.tell(step=7, generation=1000)
    cluster.wait("step 4 verified", lambda: int(checkpoints(cluster)["verified_step"]) == 4)
    cluster.tell(step=9, generation=1000)
    cluster.settled(9)
    cluster.wait("step 8 in files", lambda: int(cluster.job()["persisted_step"]) == 8)
    trust = {int(i["step"]): i["trust"] for i in checkpoints(cluster)["items"]}
    assert (trust[4], trust[8], trust[9]) == ("verified", "committed", "committed")

    # An anomaly: nothing more is verified, and back to step 4, which memory has no more.
    cluster.run("ckpt", "anomaly", "drill", "--why", "loss is NaN")
    cluster.run("ckpt", "rollback", "drill", "--to", "3", code=6)
    cluster.tell(step=4, generation=1000)
    done = cluster.cli("ckpt", "rollback", "drill", "--verified")
    assert (int(done["step"]), int(done["from_step"])) == (4, 9)
    cluster.wait("running again", lambda: int(cluster.job()["generation"]) == 2 and cluster.job()["state"] == "RUNNING")
    right(cluster, 2, 4)
    assert cluster.restores()[-1]["ranks_from_files"] == "2"
    listed = json.loads(cluster.run("ckpt", "list", str(files), "-o", "json"))["items"]
    assert {int(c["step"]): c["state"] for c in listed}[8] == "given up"

    # Later restarts do not find step 8 or 9 either, though files and other nodes once had them.
    rank = cluster.job()["ranks"][0]
    os.kill(int(rank["pid"]), 9)
    cluster.wait("after a worker's death", lambda: int(cluster.job()["generation"]) == 3 and cluster.job()["state"] == "RUNNING")
    right(cluster, 3, 4)

    # It goes on from there, and what it makes is its own.
    cluster.tell(step=8, generation=1000)
    cluster.settled(8)
    cluster.wait("the new step 8 in files", lambda: int(cluster.job()["persisted_step"]) == 8)
    named = cluster.run("ckpt", "diff", f"{files}@4", f"{files}@8", "-o", "name", code=1).split()
    assert any("values" in name for name in named)

    # The plan for the loss of both members: from files, and so it happens.
    members = cluster.job()["members"]
    told = cluster.cli("ckpt", "plan", "drill", "--lose", ",".join(members))
    assert told["recoverable"]
    assert int(told["step"]) == 8
    assert [s["tier"] for s in told["sources"]] == ["file", "file"]
    assert all(int(s["bytes"]) > SHARD and s["why"] for s in told["sources"])
    restores = len(cluster.restores())
    cluster.kill(*members)
    for node in members:
        cluster.join(node)
    cluster.wait("a restore", lambda: len(cluster.restores()) > restores)
    did = cluster.restores()[-1]
    assert (did["step"], did["ranks_from_files"]) == ("8", "2")
    assert int(did["bytes"]) == sum(int(s["bytes"]) for s in told["sources"])
    cluster.wait("running", lambda: cluster.job()["state"] == "RUNNING")
    right(cluster, int(cluster.job()["generation"]), 8)
