"""What a restore costs, beside the memory's and the link's own rate.

Cases and metrics
  local-SIZE  restored: Checkpointer.restore() of a new process after SIGKILL, every byte checked; viewed: its view(),
              every byte checked, none copied. Unit x: one warm memcpy of the same bytes in the same process.
  peer-SIZE   restored: a slot from another node's memory, from the agent's order to the checked slot. Unit x: the same
              bytes over the same link at the rate that iperf3 reaches there, in as many streams.
  swarm-N     time: N nodes take one shard of one holder as the controller plans it, from it or from each other, until
              the last has it. Each node is a network namespace whose
              link is shaped to --link Mbit/s each way. Unit x: one shard over one such link by iperf3. "goal" in the table:
              ceil(log2(N + 1)), a doubling of the sources each round. Needs root.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import BIN, ROOT, Results, before_all_others, iperf_rate

sys.path.insert(0, str(ROOT / "tests/integration"))
from network import Network, NotAllowed, sh  # noqa: E402

NODE = ROOT / "build/release/tests/restore_node"
SCRIPT = ROOT / "tests/bench/scripts/restore.py"
RESTORES = 4  # of one job: it is given up after five generations that were killed before they got anywhere
SIZES = {"16MiB": 16 << 20, "64MiB": 64 << 20, "1GiB": 1 << 30}


def local(size: int, runs: int, realtime: bool, limit: float) -> list[dict]:
    """The rows of one job that dies and comes back `runs` times."""
    with tempfile.TemporaryDirectory(prefix="esr-", dir="/tmp") as folder:
        out = Path(folder) / "out"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP_", "TORCHELASTIC"))}
        env |= {"BENCH_OUT": str(out), "RESTORE_BYTES": str(size), "RESTORE_RUNS": str(runs), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT / "worker/python"), "EVERSTEP_LIBRARY": str(ROOT / "build/release/lib/libeverstep.so")}
        done = subprocess.run([BIN / "everstep", "run", "--state-dir", f"{folder}/s", "--max-restarts", str(runs + 3), SCRIPT],
                              env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=limit, preexec_fn=before_all_others if realtime else None)
        if done.returncode or not out.exists():
            raise SystemExit(f"error: local restore of {size} bytes: the job ended with {done.returncode}\n{done.stdout}")
        return [json.loads(line) for line in out.read_text().splitlines()]


class Node:
    """A restore_node process; one line out for each line in."""

    def __init__(self, address: str, streams: int, prefix: list[str], realtime: bool) -> None:
        self.address = address
        self.process = subprocess.Popen([*prefix, str(NODE), "--address", address, "--streams", str(streams)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        preexec_fn=before_all_others if realtime else None)
        self.port = int(self.hear()[1])

    def say(self, *words: object) -> None:
        assert self.process.stdin
        print(*words, file=self.process.stdin, flush=True)

    def hear(self) -> list[str]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: the node at {self.address} gave up; what it said stands above")
        return line.split()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Restores:
    """Restores of one shard by some nodes from one holder, one after the other."""

    def __init__(self, holder: Node, takers: list[Node], size: int) -> None:
        self.holder, self.takers, self.size, self.generation = holder, takers, size, 0

    def run(self, count: int) -> float:
        """Seconds until the last of `count` nodes has it."""
        self.generation += 2
        self.holder.say("capture", self.generation - 1, self.generation, self.size)
        _, crc, size = self.holder.hear()
        holder = f"{self.holder.address}:{self.holder.port}"
        self.holder.say("swarm", count, size)  # what the controller would plan
        plan = [tuple(map(int, word.split(":"))) for word in self.holder.hear()[1:]]
        began = time.monotonic_ns()
        for taker, (source, depth) in zip(self.takers, plan):
            shard = (self.generation, self.generation, crc, size, self.generation - 1)
            if depth == 0:
                taker.say("restore", *shard, holder)
            else:
                taker.say("restore", *shard, f"{self.takers[source].address}:{self.takers[source].port}", depth, holder)
        return (max(int(taker.hear()[1]) for taker in self.takers[:count]) - began) / 1e9


@contextmanager
def nodes(addresses: list[str], streams: int, prefixes: list[list[str]], realtime: bool) -> Iterator[list[Node]]:
    with ExitStack() as stack:
        made = []
        for address, prefix in zip(addresses, prefixes):
            made.append(Node(address, streams, prefix, realtime))
            stack.callback(made[-1].close)
        yield made


def peer(results: Results, name: str, size: int, args: argparse.Namespace) -> None:
    with nodes(["127.0.0.1"] * 2, args.streams, [[], []], args.realtime) as (holder, taker):
        restores = Restores(holder, [taker], size)
        for _ in range(2):  # the slots' memory is taken, as after a job's first steps
            restores.run(1)
        for run in range(args.runs):
            took = restores.run(1)
            rate = iperf_rate("127.0.0.1", size, args.streams, realtime=args.realtime)
            results.add(f"peer-{name}", "everstep", "restored", "x", took / (size / rate), goal="at most 1.2")
            results.add(f"peer-{name}", "everstep", "restored", "GiB/s", size / took / 2**30)
            results.add(f"peer-{name}", "iperf3", "rate", "GiB/s", rate / 2**30)
            print(f"peer {name} {run + 1}/{args.runs}: {size / took / 2**30:.2f} GiB/s, iperf3 {rate / 2**30:.2f}", flush=True)


def swarm(results: Results, args: argparse.Namespace) -> None:
    counts = [int(n) for n in args.nodes.split(",")]
    size = SIZES[args.swarm_size]
    network = Network(max(counts) + 1)
    try:
        network.make()
    except NotAllowed as error:
        print(f"swarm: left out: {error}")
        return
    try:
        for i, name in enumerate(network.names):  # what a node sends is limited there, what it gets at the bridge's end
            shape = ("root", "tbf", "rate", f"{args.link}mbit", "burst", "512kb", "latency", "50ms")
            sh("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", *shape)
            sh("ip", "netns", "exec", network.hub, "tc", "qdisc", "add", "dev", f"v{i}", *shape)
        inside = [network.inside(name) for name in network.names]
        addresses = [network.address(i) for i in range(max(counts) + 1)]
        rate = iperf_rate(addresses[0], size, 1, server=inside[0], client=inside[1], realtime=args.realtime)
        print(f"swarm: one link carries {rate / 2**20:.0f} MiB/s by iperf3", flush=True)
        with nodes(addresses, args.streams, inside, args.realtime) as (holder, *takers):
            restores = Restores(holder, takers, size)
            restores.run(max(counts))
            for run in range(args.swarm_runs):
                for count in counts:
                    took = restores.run(count) / (size / rate)
                    results.add(f"swarm-{count}", "everstep", "time", "x", took,
                                goal=f"{math.ceil(math.log2(count + 1))} rounds")
                    print(f"swarm {count} nodes {run + 1}/{args.swarm_runs}: {took:.2f} x one shard over the link", flush=True)
    finally:
        network.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", default="64MiB,1GiB")
    parser.add_argument("--cases", default="local,peer,swarm")
    parser.add_argument("--streams", type=int, default=2, help="connections for one slot, iperf3's too")
    parser.add_argument("--nodes", default="1,2,4,8", help="of the swarm")
    parser.add_argument("--link", type=int, default=800, help="Mbit/s of each node of the swarm")
    parser.add_argument("--swarm-size", default="64MiB", choices=SIZES)
    parser.add_argument("--swarm-runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true", help="also print the table for docs/reference/performance.md")
    parser.add_argument("--realtime", action="store_true", help="before all other processes of a busy machine (as root)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one job")
    args = parser.parse_args()
    results = Results("restore")
    for name in args.sizes.split(","):
        if "local" in args.cases.split(","):
            for left in range(args.runs, 0, -RESTORES):
                for row in local(SIZES[name], min(left, RESTORES), args.realtime, args.limit):
                    results.add(f"local-{name}", "everstep", row["metric"], "x", row["value"], goal="at most 1.2")
                    results.add(f"local-{name}", "everstep", row["metric"], "s", row["seconds"])
        if "peer" in args.cases.split(","):
            peer(results, name, SIZES[name], args)
    if "swarm" in args.cases.split(","):
        swarm(results, args)
    results.finish(args)


if __name__ == "__main__":
    main()
