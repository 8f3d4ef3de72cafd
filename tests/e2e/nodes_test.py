"""One launcher a node, as a torchrun command line for several machines has it; all nodes are of this machine here."""

from __future__ import annotations

import json
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
    folder = Path(tempfile.mkdtemp(prefix="esn-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Nodes:
    """`count` launchers of one job. The first one started owns the endpoint."""

    def __init__(self, work: Path, count: int, *flags: object, nnodes: str, static: bool = False, script: Path = STEADY, env: dict[str, str] | None = None) -> None:
        self.progress = work / "progress"
        port = free_port()
        self.runs: list[Run] = []
        for i in range(count):
            if static:
                meet = ["--nnodes", nnodes, "--node-rank", i, "--master-addr", "127.0.0.1", "--master-port", port]
            else:
                meet = ["--nnodes", nnodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job7"]
            self.runs.append(Run(work, *meet, *flags, script, name=f"n{i}", env={"PROGRESS": str(self.progress), "FACTS": str(work)} | (env or {})))
            if i == 0:
                wait_for("the controller", lambda: self.runs[0].pid_of("controller"))

    def told(self) -> str:
        return "\n".join(f"=== node {i}\n{run.told()}" for i, run in enumerate(self.runs))

    def lines(self) -> list[tuple[int, int, int, int]]:
        if not self.progress.exists():
            return []
        whole = self.progress.read_text().splitlines()
        return [tuple(map(int, words)) for line in whole if len(words := line.split()) == 4]  # type: ignore[misc]

    def wait_for_world(self, ranks: int, generation: int = 1, seconds: float = 60) -> int:
        """Some generation from `generation` on has exactly ranks 0 .. ranks-1, each at step 5 or later. Returns it."""

        def newest() -> int:
            lines = self.lines()
            top = max((line[3] for line in lines), default=0)
            steps = {line[1]: line[0] for line in lines if line[3] == top}
            return top if top >= generation and set(steps) == set(range(ranks)) and min(steps.values()) >= 5 else 0

        try:
            return wait_for(f"{ranks} ranks in generation {generation} or later", newest, seconds)
        except AssertionError as e:
            raise AssertionError(f"{e}\n{self.told()}") from None

    def pids_of(self, run: Run) -> list[int]:
        return [run.process.pid, *run.processes()]

    def kill(self, run: Run) -> None:
        """A whole node at once."""
        for pid in self.pids_of(run):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        run.process.wait(10)

    def finish(self, but: Run | None = None) -> None:
        Path(f"{self.progress}.end").touch()
        for run in self.runs:
            if run is not but:
                assert run.wait(60) == 0, self.told()
                run.assert_nothing_left()

    def stop(self) -> None:
        for run in self.runs:
            run.stop()


@pytest.mark.parametrize("static", [False, True], ids=["c10d", "static"])
def test_a_torchrun_command_line_for_two_nodes(work: Path, static: bool) -> None:
    nodes = Nodes(work, 2, "--nproc-per-node", 2, nnodes="2", static=static)
    try:
        nodes.wait_for_world(4)
        nodes.finish()
        for run in nodes.runs:  # each shows its own workers
            assert len([line for line in run.stdout().splitlines() if line.endswith("of 4 finished")]) == 2, nodes.told()
    finally:
        nodes.stop()


def test_each_node_keeps_its_own_environment_and_folder(work: Path) -> None:
    port = free_port()
    runs = []
    try:
        for i in range(2):
            (work / f"folder{i}").mkdir()
            (work / f"facts{i}").mkdir()
            runs.append(Run(work, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", PROBE, f"argument{i}", name=f"n{i}",
                            cwd=work / f"folder{i}", env={"FACTS": str(work / f"facts{i}"), "CUDA_VISIBLE_DEVICES": str(i)}))
            if i == 0:
                wait_for("the controller", lambda: runs[0].pid_of("controller"))
        for run in runs:
            assert run.wait(60) == 0, run.told()
        for i in range(2):
            (file,) = (work / f"facts{i}").glob("*.json")
            facts = json.loads(file.read_text())
            assert facts["directory"] == str(work / f"folder{i}")
            assert facts["arguments"][1:] == [f"argument{i}"]
            assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == str(i)
            assert facts["environment"]["WORLD_SIZE"] == "2"
    finally:
        for run in runs:
            run.stop()


def test_unequal_nodes_are_told_apart(work: Path) -> None:
    nodes = Nodes(work, 1, "--nproc-per-node", 2, nnodes="1:2")
    try:
        nodes.wait_for_world(2)
        arguments = nodes.runs[0].process.args
        assert isinstance(arguments, list)
        other = Run(work, *["3" if a == "2" else a for a in arguments[3:]], name="other", env={"PROGRESS": str(nodes.progress)})
        nodes.runs.append(other)
        assert other.wait(60) == 1, nodes.told()
        assert "--nproc-per-node is 3 here and 2 on the node" in other.stderr(), nodes.told()
        nodes.finish(but=other)
    finally:
        nodes.stop()


def test_a_lost_node_is_done_without_and_may_come_back(work: Path) -> None:
    nodes = Nodes(work, 2, nnodes="1:2")
    try:
        generation = nodes.wait_for_world(2)
        nodes.kill(nodes.runs[1])
        generation = nodes.wait_for_world(1, generation + 1)
        host = nodes.runs[0]
        assert "node_" in host.stderr(), nodes.told()
        arguments = host.process.args
        assert isinstance(arguments, list)
        again = Run(work, *list(arguments[3:]), name="n2", env={"PROGRESS": str(nodes.progress)})
        nodes.runs.append(again)
        nodes.wait_for_world(2, generation + 1)
        nodes.finish(but=nodes.runs[1])
    finally:
        nodes.stop()


def test_a_spare_takes_a_lost_node_s_place(work: Path) -> None:
    nodes = Nodes(work, 3, "--spares", 1, nnodes="2")
    try:
        generation = nodes.wait_for_world(2)
        members = {line[2] for line in nodes.lines() if line[3] == generation}
        victim = next(run for run in nodes.runs[1:] if members & set(nodes.pids_of(run)))
        nodes.kill(victim)
        nodes.wait_for_world(2, generation + 1)
        nodes.finish(but=victim)
    finally:
        nodes.stop()


def test_the_endpoint_s_node_may_die(work: Path) -> None:
    nodes = Nodes(work, 2, nnodes="1:2")
    try:
        generation = nodes.wait_for_world(2)
        nodes.kill(nodes.runs[0])
        nodes.wait_for_world(1, generation + 1)
        assert "starting a controller here" in nodes.runs[1].stderr()
        nodes.finish(but=nodes.runs[0])
    finally:
        nodes.stop()


def test_two_endpoints_may_die_one_after_the_other(work: Path) -> None:
    nodes = Nodes(work, 3, nnodes="1:3")
    try:
        generation = nodes.wait_for_world(3)
        nodes.kill(nodes.runs[0])
        generation = nodes.wait_for_world(2, generation + 1)
        heir = next(run for run in nodes.runs[1:] if "starting a controller here" in run.stderr())
        last = next(run for run in nodes.runs[1:] if run is not heir)
        nodes.kill(heir)
        nodes.wait_for_world(1, generation + 1)
        Path(f"{nodes.progress}.end").touch()
        assert last.wait(60) == 0, nodes.told()
    finally:
        nodes.stop()


def test_a_signal_to_one_launcher_is_that_node_s_leave(work: Path) -> None:
    nodes = Nodes(work, 2, nnodes="1:2")
    try:
        generation = nodes.wait_for_world(2)
        nodes.runs[1].process.terminate()
        assert nodes.runs[1].wait(30) == 1, nodes.told()
        nodes.runs[1].assert_nothing_left()
        nodes.wait_for_world(1, generation + 1)
        nodes.finish(but=nodes.runs[1])
    finally:
        nodes.stop()


def test_a_node_without_its_peers_gives_up_after_the_join_timeout(work: Path) -> None:
    run = Run(work, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-conf", "join_timeout=2", STEADY,
              env={"PROGRESS": str(work / "p")})
    assert run.wait(40) == 75, run.told()
    assert "join_timeout" in run.stderr()
    assert "submit it again" in run.stderr()
    run.assert_nothing_left()


def test_a_failure_of_one_node_s_worker_is_told_on_both(work: Path) -> None:
    nodes = Nodes(work, 2, "--max-restarts", 0, nnodes="2", script=PROBE, env={"ENDING": "exit3", "ENDING_RANKS": "1"})
    try:
        for run in nodes.runs:
            assert run.wait(60) == 1, nodes.told()
            assert "rank      : 1 (local_rank: 0)" in run.stderr(), nodes.told()
            assert "exitcode  : 3" in run.stderr()
            run.assert_nothing_left()
    finally:
        nodes.stop()
