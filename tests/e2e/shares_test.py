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


def test_a_state_in_shares_outlives_a_worker_and_a_node(work: Path) -> None:  # noqa: F811
    env = environment(work, "shares")
    nodes = Nodes(work, 3, nnodes="3", script=SCRIPT, env=env)
    try:
        def runs_after(generation: int, count: int = 4) -> int:
            def there() -> int:
                assert all(run.process.poll() in (None, -9) for run in nodes.runs), nodes.told()
                world, now, so_far = newest(work)
                return now if world == 3 and now > generation and so_far >= count else 0

            try:
                return wait_for(f"{count} steps after generation {generation}", there, 90)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{lines(work)[-5:]}\n{nodes.told()}") from None

        first = runs_after(0)
        os.kill(int((work / "out/pid-1").read_text()), signal.SIGKILL)
        second = runs_after(first)
        lost = nodes.runs[2]
        nodes.kill(lost)
        arguments = lost.process.args
        assert isinstance(arguments, list)
        nodes.runs.append(Run(work, *arguments[3:], name="n3", env=env))
        third = runs_after(second)
        (work / "out/end").touch()
        for run in nodes.runs:
            if run is not lost:
                assert run.wait(60) == 0, nodes.told()
        starts = {int(w[1]): (int(w[2]), int(w[3]), w[4]) for w in lines(work) if w[0] == "start"}
        assert starts[first][1] == -1
        for generation, before in ((second, first), (third, second)):
            world, step, digest = starts[generation]
            captured = steps(work, before)
            assert world == 3 and digest == captured[step][1], f"restored is not what was captured at step {step}"
            assert step >= max(captured) - 3, f"{max(captured) - step} steps were lost"
        last = max(steps(work, third))
        (work / "out/end").unlink()
        whole = Run(work, "--standalone", "--nproc-per-node", 3, SCRIPT, name="whole",
                    env=environment(work, "whole", STEPS=last + 1, LINES="whole"))
        nodes.runs.append(whole)
        assert whole.wait(90) == 0, whole.told()
        undisturbed = steps(work, 1, "whole")
        assert sorted(undisturbed) == list(range(last + 1))
        for generation in starts:
            for step, told in steps(work, generation).items():
                assert told == undisturbed[step], f"step {step} of generation {generation}: not the undisturbed run's bits"
        shares, copies = ([int((work / f"out/bytes-{kind}-{rank}").read_text()) for rank in range(3)] for kind in ("shares", "whole"))
        # Random streams, buffers and the table stay whole; a small tensor goes to one rank.
        beside = 60_000
        assert all(abs(share - max(copies) // 3) < beside for share in shares), (shares, copies)
    finally:
        nodes.stop()


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
