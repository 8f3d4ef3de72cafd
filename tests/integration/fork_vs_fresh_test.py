"""A worker forked from the fork server cannot be told from a fresh process: fact by fact, for each way to start one.

    EVERSTEP_BIN=build/release/bin .venv/bin/python -m pytest tests/integration/fork_vs_fresh_test.py
"""

from __future__ import annotations

import ctypes
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import keeper_client
from keeper_client import (
    MODULE,
    PROGRAM,
    RUN_PATH,
    SCRIPT,
    Keeper,
    decode,
    number,
    text,
)

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM_PATH = os.path.join(os.environ.get("EVERSTEP_BIN", HERE.parents[1] / "build/release/bin"), "everstep-keeper")
PYTHON = sys.executable
# Names of the same two files and processes; nothing else may differ.
BASE = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "LANG": "C.UTF-8", "EMPTY": ""}


@pytest.fixture
def keeper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("k")
    keeper = Keeper(PROGRAM_PATH, folder)
    yield keeper
    keeper.close()


@pytest.fixture
def job(tmp_path):
    shutil.copy(HERE / "scripts" / "facts.py", tmp_path / "facts.py")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    shutil.copy(tmp_path / "facts.py", tmp_path / "package" / "facts.py")
    return tmp_path


def run(keeper, job, name, *, preload, env=None, **spawn):
    """Runs the worker to its end: (pid of KeeperSpawned was forked, exit code, stdout, stderr)."""
    rank = 0 if preload else 1
    out = str(job / "logs" / name / "worker")
    reply = keeper.spawn(name, rank, python=PYTHON, env=env, cwd=str(job), preload=preload, out=out, **spawn)
    forked = bool(number(decode(reply[5][0]), 2))
    code = keeper.wait_exit(name, rank)
    result = [pathlib.Path(out + end).read_text() for end in (".out", ".err")]
    for end in (".out", ".err"):
        os.unlink(out + end)
    assert forked == preload, text(reply, 3)
    return code, *result


def compare(keeper, job, kind, target, args, name, env=None, umask=0o27):
    env = {**BASE, **(env or {}), "RANK": "0", "LOCAL_RANK": "0", "EVERSTEP_FACTS": str(job / "facts.json")}
    server = {k: v for k, v in env.items() if k not in ("RANK", "LOCAL_RANK", "EVERSTEP_FACTS")}
    state = keeper.fork_server(name, PYTHON, kind, target, args, server, str(job))
    assert number(state, 2), text(state, 4)
    seen = []
    for preload in (True, False):
        result = run(keeper, job, name, preload=preload, env=env, kind=kind, target=target, args=args, umask=umask)
        assert (job / "facts.json").exists(), result[2]
        assert oct((job / "facts.json").stat().st_mode & 0o777) == oct(0o666 & ~umask)
        seen.append((result, json.loads((job / "facts.json").read_text())))
        (job / "facts.json").unlink()
    (forked_end, forked), (fresh_end, fresh) = seen
    # Counts of live threads: one that is just winding down (a data loader's) may still be seen, or not.
    threads, fresh_threads = forked["facts"].pop("working_threads"), fresh["facts"].pop("working_threads")
    assert all(abs(a - b) <= 1 for a, b in zip(threads, fresh_threads, strict=True)), (threads, fresh_threads)
    differing = {k: (v, fresh["facts"][k]) for k, v in forked["facts"].items() if v != fresh["facts"][k]}
    assert differing == {}
    assert forked_end == fresh_end
    assert [k for k, v in forked["drawn"].items() if v == fresh["drawn"][k]] == []
    return forked


@pytest.mark.parametrize(
    ("kind", "target", "args"),
    [
        (SCRIPT, "facts.py", ["--lr", "0.1", "ü"]),
        (MODULE, "package.facts", ["x"]),
        (RUN_PATH, "facts.py", []),
        (SCRIPT, "facts.py", ["--raise"]),
        (SCRIPT, "facts.py", ["--exit"]),
    ],
    ids=["script", "module", "run_path", "uncaught_exception", "exit_code"],
)
def test_a_forked_worker_is_like_a_fresh_one(keeper, job, kind, target, args):
    compare(keeper, job, kind, target, args, "job")


def test_environment_that_is_read_at_start_holds_in_both(keeper, job):
    (job / "site").mkdir()
    (job / "site" / "sitecustomize.py").write_text("import sys; sys.customized = 1\n")
    env = {"PYTHONPATH": str(job / "site"), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONWARNINGS": "ignore"}
    both = compare(keeper, job, SCRIPT, "facts.py", [], "job", env)
    assert both["facts"]["sitecustomize"]
    assert both["facts"]["threads"] == 1


def test_two_forked_workers_draw_differently(keeper, job):
    env = {**BASE}
    (job / "draw.py").write_text("import random, numpy, torch\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())\n")
    assert number(keeper.fork_server("job", PYTHON, SCRIPT, "draw.py", [], env, str(job)), 2)
    draws = []
    for rank in (0, 1):
        keeper.spawn("job", rank, python=PYTHON, target="draw.py", env=env, cwd=str(job), preload=True, out=str(job / f"w{rank}"))
        assert keeper.wait_exit("job", rank) == 0
        draws.append((job / f"w{rank}.out").read_text().split())
    assert all(a != b for a, b in zip(*draws, strict=True)), draws


def refused(keeper, job, source, reason, name="train.py", target=None, env=None):
    (job / name).write_text(source)
    state = keeper.fork_server("job", PYTHON, SCRIPT, target or name, [], env or BASE, str(job))
    assert number(state, 3), "the fork server should refuse"
    assert reason in text(state, 4)
    # The worker starts all the same, and the reply says why it is a fresh one.
    reply = keeper.spawn("job", 0, python=PYTHON, target=target or name, env=env or BASE, cwd=str(job), preload=True,
                         out=str(job / "w"))
    assert not number(decode(reply[5][0]), 2)
    assert reason in text(reply, 3)
    keeper.wait_exit("job", 0)
    return (job / "w.out").read_text()


def test_a_script_that_sets_what_libraries_read_at_import_starts_fresh(keeper, job):
    out = refused(keeper, job, "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport torch\nprint(torch.get_num_threads())\n",
                  "OMP_NUM_THREADS")
    assert out == "1\n"


def test_a_folder_that_shadows_an_imported_module_starts_fresh(keeper, job):
    (job / "sympy.py").write_text("mine = True\n")
    assert refused(keeper, job, "import torch, sympy\nprint(sympy.mine)\n", "sympy.py") == "True\n"


def test_an_interpreter_that_ignores_the_path_never_runs_the_script_as_server(keeper, job):
    wrapper = job / "isolated-python"
    wrapper.write_text(f'#!/bin/sh\nexec {PYTHON} -I "$@"\n')
    wrapper.chmod(0o755)
    (job / "train.py").write_text("open('ran', 'a').write('x')\n")
    state = keeper.fork_server("job", str(wrapper), SCRIPT, "train.py", [], BASE, str(job))
    assert number(state, 3)
    assert "PYTHONPATH" in text(state, 4)
    assert not (job / "ran").exists()


def test_imports_of_the_script_that_start_threads_are_left_to_it(keeper, job):
    package = job / "site" / "threaded"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n")
    env = {**BASE, "PYTHONPATH": str(job / "site")}
    (job / "train.py").write_text("import threaded, sys\nprint('done')\n")
    state = keeper.fork_server("job", PYTHON, SCRIPT, "train.py", [], env, str(job))
    assert number(state, 2), text(state, 4)
    assert run(keeper, job, "job", preload=True, env=env, target="train.py") == (0, "done\n", "")


def test_another_environment_or_command_starts_the_server_anew(keeper, job):
    (job / "train.py").write_text("import os, torch\nprint(os.environ['OMP_NUM_THREADS'])\n")
    assert number(keeper.fork_server("job", PYTHON, SCRIPT, "train.py", [], BASE, str(job)), 2)
    env = {**BASE, "OMP_NUM_THREADS": "1"}
    assert run(keeper, job, "job", preload=True, env=env, target="train.py") == (0, "1\n", "")
    assert "OMP_NUM_THREADS" in (keeper.folder / "keeper.log").read_text()


def test_workers_wait_for_the_imports_that_they_would_do_themselves(keeper, job):
    (job / "train.py").write_text("import torch\nprint('done')\n")
    keeper.call(3, {1: "job", 2: PYTHON, 3: BASE, 4: str(job), 7: SCRIPT, 8: "train.py"})
    asked = [
        keeper.send(5, {1: "job", 2: 1, 3: rank, 5: SCRIPT, 6: PYTHON, 7: "train.py", 9: BASE, 10: str(job), 12: 1,
                        14: str(job / f"w{rank}"), 15: str(job / f"w{rank}")})
        for rank in (0, 1)
    ]
    # Its port is there at once, long before torch is.
    assert store(keeper, job, 1) > 0
    assert not keeper.replies
    for rank, id_ in enumerate(asked):
        assert number(decode(keeper.wait_reply(id_)[5][0]), 2)
        assert keeper.wait_exit("job", rank) == 0


def test_a_worker_stopped_while_it_waits_never_starts(keeper, job):
    (job / "train.py").write_text("import torch\nopen('ran', 'w')\n")
    keeper.call(3, {1: "job", 2: PYTHON, 3: BASE, 4: str(job), 7: SCRIPT, 8: "train.py"})
    asked = keeper.send(5, {1: "job", 2: 1, 3: 0, 5: SCRIPT, 6: PYTHON, 7: "train.py", 9: BASE, 10: str(job), 12: 1})
    keeper.call(6, {1: "job", 2: 1, 3: -1, 5: 100})
    assert number(keeper.wait_reply(asked), 2) != 0
    assert number(keeper.fork_server("job", PYTHON, SCRIPT, "train.py", [], BASE, str(job)), 2)
    assert not (job / "ran").exists()


def test_a_script_that_needs_nothing_installed_does_not_wait(keeper, job):
    assert refused(keeper, job, "import os\nprint('quick')\n", "nothing that is installed") == "quick\n"


def test_a_program_that_is_not_python_starts_as_it_is(keeper, job):
    reply = keeper.spawn("job", 0, kind=PROGRAM, target="sh", args=["-c", "echo $RANK; exit 4"], env={**BASE, "RANK": "6"},
                         cwd=str(job), preload=True, out=str(job / "w"))
    assert not number(decode(reply[5][0]), 2)
    assert keeper.wait_exit("job", 0) == 4
    assert (job / "w.out").read_text() == "6\n"


@pytest.mark.parametrize("cpus", ["{0}", None], ids=["bound", "no_gpu"])
def test_numa_binding_asks_torch_or_says_why_not(keeper, job, cpus):
    # A torch of our own, that knows where the GPUs are, or that there are none.
    package = job / "site" / "torch" / "numa"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "binding.py").write_text(
        "class AffinityMode(str): pass\nclass NumaOptions:\n    def __init__(self, affinity_mode): self.mode = affinity_mode\n"
        "def _get_logical_cpus_to_bind_to(gpu_index, numa_options):\n"
        "    assert (gpu_index, numa_options.mode) == (0, 'node')\n"
        + (f"    return {cpus}\n" if cpus else "    raise RuntimeError('no GPU 0')\n")
    )
    (job / "train.py").write_text("import os, sys\nprint(os.sched_getaffinity(0), sys.argv, flush=True)\n")
    for generation in (1, 2):  # the second time from the cache
        keeper.call(5, {1: "job", 2: generation, 3: 0, 4: 0, 5: SCRIPT, 6: PYTHON, 7: "train.py", 8: ["x"],
                        9: {**BASE, "PYTHONPATH": str(job / "site")}, 10: str(job), 12: 1, 14: str(job / "w.out"),
                        15: str(job / "w.err"), 18: "node"})
        assert keeper.wait_exit("job", 0, generation) == (0 if cpus else 1)
    if cpus:
        assert (job / "w.out").read_text() == "{0} ['train.py', 'x']\n" * 2
    else:
        assert "--numa-binding=node cannot be applied to local rank 0: no GPU 0" in (job / "w.err").read_text()


def test_a_stopped_fork_server_is_woken(keeper, job):
    (job / "train.py").write_text("import torch\nprint('done')\n")
    state = keeper.fork_server("job", PYTHON, SCRIPT, "train.py", [], BASE, str(job))
    assert number(state, 2)
    os.kill(number(state, 5), 19)
    assert run(keeper, job, "job", preload=True, env=BASE, target="train.py") == (0, "done\n", "")


def store(keeper, job, generation):
    reply = keeper.call(4, {1: "job", 2: generation, 3: "127.0.0.1", 4: PYTHON, 6: BASE})
    return number(decode(reply[8][0]), 3)


def test_a_store_for_each_generation_and_a_group_that_forms(keeper, job):
    (job / "train.py").write_text(
        "import torch, torch.distributed as d\nd.init_process_group('gloo')\nt = torch.ones(1)\nd.all_reduce(t)\nprint(t.item())\n"
    )
    assert number(keeper.fork_server("job", PYTHON, SCRIPT, "train.py", [], BASE, str(job)), 2)
    ports = []
    for generation in (1, 2):
        ports.append(store(keeper, job, generation))
        env = {**BASE, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[-1]),
               "TORCHELASTIC_USE_AGENT_STORE": "True"}
        for rank in (0, 1):
            keeper.spawn("job", rank, python=PYTHON, target="train.py", env={**env, "RANK": str(rank)}, cwd=str(job),
                         preload=True, generation=generation, out=str(job / f"w{rank}"), watch_ms=5000)
        assert [keeper.wait_exit("job", rank, generation) for rank in (0, 1)] == [0, 0], (job / "w0.err").read_text()
        assert (job / "w0.out").read_text() == "2.0\n" * generation
        keeper.call(6, {1: "job", 2: generation, 3: -1, 6: 1})
    assert ports[0] != ports[1]
    assert not [e for e in keeper.events if 10 in e], "a group that formed was called stalled"


def test_a_group_that_never_forms_is_told(keeper, job):
    # Rank 1 gives the store an address where nobody answers, and stays.
    (job / "train.py").write_text(
        "import os, time, socket, torch, torch.distributed as d\n"
        "if os.environ['RANK'] == '1':\n"
        "    real = socket.socket\n"
        "    store = d.TCPStore('127.0.0.1', int(os.environ['MASTER_PORT']), is_master=False)\n"
        "    key = 'default_pg/0//cpu//0/'\n"
        "    store.wait([key + '0'])\n"
        "    store.set(key + '1', store.get(key + '0'))\n"
        "    time.sleep(1000)\n"
        "d.init_process_group('gloo')\n"
    )
    port = store(keeper, job, 1)
    env = {**BASE, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for rank in (0, 1):
        keeper.spawn("job", rank, python=PYTHON, target="train.py", env={**env, "RANK": str(rank)}, cwd=str(job), preload=False,
                     out=str(job / f"w{rank}"), watch_ms=1000)
    stalled = keeper.wait_event(lambda e: decode(e[10][0]) if 10 in e else None, 60)
    assert number(stalled, 4) == 2
    assert "2 ranks" in text(stalled, 5)


def test_a_script_that_has_left_its_group_is_not_called_stalled(keeper, job):
    (job / "train.py").write_text(
        "import os, time, torch, torch.distributed as d\nd.init_process_group('gloo')\nd.destroy_process_group()\n"
        "print('left', flush=True)\n"
        "until = time.time() + 3\nwhile time.time() < until: time.sleep(0.1)\n"
    )
    port = store(keeper, job, 1)
    env = {**BASE, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for rank in (0, 1):
        keeper.spawn("job", rank, python=PYTHON, target="train.py", env={**env, "RANK": str(rank)}, cwd=str(job), preload=False,
                     out=str(job / f"w{rank}"), watch_ms=500)
    assert [keeper.wait_exit("job", rank) for rank in (0, 1)] == [0, 0], (job / "w0.err").read_text()
    assert not [e for e in keeper.events if 10 in e]


def test_a_dead_fork_server_comes_back(keeper, job):
    (job / "train.py").write_text("import torch\nprint('done')\n")
    state = keeper.fork_server("job", PYTHON, SCRIPT, "train.py", [], BASE, str(job))
    assert number(state, 2)
    keeper.events.clear()
    os.kill(number(state, 5), 9)

    def back(event):
        s = decode(event[7][0]) if 7 in event else {}
        return s if number(s, 2) and number(s, 5) != number(state, 5) else None

    keeper.wait_event(back)
    assert run(keeper, job, "job", preload=True, env=BASE, target="train.py") == (0, "done\n", "")


def test_imports_that_take_long_but_advance_are_waited_for(keeper, job):
    """On a starved machine a fresh process would do the same imports from the beginning, beside the fork server's."""
    (job / "site").mkdir()
    (job / "site" / "heavy.py").write_text("import time\nuntil = time.time() + 22\nwhile time.time() < until: pass\n")
    (job / "train.py").write_text("import torch, heavy\nprint('done')\n")
    env = {**BASE, "PYTHONPATH": str(job / "site")}
    keeper.call(3, {1: "job", 2: PYTHON, 3: env, 4: str(job), 7: SCRIPT, 8: "train.py", 9: []})  # and is not waited for
    reply = keeper.spawn("job", 0, python=PYTHON, target="train.py", env=env, cwd=str(job), preload=True, out=str(job / "w"))
    assert number(decode(reply[5][0]), 2), text(reply, 3)
    assert keeper.wait_exit("job", 0) == 0, (job / "w.err").read_text()


def test_what_the_first_generation_imports_late_is_imported_ahead_next_time(keeper, job):
    # A name that is in no import statement: only the running worker shows it.
    (job / "train.py").write_text(
        "import importlib.util, os, sys, time, torch\n"
        "names = ['_curs' + 'es', '_cry' + 'pt', 'audio' + 'op', '_test' + 'buffer', '_dbm']\n"
        "name = next(n for n in names if n not in sys.modules and importlib.util.find_spec(n))\n"
        "print(name, flush=True)\n"
        "import builtins\ngetattr(builtins, '__imp' + 'ort__')(name)\ntime.sleep(1000)\n"
    )
    assert number(keeper.fork_server("job", PYTHON, SCRIPT, "train.py", [], BASE, str(job)), 2)
    keeper.spawn("job", 0, python=PYTHON, target="train.py", env=BASE, cwd=str(job), preload=True, out=str(job / "w1"))
    log = keeper.folder / "keeper.log"
    deadline = time.monotonic() + 60
    while "fork_server_learnt" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    assert (job / "w1.out").read_text().strip() in log.read_text().partition("fork_server_learnt")[2]
    keeper.call(6, {1: "job", 2: 1, 3: -1, 5: 0})
    keeper.wait_exit("job", 0)
    keeper.spawn("job", 0, python=PYTHON, target="train.py", env=BASE, cwd=str(job), preload=True, generation=2, out=str(job / "w2"))
    while not (job / "w2.out").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (job / "w1.out").read_text() != (job / "w2.out").read_text(), "it was there before the script"


if __name__ == "__main__":
    assert keeper_client
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))


def test_a_child_whose_word_is_not_awaited_any_more_runs_nothing(keeper, tmp_path):
    """The keeper starts a fresh process where a fork takes too long: a late child would be the same rank once more."""
    script = tmp_path / "train.py"
    script.write_text("import json, os, sys\nimport numpy\nopen(sys.argv[1], 'w').write(str(os.getpid()))\n")
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: the server's children come to us, as to a keeper
    ours, theirs = socket.socketpair()
    status_read, status_write = os.pipe()
    folder = str(keeper.folder / "python")
    environment = {**BASE, "PYTHONPATH": folder, "EVERSTEP_FORK_SERVER":
                   f"1:{theirs.fileno()}:{status_write}:{os.getpid()}:-1"}
    server = subprocess.Popen([PYTHON, "-u", "-c", "import sys; sys.exit(97)"], env=environment, cwd=tmp_path,
                              pass_fds=[theirs.fileno(), status_write], stderr=subprocess.PIPE)
    theirs.close()
    os.close(status_write)

    def send(*fields, passed=()):
        body = b"".join(len(f).to_bytes(4, "little") + f for f in map(os.fsencode, fields))
        socket.send_fds(ours, [len(body).to_bytes(4, "little") + body], passed)

    def ask(marker, answer):
        send("worker", str(tmp_path), "18", str(tmp_path / "out"), str(tmp_path / "err"), "1", marker,
             *(f"{k}={v}" for k, v in BASE.items()), passed=[answer])
        os.close(answer)

    try:
        send("command", "1", "train.py", PYTHON, "-u", "train.py", "-")
        send("preload", "json")
        with os.fdopen(status_read) as status:
            assert status.readline().startswith("ready "), server.stderr.read1().decode()
        for marker in ("late", "later"):  # from a seed, and without one
            read, write = os.pipe()
            os.close(read)
            ask(marker, write)
        read, write = os.pipe()
        ask("awaited", write)
        with os.fdopen(read) as answer:
            pid = int(answer.readline().removeprefix("P"))
        assert os.waitpid(pid, 0)[1] == 0
        while True:  # whoever else was forked has ended, too
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
            time.sleep(0.01)
        time.sleep(0.5)
        assert (tmp_path / "awaited").exists()
        assert not (tmp_path / "late").exists() and not (tmp_path / "later").exists(), (tmp_path / "err").read_text()
    finally:
        ours.close()
        server.kill()
        server.wait()
        server.stderr.close()
        ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
