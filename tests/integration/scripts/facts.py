"""Everything a script can see of the process it runs in, as JSON. The same for a fresh process and a forked one."""

import json
import os
import pickle
import resource
import signal
import sys
import traceback

EARLY = {
    "modules_main": sorted(k for k in sys.modules["__main__"].__dict__ if k.startswith("__")),
    "stack": [f.name for f in traceback.extract_stack()],
    "fds": sorted(int(n) for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")),
}


class Thing:
    def __init__(self, x):
        self.x = x


def square(thing):
    return Thing(thing.x**2)


def main_facts():
    main = sys.modules["__main__"]
    return {
        "name": __name__,
        "file": main.__dict__.get("__file__"),
        "spec": getattr(main.__spec__, "name", None),
        "package": main.__package__,
        "loader": type(main.__loader__).__name__,
        "doc": main.__doc__,
        "cached": main.__dict__.get("__cached__"),
    }


def dataset_batches():
    """A DataLoader with spawned and with forked workers over a class of __main__."""
    import torch.utils.data

    out = {}
    for method in ("spawn", "fork"):
        loader = torch.utils.data.DataLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context=method)
        out[method] = [b.tolist() for b in loader]
    return out


class Numbers:
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return i * 10


def threads_of(process):
    return len(os.listdir(f"/proc/{process}/task"))


def working_threads(at_first):
    """After products that are worth several threads. Last: OpenMP's do not survive a fork."""
    import time

    import numpy
    import torch

    limit = time.monotonic() + 20
    while threads_of(os.getpid()) > at_first and time.monotonic() < limit:
        time.sleep(0.05)  # the pool's and the loader's threads wind down
    numpy.ones((200, 200)) @ numpy.ones((200, 200))
    blas = threads_of(os.getpid())
    torch.ones(300, 300) @ torch.ones(300, 300)
    return blas, threads_of(os.getpid())


def collect():
    import multiprocessing
    import random
    import threading

    # A script that reaches what the fork server imports ahead: warning filters and threads come with them.
    import numpy
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    early_threads, seed = threads_of(os.getpid()), torch.initial_seed()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.map(square, [Thing(3)])[0].x

    facts = {
        **EARLY,
        "threads": early_threads,
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "main": main_facts(),
        "path": sys.path,
        "flags": str(sys.flags),
        "executable": sys.executable,
        "prefix": sys.prefix,
        "warnoptions": sys.warnoptions,
        "environ": dict(sorted(os.environ.items())),
        "libc_environ": sorted(os.popen("env").read().splitlines()),
        "proc_cmdline": open("/proc/self/cmdline").read().split("\0"),
        "proc_environ": sorted(open("/proc/self/environ").read().split("\0")),
        "proc_comm": open("/proc/self/comm").read(),
        "cwd": os.getcwd(),
        "umask": [line for line in open("/proc/self/status") if line.startswith("Umask")],
        "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
        "nice": os.nice(0),
        "affinity": sorted(os.sched_getaffinity(0)),
        "oom_score_adj": open("/proc/self/oom_score_adj").read(),
        "signal_mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "signal_handlers": {s: str(signal.getsignal(s)) for s in range(1, 65) if s not in (32, 33)},
        "proc_signals": [line for line in open("/proc/self/status") if line.startswith(("SigB", "SigI", "SigC", "SigP", "Shd"))],
        "session_leader": os.getsid(0) == os.getpid() == os.getpgid(0),
        "stdin": os.readlink("/proc/self/fd/0"),
        "streams": [
            (s.fileno(), s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty(), type(s.buffer).__name__, s.name)
            for s in (sys.stdin, sys.stdout, sys.stderr)
        ],
        "stdout_is": os.path.basename(os.readlink("/proc/self/fd/1"))[-4:],
        "main_thread": threading.current_thread() is threading.main_thread(),
        "threading_ident": threading.get_native_id() == os.getpid(),
        "process_name": multiprocessing.current_process().name,
        "parent_process": str(multiprocessing.parent_process()),
        "start_method": multiprocessing.get_start_method(),
        "pickle_main": pickle.loads(pickle.dumps(Thing(4))).x,
        "spawned": spawned,
        "loader": dataset_batches(),
        "working_threads": working_threads(early_threads),
        "torch_threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch_parallel": torch.__config__.parallel_info(),
        "excepthook": sys.excepthook is sys.__excepthook__,
        "displayhook": sys.displayhook is sys.__displayhook__,
        "recursion": sys.getrecursionlimit(),
        "switch": sys.getswitchinterval(),
        "gc": __import__("gc").get_threshold(),
        "sitecustomize": "sitecustomize" in sys.modules,
        "path_hooks": len(sys.path_hooks),
        "meta_path": [getattr(m, "__name__", type(m).__name__) for m in sys.meta_path],
        "tracing": str((sys.gettrace(), sys.getprofile())),
        "filters": [str(f) for f in __import__("warnings").filters],
        "cuda": (torch.cuda.is_initialized(), torch.cuda.is_available()),
        "capabilities": [line for line in open("/proc/self/status") if line.startswith(("Cap", "NoNewPrivs", "Seccomp:"))],
    }
    try:
        from threadpoolctl import threadpool_info

        facts["pools"] = threadpool_info()
    except ImportError:
        pass
    # Drawn from the system's entropy: must differ between any two processes.
    random_facts = {
        "random": random.random(),
        "torch": seed,
        "numpy": float(numpy.random.rand()),
        "authkey": multiprocessing.current_process().authkey.hex(),
    }
    return facts, random_facts


if __name__ == "__main__":
    facts, drawn = collect()
    with open(os.environ["EVERSTEP_FACTS"], "w") as file:
        json.dump({"facts": facts, "drawn": drawn}, file, indent=1)
    print("to stdout")
    print("to stderr", file=sys.stderr)
    if "--raise" in sys.argv:
        raise ValueError("on purpose")
    if "--exit" in sys.argv:
        sys.exit(5)
