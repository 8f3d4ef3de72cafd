"""Scripts that only know torchrun run under `everstep run`, lose a rank to SIGKILL, and end as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv/bin"
SCRIPTS = ROOT / "tests/e2e/scripts"


@pytest.fixture
def launch() -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(*args: object, **more: object) -> Launch:
        started.append(Launch(*args, **more))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.end()


@dataclass
class Progress:
    step: int
    rank: int
    pid: int


def read(path: Path) -> list[Progress]:
    if not path.exists():
        return []
    whole = [line.split() for line in path.read_text().splitlines()]
    return [Progress(int(a), int(b), int(c)) for a, b, c in (w for w in whole if len(w) == 3)]


class Launch:
    """`everstep run --standalone` of one script, with two workers, in a folder of its own."""

    def __init__(self, folder: Path, *args: str, env: dict[str, str] | None = None) -> None:
        self.progress = folder / "progress"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP", "TORCHELASTIC"))}
        clean |= {"PROGRESS": str(self.progress), "OUT_DIR": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPTS)}
        command = [str(BIN / "everstep"), "run", "--standalone", "--nproc-per-node", "2", "--state-dir", str(folder / "s"), *args]
        self.output = folder / "output"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder, env=clean | (env or {}))

    def kill_rank_at(self, rank: int, step: int, seconds: float = 60) -> int:
        deadline = time.time() + seconds
        while time.time() < deadline:
            mine = [p for p in read(self.progress) if p.rank == rank]
            if mine and mine[-1].step >= step:
                os.kill(mine[-1].pid, signal.SIGKILL)
                return mine[-1].pid
            assert self.process.poll() is None, self.text()
            time.sleep(0.01)
        raise AssertionError(f"rank {rank} made no step {step} within {seconds:.0f} s\n{self.text()}")

    def wait(self, seconds: float = 90) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            self.process.wait(30)
            raise AssertionError(f"did not end within {seconds:.0f} s\n{self.text()}") from None

    def end(self) -> None:
        """Leaves nothing running, however the test went."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)

    def text(self) -> str:
        return self.output.read_text()


KILLED = {
    "nanogpt": (["{s}/nanogpt.py", "--out_dir=out", "--max_iters=60"], 20, "finished 60 iterations on 2"),
    "ddp_tutorial": (["{s}/ddp_tutorial.py", "40", "2"], 12, "[RANK0] finished 40 epochs"),
    "fsdp2": (["{s}/fsdp2.py"], 15, "rank 1 finished 40 steps"),
    "recorded": (["{s}/recorded.py"], 8, "rank 1 finished"),
    "module": (["-m", "package.train", "--lr", "1"], 12, "rank 0 finished from the package as package.train with ['--lr', '1']"),
    "shell": (["--no-python", "{s}/train.sh", "hello"], 12, "rank 1 of 2 finished, argument hello"),
    "cold": (["--no-preload", "{s}/nanogpt.py", "--max_iters=40"], 12, "finished 40 iterations on 2"),
}


@pytest.mark.parametrize("name", KILLED)
def test_survives_a_killed_rank(name: str, tmp_path: Path, launch: Callable[..., Launch]) -> None:
    args, step, words = KILLED[name]
    run = launch(tmp_path, *[a.format(s=SCRIPTS) for a in args])
    victim = run.kill_rank_at(1, step)
    assert run.wait() == 0, run.text()
    assert words in run.text()
    assert len({p.pid for p in read(run.progress)}) >= 3, "no worker was started after the kill"
    after = [p for p in read(run.progress) if p.rank == 1 and p.pid != victim]
    assert after, run.text()


def test_a_script_that_raises_is_restarted_then_reported(tmp_path: Path, launch: Callable[..., Launch]) -> None:
    once = tmp_path / "once"
    once.mkdir()
    run = launch(once, "--max-restarts", "2", str(SCRIPTS / "recorded.py"), env={"FAILS": "1"})
    assert run.wait() == 0, run.text()
    always = tmp_path / "always"
    always.mkdir()
    run = launch(always, "--max-restarts", "1", str(SCRIPTS / "recorded.py"), env={"FAILS": "99"})
    assert run.wait() == 1, run.text()
    assert "boom on rank 1" in run.text()
    assert "RuntimeError" in run.text()


def test_an_error_file_is_the_root_cause(tmp_path: Path, launch: Callable[..., Launch]) -> None:
    run = launch(tmp_path, "--max-restarts", "0", str(SCRIPTS / "error_file.py"), env={"FAILS": "99"})
    assert run.wait() == 1, run.text()
    assert "traceback : here" in run.text()  # py_callstack of the file, as torchrun tells it
    assert "exitcode  : 7" in run.text()


def test_without_rank_the_script_is_single(tmp_path: Path) -> None:
    """The comparison's other half: the same file is a plain program without a launcher."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PROGRESS")}
    done = subprocess.run([str(BIN / "python"), str(SCRIPTS / "nanogpt.py"), "--max_iters=10", "--iter_seconds=0", f"--out_dir={tmp_path}",
                           "--checkpoint_interval=100"], check=False, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "finished 10 iterations on 1" in done.stdout
