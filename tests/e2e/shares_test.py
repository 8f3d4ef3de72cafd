"""A DDP job on three nodes whose state is captured once, each rank its share; a worker and then a node are killed.

    3 nodes   step 0 .. a    1/3 of the state a rank, and a peer's third beside it
    SIGKILL of rank 1        the same three ranks, each from the shares of all
    SIGKILL of a node        a new one takes its place: rank 2's share comes from its copy
    to the end               to the last bit what a run says that nobody disturbed, and that captured whole
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from elastic_restore_test import SCRIPT, environment, lines, newest, steps, work  # noqa: F401
from launch import PROGRAMS, PYTHON, Run, clean_environment, wait_for
from nodes_test import Nodes


class Job(Nodes):
    """A job of three nodes, each with one rank."""

    def __init__(self, work: Path, *flags: object, env: dict[str, str]) -> None:  # noqa: F811
        super().__init__(work, 3, *flags, nnodes="3", script=SCRIPT, env=env)
        self.work, self.env = work, env
        self.lost: list[Run] = []

    def runs_after(self, generation: int, count: int = 4) -> int:
        """A later generation than `generation` has made so many steps. Returns it."""
        def there() -> int:
            assert all(run.process.poll() is None for run in self.runs if run not in self.lost), self.told()
            world, now, so_far = newest(self.work)
            return now if world == 3 and now > generation and so_far >= count else 0

        try:
            return wait_for(f"{count} steps after generation {generation}", there, 90)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{lines(self.work)[-5:]}\n{self.told()}") from None

    def replace(self, run: Run) -> None:
        """The node dies, and a new one comes."""
        self.kill(run)
        self.lost.append(run)
        arguments = run.process.args
        assert isinstance(arguments, list)
        self.runs.append(Run(self.work, *arguments[3:], name=f"n{len(self.runs)}", env=self.env))

    def end(self) -> None:
        (self.work / "out/end").touch()
        for run in self.runs:
            if run not in self.lost:
                assert run.wait(60) == 0, self.told()
        (self.work / "out/end").unlink()

    def goes_on_with(self, generation: int, before: int) -> None:
        """What it was restored from is what the generation before captured, at one of its last steps."""
        (start,) = [w for w in lines(self.work) if w[0] == "start" and int(w[1]) == generation]
        world, step, digest = int(start[2]), int(start[3]), start[4]
        captured = steps(self.work, before)
        assert world == 3 and digest == captured[step][1], f"restored is not what was captured at step {step}"
        assert step >= max(captured) - 3, f"{max(captured) - step} steps were lost"

    def sizes(self, kind: str) -> list[int]:
        return [int((self.work / f"out/bytes-{kind}-{rank}").read_text()) for rank in range(3)]


def test_a_state_in_shares_outlives_a_worker_and_a_node(work: Path) -> None:  # noqa: F811
    job = Job(work, env=environment(work, "shares"))
    try:
        first = job.runs_after(0)
        os.kill(int((work / "out/pid-1").read_text()), signal.SIGKILL)
        second = job.runs_after(first)
        job.replace(job.runs[2])
        third = job.runs_after(second)
        job.end()
        job.goes_on_with(second, first)
        job.goes_on_with(third, second)
        last = max(steps(work, third))
        whole = Run(work, "--standalone", "--nproc-per-node", 3, SCRIPT, name="whole",
                    env=environment(work, "whole", STEPS=last + 1, LINES="whole"))
        job.runs.append(whole)
        assert whole.wait(90) == 0, whole.told()
        undisturbed = steps(work, 1, "whole")
        assert sorted(undisturbed) == list(range(last + 1))
        for generation in (first, second, third):
            for step, told in steps(work, generation).items():
                assert told == undisturbed[step], f"step {step} of generation {generation}: not the undisturbed run's bits"
        shares, copies = job.sizes("shares"), job.sizes("whole")
        # Random streams, buffers and the table stay whole; a small tensor goes to one rank.
        beside = 60_000
        assert all(abs(share - max(copies) // 3) < beside for share in shares), (shares, copies)
    finally:
        job.stop()


WIDE = 12 * 40_009 * 37  # bytes of parameters and two moments of the wide layers that "auto" and "apart" have


def test_what_nodes_find_to_be_the_same_outlives_one_of_them(work: Path) -> None:  # noqa: F811
    """replicated="auto": the ranks compare over the job's store, again after a node was replaced."""
    job = Job(work, env=environment(work, "auto"))
    try:
        first = job.runs_after(0)
        job.replace(job.runs[2])
        second = job.runs_after(first, 2)
        job.end()
        job.goes_on_with(second, first)
        assert all(size < WIDE / 2 for size in job.sizes("auto")), job.sizes("auto")
    finally:
        job.stop()


def test_without_copies_on_other_nodes_a_state_stays_whole(work: Path) -> None:  # noqa: F811
    """replicated="auto" where a node's loss would take its shares along."""
    job = Job(work, "--copies", "1", env=environment(work, "auto", STEPS=3))
    try:
        for run in job.runs:
            assert run.wait(90) == 0, job.told()
        assert all(size > WIDE for size in job.sizes("auto")), job.sizes("auto")
    finally:
        job.stop()


def exported(work: Path, kind: str) -> list[bytes]:  # noqa: F811
    """Four steps of three ranks, written by agents and exported: model and optimizer, byte by byte."""
    run = Run(work, "--standalone", "--nproc-per-node", 3, "--ckpt-dir", work / kind, SCRIPT, name=kind[0],
              env=environment(work, kind, STEPS=4, LINES=kind))
    assert run.wait(90) == 0, run.told()
    out = work / f"{kind}-exported"
    done = subprocess.run([PROGRAMS / "everstep", "ckpt", "export", work / kind, out, "--python", PYTHON],
                          env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [(out / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def test_files_of_shares_are_exported_whole_and_restored(work: Path) -> None:  # noqa: F811
    shares, whole = exported(work, "shares"), exported(work, "whole")
    assert shares == whole and len(shares[0]) > 4 * 24 * 1031
    told = subprocess.run([PROGRAMS / "everstep", "ckpt", "show", work / "shares"], env=clean_environment(), capture_output=True, text=True)
    assert "shares: a rank's file is its share of one state" in told.stdout, told.stdout + told.stderr
    again = Run(work, "--standalone", "--nproc-per-node", 3, "--ckpt-dir", work / "shares", "--ckpt-every", "1000steps", SCRIPT, name="again",
                env=environment(work, "shares", STEPS=4, LINES="again"))
    assert again.wait(90) == 0, again.told()
    (start,) = lines(work, "again")
    assert start[2:] == ["3", "3", steps(work, 1, "shares")[3][1]], "a new run, from the files of all ranks"
