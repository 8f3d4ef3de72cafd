"""everstep-run as a person meets it: success, failures of the script, faults of the machine, bad input, signals.

The scripts import no torch, so a case costs about a second.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import PROGRAMS, RUN, Run, clean_environment, wait_for

SCRIPTS = Path(__file__).parent / "scripts"
STEADY, PROBE = SCRIPTS / "steady.py", SCRIPTS / "probe.py"


@pytest.fixture
def work() -> Iterator[Path]:
    """Short, since a socket's path is below it."""
    folder = Path(tempfile.mkdtemp(prefix="esr-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


class Steady:
    """A run of steady.py and what its workers write."""

    def __init__(self, work: Path, *flags: object, env: dict[str, str] | None = None, workers: int = 2) -> None:
        self.progress = work / "progress"
        self.run = Run(work, "--standalone", "--nproc-per-node", workers, *flags, STEADY, env={"PROGRESS": str(self.progress)} | (env or {}))

    def lines(self) -> list[tuple[int, int, int, int]]:
        if not self.progress.exists():
            return []
        whole = self.progress.read_text().splitlines()
        return [tuple(map(int, words)) for line in whole if len(words := line.split()) == 4]  # type: ignore[misc]

    def newest(self, rank: int) -> tuple[int, int, int, int] | None:
        return next((line for line in reversed(self.lines()) if line[1] == rank), None)

    def wait_for_steps(self, steps: int = 5, ranks: int = 2, generation: int = 1) -> None:
        """Every rank made `steps` steps in `generation` or a later one."""

        def there() -> bool:
            assert self.run.process.poll() is None, self.run.told()
            return all((last := self.newest(r)) is not None and last[3] >= generation and last[0] >= steps for r in range(ranks))

        try:
            wait_for(f"{ranks} ranks at step {steps} of generation {generation}", there)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.run.told()}") from None

    def finish(self) -> int:
        Path(f"{self.progress}.end").touch()
        return self.run.wait()


def probe(work: Path, *flags: object, **env: str) -> Run:
    (work / "facts").mkdir(exist_ok=True)
    return Run(work, "--standalone", *flags, PROBE, env={"FACTS": str(work / "facts")} | env)


def test_a_success_is_silent_and_leaves_nothing(work: Path) -> None:
    run = probe(work, "--nproc-per-node", "2")
    assert run.wait() == 0, run.told()
    assert sorted(run.stdout().splitlines()) == ["out of rank 0", "out of rank 1"]
    assert sorted(run.stderr().splitlines()) == ["err of rank 0", "err of rank 1"]
    run.assert_nothing_left()
    left = {p.name for p in run.state.rglob("*")}
    assert not left & {"keeper.sock", "agent.pid", "keeper.pid", "db", "pid", "address"}, left


def test_a_state_directory_of_its_own_is_gone_after_a_success(work: Path) -> None:
    before = set(Path("/tmp").glob("everstep-*"))
    run = Run(work, "--standalone", PROBE, env={"FACTS": str(work), "TMPDIR": str(work / "t")})
    assert run.wait() == 0, run.told()
    assert set(Path("/tmp").glob("everstep-*")) <= before


def test_an_exit_code_of_the_script_is_reported(work: Path) -> None:
    run = probe(work, "--max-restarts", "0", ENDING="exit3")
    assert run.wait() == 1, run.told()
    assert "exitcode  : 3" in run.stderr()
    assert "restarts_exhausted" in run.stderr() or "crash_at_start" in run.stderr()
    run.assert_nothing_left()


def test_an_exception_under_record_shows_its_traceback(work: Path) -> None:
    run = probe(work, "--nproc-per-node", "2", "--max-restarts", "0", ENDING="record", ENDING_RANKS="1")
    assert run.wait() == 1, run.told()
    report = run.stderr()[run.stderr().index("Root Cause"):]
    assert "rank      : 1 (local_rank: 1)" in report
    assert "ValueError: boom" in report
    assert "probe.py" in report
    run.assert_nothing_left()


def test_a_killed_worker_costs_a_restart_of_nobody_else_s_budget(work: Path) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    victim = steady.newest(1)
    assert victim is not None
    os.kill(victim[2], signal.SIGKILL)
    steady.wait_for_steps(generation=victim[3] + 1)
    assert steady.finish() == 0, steady.run.told()
    told = steady.run.stderr()
    assert "rank 1" in told
    assert "worker_killed" in told
    assert "recovered in" in told
    assert "1 fault in this run (0 restarts charged to the script, 1 not)" in told
    steady.run.assert_nothing_left()


def test_a_script_that_is_always_killed_ends_without_advice_to_requeue(work: Path) -> None:
    run = probe(work, ENDING="signal9")
    assert run.wait() == 93, run.told()
    assert "no_progress" in run.stderr()
    assert "do not requeue" in run.stderr()
    run.assert_nothing_left()


def test_a_killed_agent_is_replaced_and_the_workers_run_on(work: Path) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    before = {line[2] for line in steady.lines()}
    old = steady.run.pid_of("agent")
    assert old, steady.run.told()
    os.kill(old, signal.SIGKILL)
    wait_for("a new agent", lambda: steady.run.pid_of("agent") not in (0, old))
    seen = len(steady.lines())
    wait_for("more steps", lambda: len(steady.lines()) > seen + 20)
    assert steady.finish() == 0, steady.run.told()
    assert {line[2] for line in steady.lines()} == before, "a worker was restarted"
    assert "everstep-agent was ended by signal 9 (SIGKILL)" in steady.run.stderr()
    steady.run.assert_nothing_left()


def test_a_killed_controller_is_replaced_and_the_workers_run_on(work: Path) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    before = {line[2] for line in steady.lines()}
    old = steady.run.pid_of("controller")
    assert old, steady.run.told()
    os.kill(old, signal.SIGKILL)
    wait_for("a new controller", lambda: steady.run.pid_of("controller") not in (0, old))
    seen = len(steady.lines())
    wait_for("more steps", lambda: len(steady.lines()) > seen + 20)
    assert steady.finish() == 0, steady.run.told()
    assert {line[2] for line in steady.lines()} == before, "a worker was restarted"
    steady.run.assert_nothing_left()


def test_a_killed_keeper_is_a_fault_that_is_recovered(work: Path) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    old = steady.run.pid_of("keeper")
    assert old, steady.run.told()
    os.kill(old, signal.SIGKILL)
    steady.wait_for_steps(generation=2)
    assert steady.finish() == 0, steady.run.told()
    assert "keeper_died" in steady.run.stderr() or "node_" in steady.run.stderr(), steady.run.told()
    steady.run.assert_nothing_left()


def test_a_killed_launcher_takes_everything_along(work: Path) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    workers = {line[2] for line in steady.lines()}
    os.kill(steady.run.process.pid, signal.SIGKILL)
    steady.run.assert_nothing_left()
    wait_for("the workers' end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 15)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_workers_in_order(work: Path, number: signal.Signals) -> None:
    goodbye = work / "goodbye"
    steady = Steady(work, env={"GOODBYE": str(goodbye)})
    steady.wait_for_steps()
    os.kill(steady.run.process.pid, number)
    assert steady.run.wait(30) == 1, steady.run.told()
    assert sorted(goodbye.read_text().splitlines()) == [f"0 {signal.SIGTERM.value}", f"1 {signal.SIGTERM.value}"]
    assert number.name in steady.run.stderr()
    assert "cancelled" in steady.run.stderr().lower()
    steady.run.assert_nothing_left()


def test_a_second_signal_does_not_wait(work: Path) -> None:
    steady = Steady(work, env={"IGNORE_TERM": "1"})
    steady.wait_for_steps()
    os.kill(steady.run.process.pid, signal.SIGINT)
    wait_for("the first answer", lambda: "SIGINT: stopping" in steady.run.stderr())
    os.kill(steady.run.process.pid, signal.SIGINT)
    assert steady.run.wait(10) == 1, steady.run.told()
    steady.run.assert_nothing_left()


def test_a_worker_that_ignores_sigterm_is_killed_after_the_shutdown_timeout(work: Path) -> None:
    steady = Steady(work, "--shutdown-timeout", "1", env={"IGNORE_TERM": "1"})
    steady.wait_for_steps()
    os.kill(steady.run.process.pid, signal.SIGTERM)
    assert steady.run.wait(20) == 1, steady.run.told()
    steady.run.assert_nothing_left()


# --- bad input: one sentence, the documented code, nothing started ---


def refused(work: Path, *arguments: object, code: int, words: list[str]) -> None:
    run = Run(work, *arguments)
    assert run.wait(30) == code, run.told()
    for word in words:
        assert word in run.stderr(), run.told()
    assert "Traceback" not in run.stderr()
    run.assert_nothing_left()


def test_an_unknown_flag(work: Path) -> None:
    refused(work, "--standalone", "--nproc-per-nod3", "2", PROBE, code=2, words=["--nproc-per-nod3", "--help"])
    assert not (work / "s").exists()


def test_a_missing_script(work: Path) -> None:
    refused(work, "--standalone", "nowhere.py", code=2, words=["nowhere.py", str(work), "-m"])
    assert not (work / "s").exists()


def test_a_missing_interpreter(work: Path) -> None:
    run = Run(work, "--standalone", PROBE, env={"PYTHON_EXEC": "/nowhere/python"})
    assert run.wait(30) == 2, run.told()
    assert "PYTHON_EXEC=/nowhere/python" in run.stderr()


def test_a_port_in_use(work: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(work, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", PROBE, code=1, words=[f"127.0.0.1:{port}", "in use"])


def test_a_state_directory_that_cannot_be_made(work: Path) -> None:
    (work / "file").write_text("")
    refused(work, "--standalone", "--state-dir", work / "file" / "s", PROBE, code=1, words=[str(work / "file" / "s"), "--state-dir"])


def test_a_state_directory_on_a_read_only_file_system(work: Path) -> None:
    refused(work, "--standalone", "--state-dir", "/sys/everstep", PROBE, code=1, words=["/sys/everstep", "--state-dir"])


def test_a_full_disk(work: Path) -> None:
    disk = work / "d"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (root and CAP_SYS_ADMIN)")
    try:
        refused(work, "--standalone", "--state-dir", disk / "s", PROBE, code=1, words=["--state-dir"])
        with (disk / "fill").open("wb") as fill:  # now not even an error's text has room
            try:
                fill.write(b"x" * 65536)
                fill.flush()
            except OSError:
                pass
        refused(work, "--standalone", "--state-dir", disk / "s", PROBE, code=1, words=["--state-dir"])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_state_directory_whose_socket_would_be_too_long(work: Path) -> None:
    refused(work, "--standalone", "--state-dir", work / ("d" * 100), PROBE, code=1, words=["107", "--state-dir"])


def test_a_state_directory_of_another_run(work: Path) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    second = Run(work, "--standalone", "--state-dir", steady.run.state, PROBE, name="second")
    assert second.wait(30) == 1, second.told()
    assert "in use by another run" in second.stderr()
    assert steady.finish() == 0, steady.run.told()


def test_a_state_directory_of_a_cluster(work: Path) -> None:
    (work / "c" / "controller").mkdir(parents=True)
    (work / "c" / "controller" / "db").write_text("precious")
    refused(work, "--standalone", "--state-dir", work / "c", PROBE, code=1, words=["cluster", "--controller"])
    assert (work / "c" / "controller" / "db").read_text() == "precious"


def test_a_controller_that_is_not_there(work: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    refused(work, "--controller", address, PROBE, code=1, words=[address, "does not answer"])


def test_an_environment_that_is_too_large(work: Path) -> None:
    big = {f"BIG_{i}": "x" * 120_000 for i in range(10)}
    run = Run(work, "--standalone", PROBE, env=big)
    assert run.wait(30) == 2, run.told()
    assert "1048576" in run.stderr()


# --- programs that are stopped, not dead ---


@pytest.mark.parametrize("program", ["agent", "controller"])
def test_a_stopped_program_is_replaced_and_the_workers_run_on(work: Path, program: str) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    before = {line[2] for line in steady.lines()}
    old = steady.run.pid_of(program)
    assert old, steady.run.told()
    os.kill(old, signal.SIGSTOP)
    wait_for(f"a new {program}", lambda: steady.run.pid_of(program) not in (0, old), 20)
    assert f"everstep-{program} is stopped (SIGSTOP)" in steady.run.stderr()
    seen = len(steady.lines())
    wait_for("more steps", lambda: len(steady.lines()) > seen + 20)
    assert steady.finish() == 0, steady.run.told()
    if program == "controller":  # a stopped agent's node is lost before it is replaced
        assert {line[2] for line in steady.lines()} == before, "a worker was restarted"
    steady.run.assert_nothing_left()


def test_a_stopped_worker_is_named_and_restarted(work: Path) -> None:
    steady = Steady(work)
    steady.wait_for_steps()
    victim = steady.newest(1)
    assert victim is not None
    os.kill(victim[2], signal.SIGSTOP)
    steady.wait_for_steps(generation=victim[3] + 1)
    assert steady.finish() == 0, steady.run.told()
    assert "worker_stopped" in steady.run.stderr(), steady.run.told()
    steady.run.assert_nothing_left()


# --- on a terminal ---


def test_on_a_terminal_one_live_line_is_redrawn_and_goes(work: Path) -> None:
    leader, follower = os.openpty()
    process = subprocess.Popen([str(RUN), "--state-dir", str(work / "s"), "--standalone", str(STEADY)], stdin=subprocess.DEVNULL, stdout=follower, stderr=follower,
                               env=clean_environment() | {"PROGRESS": str(work / "progress")}, start_new_session=True)
    os.close(follower)
    shown = b""

    def read() -> bytes:
        nonlocal shown
        if select.select([leader], [], [], 0.1)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # the other end is closed
                pass
        return shown

    try:
        wait_for("a live line", lambda: b"RUNNING  1 worker on 1 node" in read())
        (work / "progress.end").touch()
        wait_for("the end", lambda: (read(), process.poll() is not None)[1])
        read()
        assert process.returncode == 0, shown
        assert b"rank 0 of 1 finished\r\n" in shown
        assert shown.endswith(b"\r\x1b[K"), shown[-200:]
    finally:
        process.kill()
        process.wait(10)
        os.close(leader)


# --- on a standing cluster ---


class Cluster:
    """A controller and agents as separate processes, without a launcher."""

    def __init__(self, work: Path, nodes: int) -> None:
        self.work, self.processes = work / "c", []
        address = self.work / "controller" / "address"
        self.start("everstep-controller", "--listen", "127.0.0.1:0", "--state-dir", self.work / "controller", "--address-file", address)
        self.address = wait_for("the controller", lambda: address.read_text().strip() if address.exists() else "")
        for i in range(nodes):
            self.start("everstep-agent", "--node", f"n{i}", "--state-dir", self.work, "--controller", self.address, "--leave-timeout", "0")
        logs = [self.work / "nodes" / f"n{i}" / "agent.log" for i in range(nodes)]
        wait_for("the nodes", lambda: all(log.exists() and " registered " in log.read_text() for log in logs))

    def start(self, program: str, *arguments: object) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / f"{program}.out").open("ab") as out:
            self.processes.append(subprocess.Popen([str(PROGRAMS / program), *map(str, arguments)], env=clean_environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out))

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture
def cluster(work: Path) -> Iterator[Cluster]:
    cluster = Cluster(work, 2)
    yield cluster
    cluster.stop()


def test_a_cluster_runs_the_job_and_its_output_comes_back(work: Path, cluster: Cluster) -> None:
    (work / "facts").mkdir()
    run = Run(work, "--controller", cluster.address, "--nnodes", "2", "--nproc-per-node", "2", PROBE, env={"FACTS": str(work / "facts")})
    assert run.wait() == 0, run.told()
    assert sorted(run.stdout().splitlines()) == [f"out of rank {r}" for r in range(4)], run.told()
    assert sorted(run.stderr().splitlines()) == [f"err of rank {r}" for r in range(4)], run.told()
    assert len(list((work / "facts").glob("*.json"))) == 4
    assert not run.state.exists(), "a run on a cluster needs no directory of its own"


def test_a_cluster_s_job_that_fails_tells_why(work: Path, cluster: Cluster) -> None:
    run = Run(work, "--controller", cluster.address, "--nnodes", "2", "--max-restarts", "0", PROBE, env={"FACTS": str(work), "ENDING": "record", "ENDING_RANKS": "1"})
    assert run.wait() == 1, run.told()
    assert "ValueError: boom" in run.stderr()
    assert "rank      : 1 (local_rank: 0)" in run.stderr()


def test_a_signal_cancels_the_job_on_the_cluster(work: Path, cluster: Cluster) -> None:
    progress = work / "progress"
    run = Run(work, "--controller", cluster.address, "--nnodes", "2", STEADY, env={"PROGRESS": str(progress)})
    wait_for("steps", lambda: progress.exists() and len(progress.read_text().splitlines()) > 20)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait(30) == 1, run.told()
    size = len(progress.read_text())
    again = Run(work, "--controller", cluster.address, PROBE, name="again", env={"FACTS": str(work)})
    assert again.wait() == 0, again.told()
    assert len(progress.read_text()) == size, "workers of a cancelled job ran on"


def test_the_same_name_twice_is_refused(work: Path, cluster: Cluster) -> None:
    first = Run(work, "--controller", cluster.address, "--name", "twin", STEADY, env={"PROGRESS": str(work / "progress")})
    wait_for("steps", lambda: (work / "progress").exists())
    second = Run(work, "--controller", cluster.address, "--name", "twin", STEADY, name="second")
    assert second.wait(30) == 1, second.told()
    assert "twin" in second.stderr()
    (work / "progress.end").touch()
    assert first.wait() == 0, first.told()
