"""A real partition: three launchers in three network namespaces, and the one that brought the controller is cut off."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import Run, wait_for

STEADY = Path(__file__).parent / "scripts" / "steady.py"
COUNT = 3


def ip(*arguments: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True, timeout=30)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.returncode == 0


class Network:
    """10.98.0.10 and up, a namespace each, joined by a bridge in a namespace of its own."""

    def __init__(self) -> None:
        tag = f"ec{os.getpid() % 100000}"
        self.hub = f"{tag}h"
        self.names = [f"{tag}n{i}" for i in range(COUNT)]

    def make(self) -> None:
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "br0", "type", "bridge")
        ip("-n", self.hub, "link", "set", "br0", "up")
        for i, name in enumerate(self.names):
            ip("netns", "add", name)
            ip("link", "add", f"v{i}", "netns", self.hub, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("-n", self.hub, "link", "set", f"v{i}", "master", "br0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"10.98.0.{10 + i}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def cut(self, node: int) -> None:
        ip("-n", self.hub, "link", "set", f"v{node}", "down")

    def remove(self) -> None:
        for name in [self.hub, *self.names]:
            ip("netns", "del", name, check=False)


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        if os.geteuid() != 0 or not ip("netns", "add", network.hub, check=False):
            pytest.skip("network namespaces are not allowed here (root and CAP_NET_ADMIN)")
        ip("netns", "del", network.hub)
        network.make()
        yield network
    finally:
        network.remove()


def test_a_host_that_is_cut_off_stops_and_the_majority_goes_on(network: Network) -> None:
    work = Path(tempfile.mkdtemp(prefix="esc-", dir="/tmp"))
    progress = work / "progress"
    runs: list[Run] = []

    def told() -> str:
        return "\n".join(f"=== node {i}\n{run.told()}" for i, run in enumerate(runs))

    def lines() -> list[list[int]]:
        return [[int(w) for w in line.split()] for line in progress.read_text().splitlines()] if progress.exists() else []

    def world(ranks: int, generation: int) -> int:
        """The newest generation when it has `ranks` ranks at step 5 or later."""
        top = max((line[3] for line in lines()), default=0)
        steps = {line[1]: line[0] for line in lines() if line[3] == top}
        return top if top >= generation and set(steps) == set(range(ranks)) and min(steps.values()) >= 5 else 0

    try:
        for i, name in enumerate(network.names):
            runs.append(Run(work, "--nnodes", "1:3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.98.0.10:29400", "--rdzv-id", "cut", STEADY, name=f"n{i}",
                            env={"PROGRESS": str(progress)}, before=("ip", "netns", "exec", name)))
            if i == 0:
                wait_for("the controller", lambda: runs[0].pid_of("controller"))
        generation = wait_for("three ranks", lambda: world(3, 1))
        assert "not encrypted" in runs[0].stderr()
        network.cut(0)
        assert runs[0].wait(40) == 75, told()
        assert "cut off from the job" in runs[0].stderr(), told()
        stopped = len(lines())
        wait_for("a controller on the other side", lambda: any("starting a controller here" in run.stderr() for run in runs[1:]), 40)
        # Between the two no worker of a smaller world stepped anywhere.
        made = {line[3] for line in lines()[stopped:]}
        assert made <= {generation}, (made, told())
        # The cut host had made generations of its own before it stopped, so numbers do not tell: what is new does.
        pids = {line[2] for line in lines()}
        wait_for("two new ranks", lambda: {line[1] for line in lines() if line[2] not in pids and line[0] >= 5} == {0, 1}, 40)
        Path(f"{progress}.end").touch()
        for run in runs[1:]:
            assert run.wait(60) == 0, told()
    except AssertionError as e:
        raise AssertionError(f"{e}\n{told()}") from None
    finally:
        for run in runs:
            run.stop()
        shutil.rmtree(work, ignore_errors=True)
