"""A soak: N random real faults on a running job, then proof that nothing was lost and nothing is left.

    tests/run.sh soak [--job steps|pipeline] [--faults 200] [--seed S] [--nodes 4] [--members 2] [--no-partitions] [--keep] [--spin]

A cluster of separate processes trains scripts/ledger.py, a step in about 50 ms, on two nodes with spares. Faults are drawn from a seed:
SIGKILL or SIGSTOP of a worker, an agent, a keeper, a whole node, the controller. Where network namespaces are allowed
(root, `ip netns`), each node lives in one of its own, and a node may also be cut off from all the others, for longer or
shorter than its lease; else the cluster is on loopback, and that is said. After each fault the job must make new steps
on every rank within --limit seconds; stopped processes go on, and cuts heal, after a drawn time (a stopped worker
is left to the controller). At the end the ledger of steps has no gap, one state a step, no committed step lost unless as
many copies died as there were (two nodes' memory gone with no commit between), memory, descriptors and threads of every part
are what they were at the beginning (vitals.py), and no process, socket, memfd, file or namespace of the cluster is left.

--job pipeline: an everstep.Pipeline on five nodes, all of which train; who is lost is left out until it is back. Nodes are
drained and given back, too. Each microbatch of each step goes in once, losses are those of a run that nothing happened
to, and processes that no fault hit are the same ones all along (soak_jobs.py).

--spin instead: eight busy processes for a minute on this machine; no node may be taken for lost.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import ledger
from cluster import Cluster, Failure, PartedCluster, cluster_processes, send, shared_memory, verdict
from network import Network, NotAllowed
from soak_jobs import JOBS, Job
from vitals import Vitals

LEAST_FOR_FLAT = 40  # faults: fewer take too short a time to tell growth from chance
START_LIMIT = 240.0  # seconds: four nodes import torch at once, and other programs may want the processors, too


CUTS = [("cut", "node", 5)]


def one_fault(cluster: Cluster, job: Job, draw: random.Random, number: int, limit: float) -> tuple[str, float]:
    faults = job.faults + (CUTS if isinstance(cluster, PartedCluster) else [])
    verb, kind, _ = draw.choices(faults, weights=[f[2] for f in faults])[0]
    which = str(draw.randrange(cluster.world)) if kind.startswith("worker") else draw.choice(cluster.node_names())
    pids = cluster.pids(kind.partition(" ")[0], which)
    if kind.startswith("worker") and not pids:  # fewer train now
        which = "0"
        pids = cluster.pids("worker", which)
    job.before(cluster, kind, which, pids)
    pause = draw.uniform(0.2, 6.0)
    label = f"{verb} {kind}" + ("" if kind == "controller" else f" {which}") + (f" for {pause:.1f} s" if verb in ("stop", "cut") else "")
    began = time.time()
    if verb == "cut":
        assert isinstance(cluster, PartedCluster)
        cluster.network.cut(int(which[1:]), down=True)
        time.sleep(pause)
        cluster.network.cut(int(which[1:]), down=False)
        pids = []
    if kind == "worker unheard":
        send(cluster.pids("controller", ""), signal.SIGKILL)
    if verb == "drain":
        cluster.cli("node", "drain", which, "--reason", "soak", "--allow-pause")
        pids = []
    send(pids, signal.SIGKILL if verb == "kill" else signal.SIGSTOP)
    if verb == "stop" and not kind.startswith("worker"):  # somebody types `fg`; a stopped worker is the controller's to notice
        time.sleep(pause)
        send(pids, signal.SIGCONT)
    try:
        cluster.wait_steps(time.time(), 3, limit)
        job.after(cluster, verb, kind, began)
        if verb == "drain":
            cluster.cli("node", "undrain", which)
            cluster.wait_steps(time.time(), 3, limit)
    except Failure as e:
        raise Failure(f"fault {number} ({label}): {e}") from e
    stood = cluster.longest_gap(began, job.same)
    cluster.job()
    print(f"{number:4d} {label:34s} pids {pids}: stood still for {stood:.2f} s", flush=True)
    return f"{verb} {kind}", stood


def soak(args: argparse.Namespace, work: Path) -> None:
    shm_before = shared_memory()
    network = Network(args.nodes)
    job = JOBS[args.job](args)
    parted = args.partitions and job.partitions
    if parted:
        try:
            network.make()
        except NotAllowed as e:
            print(f"without partitions: {e}", flush=True)
            parted = False
    try:
        cluster = PartedCluster(work, args.nodes, network) if parted else Cluster(work, args.nodes)
        run_soak(args, cluster, job, shm_before)
    finally:
        job.close()
        network.remove()
    if network.left():
        raise Failure(f"namespaces are left: {' '.join(network.left())}")


def parts(cluster: Cluster) -> dict[str, list[int]]:
    """Who plays which part now."""
    found = {"controller": cluster.pids("controller", "")}
    for node in cluster.node_names():
        found |= {f"agent {node}": cluster.pids("agent", node), f"keeper {node}": cluster.pids("keeper", node)}
    return found | {f"worker {rank}": cluster.pids("worker", str(rank)) for rank in range(cluster.world)}


def run_soak(args: argparse.Namespace, cluster: Cluster, job: Job, shm_before: set[str]) -> None:
    draw = random.Random(args.seed)
    times: dict[str, list[float]] = {}
    vitals = None
    try:
        job.start(cluster)
        cluster.wait_steps(0, 5, START_LIMIT)
        vitals = Vitals(lambda: parts(cluster), cluster.job)
        for number in range(1, args.faults + 1):
            what, took = one_fault(cluster, job, draw, number, args.limit)
            times.setdefault(what, []).append(took)
            time.sleep(draw.choice([0.0, 0.1, 0.5, 1.0, 2.0]))
        cluster.job()
        shown = cluster.end_job(args.limit)
    except Failure:
        cluster.autopsy()
        raise
    finally:
        if vitals is not None:
            vitals.stop()
        if cluster.run.poll() is None:
            cluster.run.kill()
        cluster.down()
    entries = ledger.read(cluster.ledger)
    left = cluster_processes(cluster.state)
    wrong = [f"process {pid} is left: {command[:120]}" for pid, command in left.items()]
    wrong += [f"file {p} is left" for p in cluster.state.rglob("*.sock")] if cluster.state.exists() else []
    wrong += [f"/dev/shm/{name} is left" for name in shared_memory() - shm_before]
    redone = ledger.redone(entries)
    print(f"\n{'FAULT':20s} {'COUNT':>6s} {'MEDIAN s':>9s} {'MAX s':>7s}")
    for what, values in sorted(times.items()):
        print(f"{what:20s} {len(values):6d} {sorted(values)[len(values) // 2]:9.2f} {max(values):7.2f}")
    print(f"{len(entries)} entries, {max(e.step for e in entries) + 1} steps, {len(redone) + 1} generations that trained, "
          f"steps redone a generation: {dict(sorted(Counter(redone.values()).items()))}, state {shown.get('state')}")
    wrong += job.wrong(cluster, entries)
    table, growing = vitals.verdict()
    print(f"\n{table}")
    if args.faults >= LEAST_FOR_FLAT:
        wrong += growing
    else:
        print(f"with fewer than {LEAST_FOR_FLAT} faults no verdict on growth")
    if wrong:
        raise Failure("; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""))


def spin(args: argparse.Namespace, work: Path) -> None:
    cluster = Cluster(work, args.nodes)
    burners: list[subprocess.Popen[bytes]] = []
    try:
        cluster.start_job("soak", nodes=args.members, spares=args.nodes - args.members)
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
    parser.add_argument("--job", choices=sorted(JOBS), default="steps", help="what trains (soak_jobs.py)")
    parser.add_argument("--nodes", type=int, help="default: 4; 5 of a pipeline")
    parser.add_argument("--members", type=int, default=2, help="nodes that train; the others are spares")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a recovery may take")
    parser.add_argument("--partitions", action=argparse.BooleanOptionalAction, default=True,
                        help="nodes in network namespaces, cut off now and then (needs root; said when it cannot be)")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    parser.add_argument("--spin", action="store_true", help="eight busy processes; no node may be lost")
    parser.add_argument("--seconds", type=float, default=60.0, help="of --spin")
    args = parser.parse_args()
    args.nodes = args.nodes or (5 if args.job == "pipeline" else 4)
    again = f"tests/run.sh soak --job {args.job} --faults {args.faults} --seed {args.seed} --nodes {args.nodes} --members {args.members}{'' if args.partitions else ' --no-partitions'}" if not args.spin else "tests/run.sh soak --spin"
    return verdict("soak", lambda work: (spin if args.spin else soak)(args, work), again, keep=args.keep)


if __name__ == "__main__":
    sys.exit(main())
