"""Jobs of any system, each under the launcher that its own documentation asks for, and what they said.

everstep: `everstep run`, a node a rank. dlrover: its master, then `dlrover-run` (whose own start of a master does not work on
this PyTorch). All others: torchrun, started a second time where a restart is part of the case.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import environments
from common import BIN, ROOT, before_all_others, free_port

SCRIPTS = ROOT / "tests/bench/scripts"


class Failed(Exception):
    """A job that did not do what it was launched for; the text is the evidence."""


class Late(Failed):
    """A job that did not end in time: on a busy machine that is no evidence of anything else."""


class Job:
    """The processes of one case of one system, its folder on tmpfs and the lines that its ranks wrote."""

    def __init__(self, system: str, ranks: int, script: str, env: dict[str, str], realtime: bool = False, limit: float = 300.0) -> None:
        self.system, self.ranks, self.script, self.realtime, self.limit = system, ranks, SCRIPTS / script, realtime, limit
        self.folder = Path(tempfile.mkdtemp(prefix="esv-", dir="/dev/shm"))
        self.work = Path(tempfile.mkdtemp(prefix="esv-", dir="/tmp"))  # sockets and logs; short, for a socket's path
        self.out = self.work / "out"
        self.mark = self.folder.name
        self.segments = self._segments()
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP_", "TORCHELASTIC", "DLROVER"))}
        self.env = clean | {"BENCH_OUT": str(self.out), "BENCH_RUN": self.mark, "RIVAL_SYSTEM": system,
                            "RIVAL_FOLDER": str(self.folder), "OMP_NUM_THREADS": "1"} | env
        self.started: list[subprocess.Popen[bytes]] = []
        self.log = (self.work / "log").open("ab")

    def _segments(self) -> set[str]:
        return {p.name for p in Path("/dev/shm").glob("*_ckpt_shm_*")}

    def new_segments(self) -> set[str]:
        """Shared memory that DLRover left behind, by name."""
        return self._segments() - self.segments

    def start(self, command: list[str | Path], env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([str(c) for c in command], env=self.env | (env or {}), stdin=subprocess.DEVNULL, stdout=self.log,
                                   stderr=subprocess.STDOUT, cwd=SCRIPTS, preexec_fn=before_all_others if self.realtime else None)
        self.started.append(process)
        return process

    def wait(self, processes: list[subprocess.Popen[bytes]]) -> list[int]:
        deadline = time.monotonic() + self.limit
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Late(f"did not end within {self.limit:.0f} s: {self.said()}") from None
        return [process.returncode for process in processes]

    def run(self, starts: int = 2) -> list[dict]:
        """The job, and again after it has died; every row that its ranks wrote. `starts`: how often the script begins."""
        if self.system.startswith("everstep"):
            codes = self.wait(self.everstep())
        elif self.system == "dlrover":
            codes = self.wait([self.dlrover()])
        else:
            for i in range(starts):
                codes = self.wait([self.torchrun()])
                for _ in range(2):  # gloo sometimes does not connect its ranks at all: nobody's checkpoint is to blame
                    if i + 1 < starts or not any(codes) or "connectFullMesh" not in str(self.rows()[-1:]):
                        break
                    self.drop_last_error()
                    codes = self.wait([self.torchrun()])
        rows = self.rows()
        for row in rows:
            if "trace" in row:
                raise Failed(row["error"])
        if any(codes):
            raise Failed(f"ended with {codes}: {self.said()}")
        return rows

    def drop_last_error(self) -> None:
        rows = [row for row in self.rows() if "trace" not in row]
        self.out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.out.read_text().splitlines()] if self.out.exists() else []

    def torchrun(self) -> subprocess.Popen[bytes]:
        return self.start([environments.python(self.system), "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node",
                           str(self.ranks), "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", self.mark,
                           "--max-restarts", "0", self.script])

    def dlrover(self) -> subprocess.Popen[bytes]:
        interpreter, port = environments.python(self.system), free_port()
        self.start([interpreter, "-u", "-m", "dlrover.python.master.main", "--port", str(port), "--node_num", "1", "--job_name",
                    self.mark, "--platform", "local"])
        deadline = time.monotonic() + 60
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if time.monotonic() > deadline:
                raise Late(f"its master did not listen within 60 s: {self.said()}")
            time.sleep(0.1)
        return self.start([interpreter.parent / "dlrover-run", "--nnodes", "1", "--nproc_per_node", str(self.ranks), "--max_restarts", "1",
                           self.script], {"DLROVER_MASTER_ADDR": f"127.0.0.1:{port}"})

    def everstep(self, *more: str) -> list[subprocess.Popen[bytes]]:
        """A node a rank; the first one has the controller."""
        port = free_port()
        return [self.everstep_node(i, port, "--nnodes", str(self.ranks), *more) for i in range(self.ranks)]

    def everstep_node(self, number: int, port: int, *more: str) -> subprocess.Popen[bytes]:
        env = {"PYTHONPATH": str(ROOT / "worker/python"), "EVERSTEP_LIBRARY": str(ROOT / "build/release/lib/libeverstep.so")}
        args = ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", self.mark,
                "--node-rank", str(number), "--max-restarts", "3"]
        return self.start([BIN / "everstep", "run", "--state-dir", self.work / f"s{number}", *args, *more, self.script], env)

    def said(self) -> str:
        """The last line of the log that says what went wrong."""
        lines = (self.work / "log").read_text(errors="replace").splitlines()
        telling = [line.strip() for line in lines if ("Error" in line or "error:" in line or "Exception" in line)
                   and "rendezvous/registry.py" not in line and "ChildFailedError" not in line]
        return (telling or lines or ["nothing was said"])[-1][:300]

    def processes(self) -> list[int]:
        """Those that carry this job's mark, whoever started them."""
        found = []
        for pid in (int(p) for p in os.listdir("/proc") if p.isdigit()):
            try:
                if f"BENCH_RUN={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(pid)
            except OSError:
                continue
        return found

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(p.poll() is None for p in self.started):
            time.sleep(0.05)
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for process in self.started:
            process.wait(10)
        self.log.close()
        if self.system == "dlrover":
            for name in self.new_segments():
                (Path("/dev/shm") / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def end_in_order() -> None:
    """A benchmark that is told to end takes its jobs along."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def version(system: str) -> str:
    """What of it is measured, as its own environment says."""
    package = {"lm_resiliency": "lm-resiliency", "nvrx": "nvidia-resiliency-ext", "dcp": "torch", "torch_save": "torch"}
    name = system.partition(":")[0]
    if name == "everstep":
        return "this checkout"
    code = f"import importlib.metadata as m; print(m.version({package.get(name, name)!r}))"
    done = subprocess.run([environments.python(system), "-c", code], capture_output=True, text=True, timeout=60)
    return f"{package.get(name, name)} {done.stdout.strip()}"
