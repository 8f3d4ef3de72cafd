"""Starts everstep-run as a person would, waits for what it does, and looks for what it left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(os.environ.get("EVERSTEP_PROGRAMS", ROOT / "build/release/bin"))
PYTHON = ROOT / ".venv/bin/python"
RUN = PROGRAMS / "everstep-run"


def clean_environment() -> dict[str, str]:
    """The shell's, without what steers launchers, and with the project's interpreter."""
    steering = ("PET_", "EVERSTEP", "TORCHELASTIC", "TORCH_ELASTIC", "OMP_NUM_THREADS", "MASTER_", "RANK", "WORLD_SIZE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(steering)}
    return env | {"PYTHON_EXEC": str(PYTHON), "PYTHONPATH": str(ROOT / "worker/python")}


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60.0):
    """The condition's first true value; fails with `what` when it never comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


class Run:
    """One launcher process with a state directory of its own."""

    def __init__(self, work: Path, *args: object, name: str = "s", env: dict[str, str] | None = None, cwd: Path | None = None,
                 before: tuple[str, ...] = ()) -> None:
        self.state = work / name
        self.out = work / f"{name}.out"
        self.err = work / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen([*before, str(RUN), "--state-dir", str(self.state), *map(str, args)], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                                            env=clean_environment() | (env or {}), cwd=cwd or work, start_new_session=True)

    def wait(self, seconds: float = 90.0) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"the run did not end within {seconds} s\n{self.told()}") from None

    def stdout(self) -> str:
        return self.out.read_text(errors="replace")

    def stderr(self) -> str:
        return self.err.read_text(errors="replace")

    def told(self) -> str:
        logs = "".join(f"--- {p}\n{p.read_text(errors='replace')[-2000:]}\n" for p in sorted(self.state.rglob("*.log")) + sorted(self.state.rglob("*.out")) if p.is_file())
        return f"stdout:\n{self.stdout()}\nstderr:\n{self.stderr()}\n{logs}"

    def pid_of(self, program: str) -> int:
        """Of agent, keeper or controller, as its pid file says; 0: none."""
        pattern = "controller/pid" if program == "controller" else f"nodes/*/{program}.pid"
        for file in self.state.glob(pattern):
            try:
                pid = int(file.read_text().split()[0])
                if Path(f"/proc/{pid}/comm").read_text().strip() == f"everstep-{program}"[:15]:
                    return pid
            except (OSError, ValueError, IndexError):
                continue
        return 0

    def processes(self) -> dict[int, str]:
        """Every process that names this state directory, or has it in its environment."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                    continue
                said = entry.joinpath("cmdline").read_bytes() + entry.joinpath("environ").read_bytes()
            except OSError:
                continue
            if str(self.state).encode() + b"/" in said or str(self.state).encode() + b"\0" in said:
                found[int(entry.name)] = entry.joinpath("comm").read_text().strip() if entry.exists() else "?"
        return found

    def assert_nothing_left(self, seconds: float = 15.0) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"left running: {left}\n{self.told()}"

    def stop(self) -> None:
        """For a test's end: whatever still runs ends now."""
        for pid in [self.process.pid, *self.processes()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait(10)
