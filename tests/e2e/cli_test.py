"""`everstep` on a real cluster: up, status, drills, the story a fault leaves behind, down without a trace.

The workers import no torch; what they do is of no matter here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import PROGRAMS, clean_environment, wait_for

SCRIPTS = Path(__file__).parent / "scripts"
STEADY = SCRIPTS / "steady.py"
EVERSTEP = PROGRAMS / "everstep"


class Shell:
    """A person at a shell with a home of its own, so that no other cluster is in the way."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.env = clean_environment() | {"XDG_STATE_HOME": str(work / "s"), "PROGRESS": str(work / "progress")}
        self.runs: list[subprocess.Popen[bytes]] = []

    def run(self, *args: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(EVERSTEP), *map(str, args)], check=False, capture_output=True, text=True, timeout=seconds, env=self.env, stdin=subprocess.DEVNULL)

    def ok(self, *args: object) -> str:
        done = self.run(*args)
        assert done.returncode == 0, f"everstep {' '.join(map(str, args))}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.told()}"
        return done.stdout

    def json(self, *args: object) -> dict:
        return json.loads(self.ok(*args, "-o", "json"))

    def told(self) -> str:
        logs = sorted(self.work.rglob("*.log")) + sorted(self.work.rglob("*.out"))
        return "".join(f"--- {p}\n{p.read_text(errors='replace')[-1500:]}\n" for p in logs if p.is_file() and "db" not in p.parts)

    def submit(self, name: str, *flags: object, script: Path = STEADY) -> subprocess.Popen[bytes]:
        with (self.work / f"{name}.out").open("wb") as out:
            run = subprocess.Popen([str(EVERSTEP), "run", "--controller", self.controller(), "--name", name, "--no-preload", *map(str, flags), str(script)],
                                   stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=self.env, start_new_session=True)
        self.runs.append(run)
        wait_for(f"job {name}", lambda: self.run("job", "show", name).returncode == 0)
        self.ok("job", "wait", name, "--for", "RUNNING", "--timeout", "60s")
        return run

    def controller(self, name: str | None = None) -> str:
        clusters = self.json("cluster", "list")["items"]
        return next(c["controller"] for c in clusters if name in (None, c["name"]))

    def node(self, name: str) -> dict:
        return next(n for n in self.json("node", "list")["items"] if n["node"] == name)

    def processes(self) -> dict[int, str]:
        """What has a directory of ours in its command line or environment."""
        found = {}
        mark = str(self.work / "s").encode() + b"/"
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                zombie = entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                said = entry.joinpath("cmdline").read_bytes() + b"\0" + entry.joinpath("environ").read_bytes()
                # XDG_STATE_HOME itself (a test's own children) is no sign; a path below it is.
                if mark in said and not zombie:
                    found[int(entry.name)] = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
        return found

    def end(self) -> None:
        self.run("cluster", "down", "--all", seconds=90)
        for run in self.runs:
            if run.poll() is None:
                run.kill()
            run.wait(20)
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture
def shell() -> Iterator[Shell]:
    folder = Path(tempfile.mkdtemp(prefix="esc-", dir="/tmp"))
    shell = Shell(folder)
    yield shell
    shell.end()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(shell: Shell) -> Shell:
    shell.ok("cluster", "up", "--nodes", 3)
    return shell


def test_up_status_down_leaves_nothing(shell: Shell) -> None:
    said = shell.ok("cluster", "up", "--nodes", 3, "--name", "demo")
    assert re.match(r"cluster demo is up: controller 127\.0\.0\.1:\d+, 3 nodes, ", said)
    status = shell.json("status")
    assert [(n["node"], n["state"]) for n in status["nodes"]] == [("n0", "ALIVE"), ("n1", "ALIVE"), ("n2", "ALIVE")]
    assert status["jobs"] == []
    table = shell.ok("node", "list")
    assert table.splitlines()[0].split()[:2] == ["NODE", "STATE"] and len(table.splitlines()) == 4
    groups = {os.getpgid(int(file.read_text())) for file in (shell.work / "s/everstep/clusters/demo/nodes").glob("*/agent.pid")}
    assert len(groups) == 3, "each node has a process group of its own"
    assert len(shell.processes()) >= 8
    assert shell.ok("cluster", "down", "demo") == "cluster demo is down\n"
    assert shell.processes() == {}
    assert list((shell.work / "s").rglob("*")) == []


def test_survives_the_shell_that_started_it(shell: Shell) -> None:
    """A login shell that is hung up takes its process group and its terminal's session with it, not the cluster."""
    leader = subprocess.Popen(["setsid", "-w", "bash", "-c", f"{EVERSTEP} cluster up --nodes 1 >/dev/null 2>&1; echo up; sleep 600"], env=shell.env,
                              stdout=subprocess.PIPE, start_new_session=True, text=True)
    assert leader.stdout is not None
    assert leader.stdout.readline() == "up\n"
    sid = os.getsid(leader.pid)
    for entry in Path("/proc").iterdir():  # everything of that session hears of the hang-up, then dies
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == sid and int(entry.name) != leader.pid:
                    os.kill(int(entry.name), signal.SIGHUP)
                    os.kill(int(entry.name), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
    os.killpg(leader.pid, signal.SIGKILL)
    leader.wait(10)
    assert shell.node("n0")["state"] == "ALIVE"


def test_a_name_is_taken_once_and_the_second_cluster_must_be_named(shell: Shell) -> None:
    shell.ok("cluster", "up", "--nodes", 1, "--name", "a")
    again = shell.run("cluster", "up", "--nodes", 1, "--name", "a")
    assert again.returncode == 6 and 'a cluster named "a" runs already' in again.stderr
    shell.ok("cluster", "up", "--nodes", 1, "--name", "b", "--state-dir", shell.work / "s" / "elsewhere")
    unclear = shell.run("status")
    assert unclear.returncode == 2 and "2 local clusters run: a, b" in unclear.stderr and "--cluster a" in unclear.stderr
    assert shell.json("status", "--cluster", "b")["cluster"] == "b"
    shell.env["EVERSTEP_CLUSTER"] = "a"
    assert shell.json("status")["cluster"] == "a"
    del shell.env["EVERSTEP_CLUSTER"]
    shell.ok("cluster", "down", "b")
    assert not (shell.work / "s" / "elsewhere").exists()
    assert shell.json("status")["cluster"] == "a", "now it is the only one"


def test_a_stale_cluster_is_named_and_cleaned(cluster: Shell) -> None:
    supervisor = cluster.json("cluster", "list")["items"][0]["supervisor_pid"]
    os.kill(supervisor, signal.SIGKILL)
    wait_for("a stale cluster", lambda: cluster.json("cluster", "list")["items"][0]["state"] == "STALE")
    listed = cluster.run("cluster", "list")
    assert "everstep cluster down local" in listed.stderr
    refused = cluster.run("cluster", "up")
    assert refused.returncode == 6 and "stale" in refused.stderr
    assert cluster.ok("cluster", "down") == "cluster local is down (it was stale)\n"
    cluster.env["EVERSTEP_CLUSTER"] = "local"  # gone, and the shell still names it
    assert "usage" in cluster.ok("run", "--help").lower()
    refused = cluster.run("run", "train.py", "--help")
    assert refused.returncode != 0 and "no local cluster" in refused.stderr
    assert cluster.processes() == {}


def test_an_interrupted_up_leaves_nothing(shell: Shell) -> None:
    up = subprocess.Popen([str(EVERSTEP), "cluster", "up", "--nodes", "8"], env=shell.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for("the supervisor", lambda: any("supervise" in c for c in shell.processes().values()) or up.poll() is not None, 20)
    up.send_signal(signal.SIGINT)
    _, err = up.communicate(timeout=60)
    if up.returncode == 0:
        pytest.skip("it was up before it could be interrupted")
    assert up.returncode == 130 and "interrupted" in err
    assert shell.processes() == {}
    assert list((shell.work / "s").rglob("*")) == []


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(shell: Shell) -> None:
    taken = subprocess.Popen([sys.executable, "-c", "import socket,sys; s=socket.create_server(('127.0.0.1',0)); print(s.getsockname()[1],flush=True); sys.stdin.read()"],
                             stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert taken.stdout is not None
    port = taken.stdout.readline().strip()
    try:
        up = shell.run("cluster", "up", "--nodes", 1, "--listen", f"127.0.0.1:{port}")
    finally:
        taken.communicate("")
    assert up.returncode == 1
    assert "everstep-controller exited with code" in up.stderr and port in up.stderr
    assert shell.processes() == {}
    assert list((shell.work / "s").rglob("*")) == []


def test_the_same_reason_everywhere(cluster: Shell) -> None:
    """One node dies: status, job show, events and the run's own lines have one code for it."""
    run = cluster.submit("train", "--nnodes", 2, "--spares", 1, "--nproc-per-node", 1)
    members = cluster.json("job", "show", "train")["members"]
    said = cluster.ok("cluster", "kill", "node", members[1])
    assert said.startswith(f"killed {members[1]}: agent ") and "it comes back in 5.0s" in said
    wait_for("the recovery", lambda: any(f["recovery_seconds"] >= 0 for f in cluster.json("job", "show", "train")["faults"]))
    cluster.ok("job", "wait", "train", "--for", "RUNNING", "--timeout", "60s")
    job = cluster.json("job", "show", "train")
    reason = job["faults"][-1]["reason"]
    assert reason in ("node_died", "node_lost") and members[1] in job["faults"][-1]["subject"]
    assert job["reason"] == reason
    assert next(j for j in cluster.json("status")["jobs"] if j["job"] == "train")["reason"] == reason
    assert members[1] not in job["members"]
    events = [json.loads(line) for line in cluster.ok("events", "--job", "train", "--reason", reason, "-o", "jsonl").splitlines()]
    assert {"fault", "generation_running"} <= {e["type"] for e in events}
    assert any(e["evidence"] == job["faults"][-1]["evidence"] for e in events)
    lost = [json.loads(line) for line in cluster.ok("events", "--node", members[1], "--type", "node_lost", "-o", "jsonl").splitlines()]
    assert [e["reason"] for e in lost] == [reason]
    assert f" {reason} " in cluster.ok("job", "show", "train")
    wait_for("the node's return", lambda: cluster.node(members[1])["state"] == "ALIVE", 20)
    Path(cluster.env["PROGRESS"] + ".end").touch()
    assert run.wait(60) == 0
    assert reason in (cluster.work / "train.out").read_text()
    assert cluster.ok("job", "wait", "train", "--timeout", "30s").startswith("job train is SUCCEEDED")


@pytest.mark.parametrize(("kill", "reason"), [(("worker", "train", "1"), "worker_killed"), (("keeper", "MEMBER"), "keeper_died")])
def test_the_same_reason_everywhere_without_a_lost_node(cluster: Shell, kill: tuple[str, ...], reason: str) -> None:
    """A worker, then a keeper: one code in job show, status, events, the run's lines and its summary; one account that pays."""
    run = cluster.submit("train", "--nnodes", 2, "--nproc-per-node", 1)
    member = cluster.json("job", "show", "train")["members"][1]
    cluster.ok("cluster", "kill", *(member if word == "MEMBER" else word for word in kill))
    wait_for("the recovery", lambda: any(f["recovery_seconds"] >= 0 for f in cluster.json("job", "show", "train")["faults"]))
    cluster.ok("job", "wait", "train", "--for", "RUNNING", "--timeout", "60s")
    job = cluster.json("job", "show", "train")
    assert [f["reason"] for f in job["faults"]] == [reason] and member in job["faults"][0]["subject"]
    assert (job["reason"], job["lost_capacity"], job["restarts"]) == (reason, 1, 0)
    assert next(j for j in cluster.json("status")["jobs"] if j["job"] == "train")["reason"] == reason
    events = [json.loads(line) for line in cluster.ok("events", "--job", "train", "--reason", reason, "-o", "jsonl").splitlines()]
    assert {"fault", "generation_running"} <= {e["type"] for e in events}
    assert next(e for e in events if e["type"] == "fault")["evidence"] == job["faults"][0]["evidence"]
    Path(cluster.env["PROGRESS"] + ".end").touch()
    assert run.wait(60) == 0
    said = (cluster.work / "train.out").read_text()
    assert f"{job['faults'][0]['subject']}: {reason} (" in said, "as it happened"
    assert "1 fault in this run (0 restarts charged to the script, 1 not)" in said and f"  {job['faults'][0]['subject']}: {reason}; restart in place" in said


def test_agents_and_controllers_come_back_under_a_running_job(cluster: Shell) -> None:
    run = cluster.submit("train", "--nnodes", 2, "--nproc-per-node", 1)
    before = cluster.json("job", "show", "train")
    controller = cluster.controller()
    assert "it is started again at once" in cluster.ok("cluster", "kill", "agent", before["members"][0])
    wait_for("the agent's return", lambda: cluster.node(before["members"][0])["agent_restarts"] == 1)
    cluster.ok("cluster", "kill", "controller", "--for", "ever")
    away = cluster.run("status", "--timeout", "300ms")
    assert away.returncode == 5 and f"no controller answers at {controller} (the only local cluster, local)" in away.stderr
    cluster.ok("cluster", "start", "controller")
    wait_for("every node", lambda: all(n["state"] == "ALIVE" for n in cluster.json("node", "list")["items"]))
    assert cluster.controller() == controller
    after = cluster.json("job", "show", "train")
    assert after["generation"] == before["generation"] and after["faults"] == []
    assert [r["pid"] for r in after["ranks"]] == [r["pid"] for r in before["ranks"]], "the workers never noticed"
    assert cluster.json("status")["starts"] == "2"
    # Nobody calls it a fault, everybody names it.
    assert (after["lost_capacity"], after["restarts"], after["reason"]) == (0, 0, before["reason"])
    assert {n["reason"] for n in cluster.json("node", "list")["items"]} == {"reattached"}
    events = [json.loads(line) for line in cluster.ok("events", "-o", "jsonl").splitlines()]
    assert {"node_suspect", "node_reattached"} <= {e["type"] for e in events if e["node"] == before["members"][0]}
    assert [e["reason"] for e in events if e["type"] == "controller_recovered"] == ["controller_restarted"]
    assert not [e for e in events if e["type"] == "fault"]
    Path(cluster.env["PROGRESS"] + ".end").touch()
    assert run.wait(60) == 0
    assert " fault" not in (cluster.work / "train.out").read_text()


def test_worker_drills_logs_drain_and_cancel(cluster: Shell) -> None:
    run = cluster.submit("train", "--nnodes", 2, "--nproc-per-node", 1)
    victim = cluster.json("job", "show", "train")["ranks"][1]
    assert cluster.ok("cluster", "kill", "worker", "train", 1) == f"killed rank 1 of job train on {victim['node']}: worker {victim['pid']} (SIGKILL)\n"
    wait_for("generation 2", lambda: int(cluster.json("job", "show", "train")["generation"]) >= 2)
    cluster.ok("job", "wait", "train", "--for", "running", "--timeout", "30s")
    assert cluster.json("job", "show", "train")["faults"][0]["reason"] == "worker_killed"

    cluster.ok("cluster", "pause", "worker", "train", 0)
    wait_for("the stopped worker's replacement", lambda: cluster.json("job", "show", "train")["faults"][-1]["reason"] == "worker_stopped")
    cluster.ok("job", "wait", "train", "--for", "running", "--timeout", "30s")

    refused = cluster.run("node", "drain", "n0")
    assert refused.returncode == 2 and "--reason" in refused.stderr
    member = cluster.json("job", "show", "train")["members"][0]
    cluster.ok("node", "drain", member, "--reason", "memory errors")
    wait_for("the move", lambda: member not in cluster.json("job", "show", "train")["members"])
    drained = cluster.node(member)
    assert drained["state"] in ("DRAINING", "DRAINED") and not any(j.endswith(":spare") for j in drained["jobs"])
    assert (drained["reason"], drained["evidence"]) == ("node_drained", "memory errors") and drained["since"]
    cluster.ok("node", "undrain", member)
    assert cluster.node(member)["state"] == "ALIVE"

    cluster.ok("job", "wait", "train", "--for", "running", "--timeout", "30s")
    cancelled = cluster.json("job", "cancel", "train", "--reason", "enough", "--wait")
    assert cancelled["state"] == "CANCELLED"
    assert run.wait(60) == 1
    said = (cluster.work / "train.out").read_text()
    assert f"logs: everstep logs --controller {cluster.controller()} train" in said and "exit code 1: the run was cancelled" in said
    waited = cluster.run("job", "wait", "train")
    assert waited.returncode == 1 and "CANCELLED" in waited.stderr
    again = cluster.run("job", "cancel", "train")
    assert again.returncode == 6
    assert cluster.ok("job", "cancel", "train", "--forget") == "job train is forgotten\n"
    assert cluster.run("job", "show", "train").returncode == 3
    cluster.submit("train", "--nnodes", 2, "--nproc-per-node", 1)
    assert int(cluster.json("job", "show", "train")["generation"]) > int(cancelled["generation"]), "numbers only grow"
    assert cluster.ok("job", "cancel", "train", "--forget") == "job train is forgotten\n", "of one that runs, too"
    assert cluster.json("job", "list")["items"] == []


def test_logs_of_ranks(cluster: Shell) -> None:
    script = cluster.work / "says.py"
    script.write_text("import os, sys, time\nrank = os.environ['RANK']\nfor i in range(3): print(f'line {i} of {rank}', flush=True)\n"
                      "print(f'trouble of {rank}', file=sys.stderr, flush=True)\n"
                      "while not os.path.exists(os.environ['PROGRESS'] + '.end'): time.sleep(0.02)\n")
    run = cluster.submit("talk", "--nnodes", 2, "--nproc-per-node", 1, script=script)
    wait_for("all lines", lambda: "trouble of 1" in cluster.ok("logs", "talk"))
    one = cluster.ok("logs", "talk", "--rank", 1)
    assert sorted(one.splitlines()) == ["line 0 of 1", "line 1 of 1", "line 2 of 1", "trouble of 1"]
    both = cluster.ok("logs", "talk", "-n", 1).splitlines()
    assert sorted(both) == ["[0] line 2 of 0", "[0] trouble of 0", "[1] line 2 of 1", "[1] trouble of 1"]
    lines = [json.loads(line) for line in cluster.ok("logs", "talk", "-r", 0, "-o", "jsonl").splitlines()]
    assert {(one["stream"], one["line"]) for one in lines} >= {("stdout", "line 2 of 0"), ("stderr", "trouble of 0")}
    missing = cluster.run("logs", "talk", "--rank", 2)
    assert missing.returncode == 3 and "its ranks are 0 to 1" in missing.stderr
    Path(cluster.env["PROGRESS"] + ".end").touch()
    assert run.wait(60) == 0
    said = (cluster.work / "talk.out").read_text()
    assert all(f"line {i} of {rank}\n" in said for i in range(3) for rank in range(2)), said
    assert sorted(cluster.ok("logs", "talk", "-n", 1).splitlines()) == sorted(both), "they outlive the job"


def test_a_job_that_is_over_at_once_is_heard(cluster: Shell) -> None:
    """Whoever follows asks before, while or after its workers start; no line is lost or said twice."""
    script = cluster.work / "quick.py"
    script.write_text("import os\nprint('hello from', os.environ['RANK'])\n")
    for i in range(8):
        run = subprocess.run([str(EVERSTEP), "--cluster", "local", "run", "--name", f"q{i}", "--no-preload", "--nnodes", "2", "--nproc-per-node", "1", str(script)],
                             check=False, capture_output=True, text=True, env=cluster.env, timeout=90, stdin=subprocess.DEVNULL)
        assert run.returncode == 0, run.stderr
        assert sorted(run.stdout.splitlines()) == ["hello from 0", "hello from 1"], f"run {i}: {run.stdout}{run.stderr}"


def test_events_follow_across_a_restart_of_the_controller(cluster: Shell) -> None:
    with (cluster.work / "events.jsonl").open("w") as out:
        watch = subprocess.Popen([str(EVERSTEP), "events", "-w", "-o", "jsonl"], stdout=out, env=cluster.env)
    try:
        def seen() -> list[dict]:
            return [json.loads(line) for line in (cluster.work / "events.jsonl").read_text().splitlines()]

        wait_for("the first events", lambda: len(seen()) >= 3)
        cluster.ok("cluster", "kill", "controller")
        wait_for("every node", lambda: cluster.run("node", "list", "-o", "jsonl").stdout.count('"ALIVE"') == 3)
        cluster.ok("node", "drain", "n1", "--reason", "drill")
        wait_for("news after the restart", lambda: any(e["node"] == "n1" and "drain" in e["type"] for e in seen()))
        numbers = [int(e["sequence"]) for e in seen()]
        assert numbers == sorted(set(numbers)), "none twice, none out of order"
        assert watch.poll() is None
    finally:
        watch.terminate()
        watch.wait(10)


def test_pause_for_a_while(cluster: Shell) -> None:
    began = time.monotonic()
    said = cluster.ok("cluster", "pause", "controller", "--for", "600ms")
    assert time.monotonic() - began >= 0.6
    assert [line.split()[0] for line in said.splitlines()] == ["paused", "resumed"]
    assert all(n["state"] == "ALIVE" for n in cluster.json("node", "list")["items"]), "nobody is lost for a controller's nap"
    cluster.ok("cluster", "pause", "node", "n2")
    wait_for("the loss", lambda: cluster.node("n2")["state"] == "LOST", 30)
    cluster.ok("cluster", "resume", "node", "n2")
    wait_for("the return", lambda: cluster.node("n2")["state"] == "ALIVE", 30)


def test_drills_on_what_is_not_there(cluster: Shell) -> None:
    unknown = cluster.run("cluster", "kill", "node", "n7")
    assert unknown.returncode == 3 and 'cluster local has no node "n7"' in unknown.stderr
    cluster.ok("cluster", "kill", "node", "n1", "--for", "ever")
    twice = cluster.run("cluster", "kill", "agent", "n1")
    assert twice.returncode == 6 and "everstep cluster start n1" in twice.stderr
    assert "n1 is started" in cluster.ok("cluster", "start", "n1")
    running = cluster.run("cluster", "start", "n1")
    assert running.returncode == 6 and "n1 runs already" in running.stderr
    wait_for("its return", lambda: cluster.node("n1")["state"] == "ALIVE")


def test_completion_knows_jobs_and_nodes(cluster: Shell) -> None:
    assert cluster.ok("__complete", "node", "show", "").split() == ["n0", "n1", "n2"]
    script = cluster.ok("completion", "bash")
    typed = f'{script}\nCOMP_WORDS=(everstep node drain n0 ""); COMP_CWORD=4; _everstep; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", typed], check=True, capture_output=True, text=True, env=cluster.env | {"PATH": f"{PROGRAMS}:{os.environ['PATH']}"})
    assert done.stdout.split() == ["n0", "n1", "n2"], done.stderr


def test_version_is_quick() -> None:
    best = 1.0
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([str(EVERSTEP), "version"], check=True, stdout=subprocess.DEVNULL)
        best = min(best, time.perf_counter() - began)
    assert best < 0.25, "it loads what it does not need"
