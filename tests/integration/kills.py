"""SIGKILL at every labelled point of capture, push, commit, persist, repair and restore, in real jobs.

    tests/run.sh kills [--seed S] [--only LABEL ...] [--job NAME ...] [--short] [--list] [--keep]

The sources name places where a crash is most instructive (KillPoint("push.chunk_sent"), proto/base/kill_point.h).
Here is a drill for each: which job reaches it, what has to be broken first so that it is reached (a second fault, then),
and which program is to die there. On a cluster of real processes each drill arms one point, waits until a process died
at it (a point that is never reached fails the test), and then wants:

- the job goes on: three new steps on every rank within --limit seconds;
- nothing that was committed is lost, no step is missing, one state a step (integration/ledger.py);
- at the job's end every step's weights are those of a run that nobody disturbed, to the last bit;
- every complete checkpoint in the directory passes its checksums; no process, socket, memfd or file is left.

A label in the sources without a drill fails the test, and so does a drill whose label is gone.
--short: one drill of each of eight phases, drawn from the seed; without --seed another each day.
"""

from __future__ import annotations

import argparse
import datetime
import mmap
import random
import re
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ledger
from cluster import EVERSTEP, ROOT, Cluster, Failure, cluster_processes, send, shared_memory, verdict

START_LIMIT = 240.0  # seconds: four nodes import torch at once, and other programs may want the processors, too
FIRE_LIMIT = 30.0  # seconds until an armed point is reached, once its fault has happened
PAIR_TRIES = 6
UNDISTURBED = ROOT / "tests/integration/scripts/undisturbed.py"
UNDISTURBED_LIMIT = 900.0  # seconds
GROWS_IN = 15  # steps
TRAINER, AGENT, KEEPER, CONTROLLER = "python", "everstep-agent", "everstep-keeper", "everstep-control"


class Page:
    """The file that arms a point in every process that maps it (struct KillPage)."""

    def __init__(self, path: Path) -> None:
        path.touch(0o600)
        path.write_bytes(struct.pack("<32s96x", b"everstep kill points, page 1\n"))
        with path.open("r+b") as file:
            self.map = mmap.mmap(file.fileno(), 128)

    def arm(self, label: str, hit: int, program: str, only: int = 0, spared: int = 0) -> None:
        self.disarm()
        self.map[36:128] = struct.pack("<iii64s16s", 0, only, spared, label.encode(), program.encode())
        self.map[32:36] = struct.pack("<i", hit)

    def disarm(self) -> None:
        self.map[32:36] = bytes(4)

    def killed(self) -> int:
        """The pid of who died at the armed point; 0: nobody yet."""
        return struct.unpack("<i", self.map[36:40])[0]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@dataclass(frozen=True)
class Drill:
    label: str
    program: str
    job: str = "plain"
    fault: str = ""  # what makes a process come by: "", worker, node, nodes, pair; growth
    hits: int = 1  # the hit that kills is drawn from 1 to this


# One job for many drills: its drills, one after the other. Two members, two spares, state in six chunks, files every five steps.
# files: flags of a job with a checkpoint directory; flags: others.
JOBS: dict[str, dict] = {
    "plain": {"env": {"STATE_MIB": "4"}, "grows": True, "files": ["--ckpt-every", "5steps", "--ckpt-keep", "2"]},
    "late": {"env": {"STATE_MIB": "4", "CAPTURE_MODE": "overlapped", "STEP_SECONDS": "0"}},
    "ahead": {"env": {"STATE_MIB": "24", "CAPTURE_MODE": "overlapped", "STEP_SECONDS": "0"}},  # large enough to leave as it is written
    "wide": {"env": {"STATE_MIB": "66", "STEP_SECONDS": "0.3"}},  # two streams
    "pair": {"env": {"STATE_MIB": "4"}, "nodes": 1, "per_node": 2},
    "files": {"env": {"STATE_MIB": "4"}, "files": ["--ckpt-every", "5steps", "--ckpt-keep", "3"]},
    "elastic": {"env": {"STATE_MIB": "4"}, "nodes": "2:4"},
    "ranges": {"env": {"STATE_MIB": "24", "SHARDED": "1"}, "nodes": "2:4"},
    "parity": {"env": {"STATE_MIB": "24", "SHARDED": "1"}, "nodes": 3, "flags": ["--redundancy", "xor(2+1)"]},
    "shares": {"env": {"STATE_MIB": "24", "REPLICATED": "shares"}},
    "crowd": {"env": {"STATE_MIB": "24"}, "nodes": "2:4", "per_node": 2},  # long enough to be passed on while it still arrives
}
# By job or label, where it takes luck: how often, and the seconds each. Who takes a lost node's part may have the arena
# open still, from when it held that rank's copy before; a crowd's newcomer imports PyTorch before it is taken in.
TRIES = {"pair": (PAIR_TRIES, 3.0), "crowd": (4, 45.0), "arrive.arena_opened": (4, 8.0)}


def drills(program: str, labels: str, job: str = "plain", fault: str = "", **hits: int) -> list[Drill]:
    return [Drill(label, program, job, fault, hits.get(label.partition(".")[2], 1)) for label in labels.split()]


DRILLS: list[Drill] = [
    # A capture, in the trainer.
    *drills(TRAINER, "capture.decided capture.begun capture.table_written capture.published capture.counted capture.rung "
                     "slot.torn slot.bytes_copied slot.fields_written slot.root_written slot.closed", bytes_copied=12),
    *drills(TRAINER, "capture.staged capture.late_bytes capture.copied capture.waiting", "late", late_bytes=4),
    *drills(TRAINER, "capture.announced", "late"),
    # Its way to the peer: who sends, who takes; ahead of the table first.
    *drills(AGENT, "push.ahead_sent arrive.ahead_begun arrive.ahead_verified arrive.ahead_adopted", "ahead", ahead_sent=4, ahead_verified=4),
    *drills(AGENT, "push.capture_seen push.capture_told push.marked push.connected push.asked push.answered push.table_sent "
                   "push.want_heard push.chunk_sent push.end_sent push.acknowledged push.ended push.replicated", chunk_sent=5),
    *drills(AGENT, "arrive.greeted arrive.begun arrive.responded arrive.unchanged_copied arrive.want_sent arrive.chunk_unchecked "
                   "arrive.chunk_verified arrive.complete arrive.published arrive.acknowledged arrive.told",
            chunk_unchecked=5, chunk_verified=5),
    *drills(AGENT, "slot.torn slot.fields_written slot.root_written slot.closed"),
    *drills(AGENT, "push.stream_joined arrive.stream_joined", "wide"),
    # The commit.
    *drills(AGENT, "commit.reporting commit.reported commit.heard commit.noted commit.slot_marked commit.marked", slot_marked=3),
    *drills(CONTROLLER, "commit.report_taken store.writing store.written commit.stored store.command_sent",
            report_taken=4, command_sent=3),
    # To files.
    *drills(AGENT, "persist.asked persist.slot_copied persist.folder_made persist.part_made persist.tensor_written persist.part_written "
                   "persist.part_synced persist.part_renamed persist.shard_written persist.ranks_found persist.manifest_written "
                   "persist.sealed persist.file_pruned persist.folder_emptied persist.reporting",
            part_made=3, part_written=3, part_synced=3, part_renamed=3, tensor_written=8, file_pruned=4),
    # A worker died: the switch to the next generation, and the restore in place.
    *drills(AGENT, "switch.begun switch.slot_surveyed switch.prepared switch.activating switch.fencing switch.fenced "
                   "switch.arenas_opened switch.worker_started switch.activated restore.word_torn restore.word_written restore.ready "
                   "repair.restored_told repair.pushed", "plain", "worker", slot_surveyed=4),
    *drills(CONTROLLER, "switch.stored store.writing store.command_sent", "plain", "worker", writing=4, command_sent=4),
    *drills(TRAINER, "capture.attached capture.opened restore.told restore.verified restore.mapped", "plain", "worker"),
    *drills(KEEPER, "keeper.remembered keeper.spawning keeper.worker_started keeper.attach_answered", "plain", "worker", remembered=2),
    # A node died: a spare takes over and fetches the state from the peer.
    *drills(AGENT, "restore.pending restore.fetch_answered restore.chunk_fetched restore.all_fetched restore.brought serve.responded "
                   "serve.chunk_sent arrive.arena_opened", "plain", "node", chunk_fetched=5, chunk_sent=5),
    *drills(KEEPER, "keeper.arena_made keeper.arena_sent", "plain", "node"),
    # The state gets larger, and with it a slot: first the trainer's, then that of the copy.
    *drills(TRAINER, "slot.file_grown slot.torn_to_move slot.extent_half_moved slot.extent_moved slot.memory_taken", "plain", "growth"),
    *drills(AGENT, "slot.file_grown slot.torn_to_move slot.extent_half_moved slot.extent_moved slot.memory_taken", "plain", "growth"),
    # A rank was killed in the middle of a capture that the other one on its node made: its bytes are copied from there.
    *drills(AGENT, "restore.chunk_copied restore.slot_copied", "pair", "pair", chunk_copied=5),
    # The job shrinks: what earlier members left is surplus.
    *drills(AGENT, "repair.surplus_dropped", "elastic", "node"),
    # A sharded job shrinks and grows: each rank puts its shard together from ranges of those that there were.
    *drills(AGENT, "ranges.table_read ranges.catalog_written ranges.request_read ranges.chunk_taken ranges.chunk_sent ranges.published",
            "ranges", "node", table_read=4, chunk_taken=4, chunk_sent=4),
    *drills(TRAINER, "ranges.asked", "ranges", "node"),
    # ... and grows again: of a newcomer's two ranks one takes the state from a peer, the other one from the first as it comes.
    *drills(AGENT, "restore.relay_opened serve.relay_responded serve.relay_chunk_sent", "crowd", "node", relay_chunk_sent=4),
    # A job that is kept by parity: who makes one, who is read, who orders; then a node died, and its shard is made anew out of what is left.
    *drills(AGENT, "parity.ordered parity.begun parity.compared parity.chunk_added parity.source_added parity.sealed parity.published parity.told "
                   "ranges.chunk_sent commit.reported commit.marked", "parity", chunk_added=6, source_added=2, chunk_sent=6, reported=4),
    *drills(CONTROLLER, "commit.report_taken commit.stored store.command_sent", "parity", report_taken=6, command_sent=6),
    *drills(AGENT, "rebuild.ordered rebuild.begun rebuild.chunk_added rebuild.source_added rebuild.sealed rebuild.published rebuild.told "
                   "ranges.chunk_sent restore.ready", "parity", "node", chunk_added=8, source_added=3, chunk_sent=6),
    *drills(CONTROLLER, "switch.stored store.written store.command_sent", "parity", "node", written=4, command_sent=6),
    # A state that the ranks capture once together: its capture; then every rank puts it together out of all shares, and captures its own anew.
    *drills(TRAINER, "capture.begun capture.published slot.bytes_copied", "shares", bytes_copied=12),
    *drills(AGENT, "push.chunk_sent arrive.published commit.slot_marked", "shares", chunk_sent=8, slot_marked=3),
    *drills(TRAINER, "ranges.asked restore.verified capture.begun slot.closed", "shares", "worker"),
    *drills(AGENT, "ranges.table_read ranges.catalog_written ranges.request_read ranges.chunk_taken ranges.published", "shares", "worker",
            table_read=4, chunk_taken=8),
    *drills(AGENT, "ranges.catalog_written ranges.chunk_taken ranges.published push.replicated", "shares", "node", chunk_taken=8),
    # Every copy in memory died.
    *drills(AGENT, "restore.file_slot_begun restore.file_read restore.file_published", "files", "nodes"),
]
SHORT = ("capture", "slot", "push", "arrive", "commit", "persist", "switch", "restore")


def labels_in_sources() -> dict[str, str]:
    """label -> file:line of every kill point. A label stands in one place."""
    found: dict[str, str] = {}
    for folder in ("checkpoint", "controller", "worker", "proto"):
        for path in sorted((ROOT / folder).rglob("*.cc")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                for label in re.findall(r'\bKillPoint\("([^"]+)"\)', line):
                    where = f"{path.relative_to(ROOT)}:{number}"
                    if label in found:
                        raise Failure(f"{label} stands in two places: {found[label]} and {where}")
                    found[label] = where
    return found


def check_table(found: dict[str, str]) -> None:
    drilled = {d.label for d in DRILLS}
    if missing := sorted(set(found) - drilled):
        raise Failure(f"no drill in tests/integration/kills.py reaches {', '.join(missing)} (the first stands in {found[missing[0]]})")
    if gone := sorted(drilled - set(found)):
        raise Failure(f"drills for points that are not in the sources: {', '.join(gone)}")


class Job:
    """A running job of the table, and its drills."""

    def __init__(self, name: str, cluster: Cluster, page: Page, draw: random.Random, limit: float) -> None:
        self.name, self.cluster, self.page, self.draw, self.limit = name, cluster, page, draw, limit
        self.spec = JOBS[name]
        self.ckpt = cluster.work / f"{name}.ckpt"
        flags = [*self.spec.get("flags", [])]
        if "files" in self.spec:
            flags += [*self.spec["files"], "--ckpt-dir", str(self.ckpt)]
        self.env = dict(self.spec["env"])
        if self.spec.get("grows"):
            self.env["GROW_FILE"] = str(cluster.work / f"{name}.grow")
        nodes = self.spec.get("nodes", 2)
        self.spares = 0 if ":" in str(nodes) else 4 - nodes
        cluster.start_job(name, nodes, self.spares, *flags, per_node=self.spec.get("per_node", 1), **self.env)
        cluster.wait_steps(0, 5, START_LIMIT)

    def settle(self) -> None:
        """Every node lives, the job runs on as many as it may, spares are warm, and what it has now is committed (and something is
        in files, where it has any), so that one more fault costs nothing."""
        deadline = time.time() + START_LIMIT
        members = self.cluster.world // self.spec.get("per_node", 1)
        newest = max(e.step for e in ledger.read(self.cluster.ledger, time.time() - 30))
        while True:
            shown = self.cluster.job() or {}
            alive = self.cluster.cli("node", "list", check=False).count("ALIVE")
            warm = int(shown.get("spares", 0))
            filed = "files" not in self.spec or int(shown.get("persisted_step", -1)) >= 0
            if (alive == 4 and warm >= self.spares and shown.get("state") == "RUNNING" and len(shown.get("members", [])) == members
                    and int(shown.get("committed_step", -1)) >= newest and filed):
                return
            if time.time() > deadline:
                raise Failure(f"{self.name} did not settle within {START_LIMIT:.0f} s: {alive} of 4 nodes alive, {warm} spares warm, "
                              f"{len(shown.get('members', []))} of {members} members, state {shown.get('state')}, "
                              f"step {shown.get('committed_step')} committed, {newest} made")
            time.sleep(0.05)

    def kill_node(self, node: str) -> None:
        send([*self.cluster.pids("agent", node), *self.cluster.pids("keeper", node)], signal.SIGKILL)

    def run(self, drill: Drill) -> str:
        """One drill. How it went, for the table."""
        self.settle()
        hit = self.draw.randint(1, drill.hits)
        began = time.time()
        tries, limit = TRIES.get(drill.job, TRIES.get(drill.label, (1, FIRE_LIMIT)))
        for attempt in range(tries):
            if attempt:
                self.cluster.wait_steps(time.time(), 3, self.limit)
                self.settle()
            self.break_and_arm(drill, hit)
            if self.fired(limit):
                break
            self.page.disarm()
        else:
            raise Failure(f"{drill.label}: {drill.program} did not reach it for the {hit}. time within {limit:.0f} s in {tries} tries in "
                          f"job {self.name}{f', fault: {drill.fault}' if drill.fault else ''}")
        victim, died = self.page.killed(), time.time()
        while lives(victim):
            if time.time() > died + FIRE_LIMIT:
                raise Failure(f"{drill.label}: pid {victim} says that it died there, and lives: {Path(f'/proc/{victim}/stat').read_text()}")
            time.sleep(0.001)
        try:
            self.cluster.wait_steps(died, 3, self.limit)
        except Failure as e:
            raise Failure(f"{drill.label} (hit {hit}, pid {victim}): {e}") from e
        went_on = time.time() - died
        self.cluster.job()
        if wrong := self.wrong():
            raise Failure(f"{drill.label} (hit {hit}, pid {victim}): {'; '.join(wrong[:3])}")
        return f"hit {hit:2d} pid {victim:7d} after {died - began:5.2f} s, three steps after {went_on:5.2f} s"

    def break_and_arm(self, drill: Drill, hit: int) -> None:
        if drill.fault == "":
            return self.page.arm(drill.label, hit, drill.program)
        if drill.fault == "growth":
            self.page.arm(drill.label, hit, drill.program)
            newest = max(e.step for e in ledger.read(self.cluster.ledger, time.time() - 30))
            with open(self.env["GROW_FILE"], "a") as file:
                file.write(f"{newest + GROWS_IN}\n")
            return None
        rank = self.draw.randrange(self.cluster.world)
        if drill.fault == "pair":
            pid = self.cluster.pids("worker", "1")
            self.page.arm("capture.table_written", 1, TRAINER, only=pid[0])
            if not self.fired(START_LIMIT):
                raise Failure("rank 1 of the pair makes no captures")
            return self.page.arm(drill.label, hit, drill.program)
        if drill.fault == "worker":
            self.page.arm(drill.label, hit, drill.program)
            return send(self.cluster.pids("worker", str(rank)), signal.SIGKILL)
        members = self.cluster.hosts()
        if drill.fault == "nodes":
            self.page.arm(drill.label, hit, drill.program)
            for node in members:
                self.kill_node(node)
            return None
        # The keeper that has the only copy left must not die as well.
        survivor = self.cluster.pids("keeper", members[1 - rank]) if len(members) == 2 else [0]
        self.page.arm(drill.label, hit, drill.program, spared=survivor[0])
        return self.kill_node(members[rank])

    def fired(self, limit: float) -> bool:
        deadline = time.time() + limit
        while time.time() < deadline:
            if self.page.killed():
                return True
            time.sleep(0.001)
        return False

    def wrong(self) -> list[str]:
        """What the ledger says against this job so far."""
        entries = ledger.read(self.cluster.ledger)
        if self.name == "files":  # more copies died than there were: steps are made again, from the newest in files
            return ledger.check(entries, [])
        if self.name in ("elastic", "crowd"):  # a step's weights depend on how many made the ones before
            return [w for w in ledger.check(entries, self.cluster.committed) if "different states" not in w]
        return ledger.check(entries, self.cluster.committed)

    def end(self) -> None:
        shown = self.cluster.end_job(self.limit)
        if shown.get("state") != "SUCCEEDED":
            raise Failure(f"{self.name} ended as {shown.get('state')}")
        if wrong := self.wrong():
            raise Failure(f"{self.name}: {'; '.join(wrong[:3])}")
        if "files" in self.spec:
            done = subprocess.run([EVERSTEP, "ckpt", "verify", str(self.ckpt)], check=False, capture_output=True, text=True, timeout=120,
                                  env=self.cluster.env)
            if done.returncode:
                raise Failure(f"{self.name}: ckpt verify: {done.stdout}{done.stderr}")
        if self.name not in ("elastic", "crowd"):
            self.compare()

    def compare(self) -> None:
        """Each step's weights with those that nobody disturbed (scripts/undisturbed.py)."""
        entries = ledger.read(self.cluster.ledger)
        last = max(e.step for e in entries)
        env = {k: v for k, v in self.cluster.env.items() if not k.startswith("EVERSTEP")} | self.env
        done = subprocess.run([sys.executable, str(UNDISTURBED), str(self.cluster.world), str(last + 1)], check=False, capture_output=True,
                              text=True, timeout=UNDISTURBED_LIMIT, env=env)
        if done.returncode:
            raise Failure(f"{UNDISTURBED.name} ended with {done.returncode}: {done.stderr[-500:]}")
        right = {int(step): int(crc) for step, crc in map(str.split, done.stdout.splitlines())}
        differ = [e for e in entries if e.crc != right[e.step]]
        if differ:
            raise Failure(f"{self.name}: the weights after step {differ[0].step} of rank {differ[0].rank}, generation {differ[0].generation}, are "
                          f"not those of the undisturbed run ({len(differ)} of {len(entries)} entries differ)")
        print(f"     {self.name}: {last + 1} steps, {len({e.generation for e in entries})} generations, each step's weights as undisturbed", flush=True)


def choose(args: argparse.Namespace, draw: random.Random) -> list[Drill]:
    if args.job:
        if unknown := set(args.job) - set(JOBS):
            raise Failure(f"no job of the table is called {', '.join(sorted(unknown))}; there are {', '.join(JOBS)}")
        return [d for d in DRILLS if d.job in args.job and (not args.only or d.label in args.only)]
    if args.only:
        chosen = [d for d in DRILLS if d.label in args.only]
        if unknown := set(args.only) - {d.label for d in chosen}:
            raise Failure(f"no kill point is called {', '.join(sorted(unknown))}; --list shows them")
        return chosen
    if args.short:
        return [draw.choice([d for d in DRILLS if d.label.startswith(phase + ".") and d.job == "plain"]) for phase in SHORT]
    return draw.sample(DRILLS, len(DRILLS))


def kills(args: argparse.Namespace, work: Path) -> None:
    draw = random.Random(args.seed)
    chosen = choose(args, draw)
    shm_before = shared_memory()
    page = Page(work / "page")
    cluster = Cluster(work, 4, {"EVERSTEP_KILL_POINTS": str(work / "page")})
    number, failed = 0, []
    try:
        try:
            for name in JOBS:
                mine = [d for d in chosen if d.job == name]
                if not mine:
                    continue
                job = Job(name, cluster, page, draw, args.limit)
                for drill in mine:
                    number += 1
                    head = f"{number:4d} {drill.label:26s} {drill.program:16s} {name:8s} {drill.fault or '-':7s}"
                    try:
                        print(head, job.run(drill), flush=True)
                    except Failure as e:
                        print(head, f"FAILED: {e}", flush=True)
                        failed.append(str(e))
                        page.disarm()
                        cluster.wait_steps(time.time(), 3, args.limit)  # the others may still be tried
                job.end()
        except Failure:
            if args.autopsy:
                cluster.autopsy()
            raise
        finally:
            if getattr(cluster, "run", None) is not None and cluster.run.poll() is None:
                cluster.run.kill()
                cluster.run.wait()
    finally:
        cluster.down()
    wrong = [f"process {pid} is left: {command[:120]}" for pid, command in cluster_processes(cluster.state).items()]
    wrong += [f"file {p} is left" for p in cluster.state.rglob("*.sock")] if cluster.state.exists() else []
    wrong += [f"file {p} is left" for p in work.glob("*.ckpt/**/.*.part")]
    wrong += [f"/dev/shm/{name} is left" for name in shared_memory() - shm_before]
    if failed or wrong:
        raise Failure("; ".join([*failed, *wrong][:5]) + (f"; {len(failed)} of {number} drills failed" if failed else ""))
    print(f"\n{number} drills at {len({d.label for d in chosen})} points of {len(labels_in_sources())}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=datetime.date.today().toordinal())
    parser.add_argument("--only", action="append", metavar="LABEL")
    parser.add_argument("--job", action="append", metavar="NAME", help="the drills of one job of the table")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--list", action="store_true", help="the points, where they stand, and who dies there")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds a recovery may take")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    parser.add_argument("--autopsy", action="store_true", help="on a failure write down every thread's stack (slow; needs gdb)")
    args = parser.parse_args()
    found = labels_in_sources()
    try:
        check_table(found)
    except Failure as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if args.list:
        for label, where in sorted(found.items()):
            who = ", ".join(f"{d.program}/{d.job}{'/' + d.fault if d.fault else ''}" for d in DRILLS if d.label == label)
            print(f"{label:26s} {where:48s} {who}")
        print(f"{len(found)} points, {len(DRILLS)} drills")
        return 0
    again = f"tests/run.sh kills --seed {args.seed}{' --short' if args.short else ''}{''.join(f' --only {label}' for label in args.only or [])}{''.join(f' --job {job}' for job in args.job or [])}"
    return verdict("kills", lambda work: kills(args, work), again, keep=args.keep)


if __name__ == "__main__":
    sys.exit(main())
