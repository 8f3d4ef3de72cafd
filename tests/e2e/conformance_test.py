"""Flag by flag: what a worker gets and what the shell gets from everstep-run, beside the installed torchrun.

One case is one command line. Both launchers run it; their workers write down their environment, arguments and directory.
Compared are the workers, the exit code, the console, the files below --log-dir, and the error report. What may differ
is named in one place each: MAY_DIFFER, OURS, and a case's own `differs`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launch import PYTHON, ROOT, RUN, clean_environment

SCRIPTS = Path(__file__).parent / "scripts"
PROBE = str(SCRIPTS / "probe.py")

# Chosen anew for each run by either launcher.
MAY_DIFFER = {"MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "FACTS", "_", "MASTER_ADDR"}
# Of one launcher only.
OURS = re.compile(r"EVERSTEP_\w+")
THEIRS = {"TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "LC_CTYPE", "COLUMNS", "LINES"}
# What importing torch sets: a worker from the fork server has it imported already.
BY_IMPORT = {"TORCHINDUCTOR_CACHE_DIR"}


@dataclass
class Case:
    flags: list[str]
    script: list[str] = field(default_factory=lambda: [PROBE, "--lr", "1"])
    env: dict[str, str] = field(default_factory=dict)
    code: int = 0
    differs: set[str] = field(default_factory=set)
    report: bool = False
    preload: bool = False  # through the fork server, which imports torch first; the probe needs none


CASES = {
    "one worker": Case(["--standalone"]),
    "no flags at all": Case([]),
    "two workers": Case(["--standalone", "--nproc-per-node", "2"], preload=True),
    "underscores and equals": Case(["--standalone", "--nproc_per_node=2", "--max_restarts=3"]),
    "abbreviated": Case(["--stand", "--nproc-per-node", "2"]),
    "cpu workers": Case(["--standalone", "--nproc-per-node", "cpu"]),
    "from PET variables": Case([], env={"PET_NPROC_PER_NODE": "2", "PET_MAX_RESTARTS": "2", "PET_STANDALONE": "1", "PET_ROLE": "trainer"}),
    "role": Case(["--standalone", "--nproc-per-node", "2", "--role", "trainer"]),
    "rdzv id": Case(["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", "job7", "--nnodes", "1"]),
    "static with a port": Case(["--master-addr", "127.0.0.1", "--master-port", "0"]),
    "module": Case(["--standalone", "-m"], ["package.tiny", "--lr", "1"], preload=True),
    "no python": Case(["--standalone", "--no-python"], ["/bin/sh", "-c", f"exec {PYTHON} -u {PROBE} $0 $1", "--lr", "${local_rank}"]),
    "run path": Case(["--standalone", "--run-path"], differs={"path0"}),  # torchrun's own folder stays there
    "local rank macro": Case(["--standalone", "--nproc-per-node", "2"], [PROBE, "--device=${local_rank}", "$local_rank", "$$x", "${other}"]),
    "double dash before": Case(["--standalone"], ["--", PROBE, "--", "-m"]),
    "double dash behind": Case(["--standalone"], [PROBE, "--", "-m"]),
    "threads are kept": Case(["--standalone", "--nproc-per-node", "2"], env={"OMP_NUM_THREADS": "3"}),
    "tee": Case(["--standalone", "--nproc-per-node", "2", "-t", "3"]),
    "tee of one stream": Case(["--standalone", "--nproc-per-node", "2", "--tee", "0:1,1:2"]),
    "redirects": Case(["--standalone", "--nproc-per-node", "2", "-r3"]),
    "redirects of one rank": Case(["--standalone", "--nproc-per-node", "2", "-r", "1:3"]),
    "ranks filter": Case(["--standalone", "--nproc-per-node", "2", "--local-ranks-filter", "1", "-t", "3"]),
    "ranks filter without tee": Case(["--standalone", "--nproc-per-node", "2", "--local-ranks-filter", "0"]),
    "line prefix": Case(["--standalone", "--nproc-per-node", "2", "-t", "3"], env={"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name}-${rank}-${local_rank}> "}),
    "signals": Case(["--standalone", "--signals-to-handle", "SIGTERM,SIGUSR1"]),
    "virtual local rank": Case(["--standalone", "--nproc-per-node", "2", "--virtual-local-rank"], env={"CUDA_VISIBLE_DEVICES": "0,1"}),
    "monitor interval": Case(["--standalone", "--monitor-interval", "0.5", "--start-method", "fork"]),
    "exits 3": Case(["--standalone", "--nproc-per-node", "2", "--max-restarts", "0"], env={"ENDING": "exit3"}, code=1, report=True),
    "raises": Case(["--standalone", "--max-restarts", "0"], env={"ENDING": "raise"}, code=1, report=True),
    "raises under record": Case(["--standalone", "--nproc-per-node", "2", "--max-restarts", "0"], env={"ENDING": "record", "ENDING_RANKS": "1"}, code=1, report=True, preload=True),
    "killed": Case(["--standalone", "--max-restarts", "0"], env={"ENDING": "signal9"}, code=1, report=True),
    "aborts": Case(["--standalone", "--max-restarts", "0"], env={"ENDING": "signal6"}, code=1, report=True),
    "recovers": Case(["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"], env={"ENDING": "exit3", "ENDING_COUNT": "1"}, preload=True),
    "gives up": Case(["--standalone", "--max-restarts", "1"], env={"ENDING": "exit3"}, code=1, report=True),
    "missing script": Case(["--standalone"], ["there_is_no_such.py"], code=1, differs={"code"}),
    "unknown flag": Case(["--standalone", "--nproc-per-nod3", "2"], code=2),
    "bad nodes": Case(["--nnodes", "3:1"], code=1, differs={"code"}),
    "bad restarts": Case(["--standalone", "--max-restarts", "many"], code=2),
}


@dataclass
class Outcome:
    code: int
    stdout: str
    stderr: str
    workers: dict[str, dict]
    files: set[str]


def collect(work: Path, code: int) -> Outcome:
    workers = {f.stem: json.loads(f.read_text()) for f in sorted((work / "facts").glob("*.json"))}
    logs = work / "logs"
    files = {re.sub(r"^[^/]+", "RUN", str(f.relative_to(logs))) for f in logs.rglob("*") if f.is_file()}
    return Outcome(code, (work / "out").read_text(), (work / "err").read_text(), workers, files)


def prepare(work: Path, case: Case) -> tuple[list[str], dict[str, str]]:
    (work / "facts").mkdir(parents=True)
    env = clean_environment() | {"FACTS": str(work / "facts"), "PYTHONPATH": str(SCRIPTS)} | case.env
    return ["--log-dir", str(work / "logs"), *case.flags, *case.script], env


def ours(work: Path, case: Case) -> Outcome:
    arguments, env = prepare(work, case)
    if not case.preload:
        arguments.insert(0, "--no-preload")
    with (work / "out").open("w") as out, (work / "err").open("w") as err:
        done = subprocess.run([str(RUN), "--state-dir", str(work / "s"), *arguments], check=False, env=env, cwd=SCRIPTS, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=120)
    return collect(work, done.returncode)


def run_torchrun(arguments: list[str], env: dict[str, str], out: str, err: str) -> None:
    """In a process of its own that has imported torch already: the program torchrun is these lines."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - for the life of the process
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(SCRIPTS)
    os.environ.clear()
    os.environ.update(env)
    from torch.distributed.run import main

    code = 0
    try:
        main(arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:  # noqa: BLE001 - what the interpreter would do at top level
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def theirs(work: Path, case: Case) -> Outcome:
    import torch.distributed.run  # noqa: F401 - once for all cases

    arguments, env = prepare(work, case)
    child = multiprocessing.get_context("fork").Process(target=run_torchrun, args=(arguments, env, str(work / "out"), str(work / "err")))
    child.start()
    child.join(120)
    if child.is_alive():
        child.kill()
        raise AssertionError(f"torchrun did not end: {(work / 'err').read_text()}")
    return collect(work, child.exitcode or 0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Forks of this process must not hang in a thread pool."""
    import torch

    torch.set_num_threads(1)
    assert RUN.exists(), f"{RUN} is not built: cmake --build --preset release"
    assert ROOT.exists()


def lines(text: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith(("out of", "err of", "[", "<")))


def report_of(text: str) -> list[str]:
    """torchrun's failure report, what differs by nature taken out."""
    begin = re.search(r"^=+\n.* FAILED\n", text, re.MULTILINE)
    if not begin:
        return []
    body = text[begin.start():].split("\n")
    end = max(i for i, line in enumerate(body) if re.fullmatch("=+", line))
    report = []
    for line in body[: end + 1]:
        line = re.sub(r"pid: \d+", "pid: P", line)
        line = re.sub(r"by PID \d+", "by PID P", line)
        line = re.sub(r"^(  time +: )\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d$", r"\1T", line)
        line = re.sub(r"^(  host +: ).*", r"\1H", line)
        line = re.sub(r"^(  error_file: )/.*/(attempt_\d+/\d+/error.json)$", r"\1\2", line)
        report.append(re.sub(r'File ".*/', 'File "', line).rstrip())
    return report


@pytest.mark.parametrize("name", CASES)
def test_conforms(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    reference, mine = theirs(tmp_path / "t", case), ours(tmp_path / "e", case)
    for again in range(3):  # torchrun's tailer loses lines of workers that end at once, on a busy machine
        if len(lines(reference.stdout + reference.stderr)) >= len(lines(mine.stdout + mine.stderr)):
            break
        reference = theirs(tmp_path / f"t{again}", case)
    where = f"\n--- torchrun {reference.code}\n{reference.stdout}{reference.stderr}\n--- everstep-run {mine.code}\n{mine.stdout}{mine.stderr}"
    assert reference.code == case.code, where
    if "code" in case.differs:
        assert mine.code == 2, where  # refused before anything ran
        assert not mine.workers, where
        return
    else:
        assert mine.code == reference.code, where

    assert mine.workers.keys() == reference.workers.keys(), where
    for worker, theirs_saw in reference.workers.items():
        ours_saw = mine.workers[worker]
        for fact in ("arguments", "directory", "umask", "unbuffered", "name", "path0"):
            if fact in case.differs:
                continue
            assert ours_saw[fact] == theirs_saw[fact], f"{fact} of {worker}{where}"
        a, b = theirs_saw["environment"], ours_saw["environment"]
        missing = {k: v for k, v in a.items() if k not in b} .keys() - THEIRS
        assert not missing, f"{worker} lacks {missing}{where}"
        extra = {k for k in b.keys() - a.keys() - BY_IMPORT if not OURS.fullmatch(k)}
        assert not extra, f"{worker} has {extra} more{where}"
        unequal = {k: (a[k], b[k]) for k in a.keys() & b.keys() if a[k] != b[k]} .keys() - MAY_DIFFER
        assert not unequal, f"{worker}: { {k: (a[k], b[k]) for k in unequal} }{where}"
        assert b["MASTER_PORT"].isdigit()
        if "--rdzv-id" in case.flags:
            assert a["TORCHELASTIC_RUN_ID"] == b["TORCHELASTIC_RUN_ID"]
        their_file, our_file = a["TORCHELASTIC_ERROR_FILE"], b["TORCHELASTIC_ERROR_FILE"]
        assert their_file.split("/")[-3:] == our_file.split("/")[-3:], f"{their_file} {our_file}"

    assert lines(mine.stdout) == lines(reference.stdout), where
    assert lines(mine.stderr) == lines(reference.stderr), where
    # A worker's output always goes to files here, so there may be more of them.
    assert not reference.files - mine.files, where
    if case.report:
        assert report_of(mine.stderr) == report_of(reference.stderr), where
