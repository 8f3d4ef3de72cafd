"""everstep-run as a person meets it: success, failures of the script, faults of the machine, bad input, signals.

The scripts import no torch, so a case costs about a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import Run, wait_for

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
