"""The fork server: sitecustomize of a job's own interpreter, in a process that has the worker's own command line.

The keeper starts `python -u train.py ...` with this folder first in PYTHONPATH. While that interpreter still
initialises (site imports sitecustomize), this file imports what training scripts need and then waits. For each
worker it forks a child that takes the worker's environment, logs, folder and arguments, undoes every trace of this
file, and returns: the interpreter goes on and runs the script as __main__ by its own means. So a forked worker is not
an imitation of a fresh one; it is one whose imports were done before.

Two stages. The keeper's first command line is a harmless one; this file then executes the real one in the same
process. An interpreter that ignores PYTHONPATH (-I, -E) never gets that far, and the keeper starts fresh processes.

From the keeper, on a socket: frames of length-prefixed fields; with a request comes the descriptor on which the child
answers: "P<pid>" it begins, "E<text>" it cannot, "R<text>" nothing was forked, a fresh process must do.
To the keeper, on a pipe: "store" store hosts can be forked, "ready <text>", "failed <text>".
"""

import os
import sys

# What real scripts reach before their first step; DistributedDataParallel imports torch._dynamo by itself.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.optim",
    "torch.utils.data",
    "numpy",
    "torch._dynamo",
    "torch.distributed.elastic.multiprocessing.errors",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
)
MOST_SEEDS = 16
PR_SET_PDEATHSIG, PR_SET_MM, PR_SET_MM_MAP = 1, 35, 14
SIGKILL = 9


def say(fd, text):
    os.write(fd, (text.replace("\n", " ") + "\n").encode("utf-8", "surrogateescape"))


def thread_count():
    return len(os.listdir("/proc/self/task"))


class Control:
    """The socket to the keeper."""

    def __init__(self, fd):
        self.fd = fd
        self.socket = None

    def fill(self, size):
        out = b""
        while len(out) < size:
            piece = os.read(self.fd, size - len(out))
            if not piece:
                os._exit(0)  # the keeper is gone
            out += piece
        return out

    def read(self):
        """One frame: its fields, and the descriptors that came with it."""
        passed = []
        if self.socket is None:
            head = self.fill(4)
        else:
            import array

            head, extra, _, _ = self.socket.recvmsg(4, 64)
            for _, _, data in extra:
                passed = array.array("i", data).tolist()
            if not head:
                os._exit(0)
            head += self.fill(4 - len(head))
        body = self.fill(int.from_bytes(head, "little"))
        fields, at = [], 0
        while at < len(body):
            size = int.from_bytes(body[at : at + 4], "little")
            fields.append(os.fsdecode(body[at + 4 : at + 4 + size]))
            at += 4 + size
        return fields, passed

    def waiting(self, seconds=0.0):
        import select

        return bool(select.select([self.fd], [], [], seconds)[0])

    def pass_on(self, fields, descriptors):
        import socket

        body = b"".join(len(f).to_bytes(4, "little") + f for f in map(os.fsencode, fields))
        frame = len(body).to_bytes(4, "little") + body
        sent = socket.send_fds(self.socket, [frame], descriptors)
        self.socket.sendall(frame[sent:])

    def close(self):
        if self.socket is None:
            os.close(self.fd)
        else:
            self.socket.close()


def load_part(folder, name):
    """A file beside this one, as a module that sys.modules does not know."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(name, os.path.join(folder, name + ".py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Importing:
    """The environment while modules are imported: BLAS starts no threads, and whether there is a GPU is asked of NVML,
    since CUDA itself would not survive a fork."""

    SET = (("OPENBLAS_NUM_THREADS", "1"), ("PYTORCH_NVML_BASED_CUDA_CHECK", "1"))

    def __enter__(self):
        self.before = {key: os.environ.get(key) for key, _ in self.SET}
        os.environ.update(self.SET)

    def __exit__(self, *_):
        for key, value in self.before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def load(names, control, serve, between=lambda name: None):
    import importlib

    for name in names:
        if name in sys.modules:
            continue
        try:
            importlib.import_module(name)
        except Exception as problem:  # noqa: BLE001  the script will meet it itself, if it needs it
            print(f"fork server: import {name}: {type(problem).__name__}: {problem}", file=sys.stderr)
        between(name)
        while control is not None and control.waiting():
            serve(*control.read())


# --- BLAS threads: none while we fork, as many as a fresh import would start afterwards ---


def blas_libraries():
    import ctypes

    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "openblas" in line}
    found = []
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        for prefix in ("scipy_", ""):
            for suffix in ("64_", "_64", ""):
                try:
                    found.append(
                        (
                            getattr(library, f"{prefix}openblas_set_num_threads{suffix}"),
                            getattr(library, f"{prefix}openblas_get_num_procs{suffix}"),
                        )
                    )
                    break
                except AttributeError:
                    continue
            else:
                continue
            break
    return found


def restore_blas_threads(libraries):
    wish = 0
    for key in ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(key, "").split(",")[0]
        if value.isdigit() and int(value) > 0:
            wish = int(value)
            break
    for set_threads, processors in libraries:
        count = min(wish, processors()) if wish else processors()
        if count > 1:
            set_threads(count)


# --- the child ---


def show_command(libc, argv, environment):
    """Gives /proc/PID/cmdline and environ the worker's own text. Best effort: old kernels refuse."""
    import ctypes

    arguments = b"".join(os.fsencode(a) + b"\0" for a in argv)
    variables = b"".join(os.fsencode(f"{k}={v}") + b"\0" for k, v in environment)
    with open("/proc/self/stat", "rb") as file:
        fields = [int(f) for f in file.read().rpartition(b")")[2].split()[1:]]  # from field 4 on
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.sbrk.restype = ctypes.c_void_p
    size = len(arguments) + len(variables)
    memory = libc.mmap(None, size, 3, 0x22, -1, 0)
    if memory in (None, ctypes.c_void_p(-1).value):
        return
    ctypes.memmove(memory, arguments + variables, size)
    u64 = ctypes.c_uint64
    names = "start_code end_code start_data end_data start_brk brk start_stack arg_start arg_end env_start env_end"

    class Map(ctypes.Structure):
        _fields_ = [(n, u64) for n in names.split()] + [
            ("auxv", ctypes.c_void_p),
            ("auxv_size", ctypes.c_uint32),
            ("exe_fd", ctypes.c_uint32),
        ]

    middle = memory + len(arguments)
    chart = Map(
        fields[22], fields[23], fields[41], fields[42], fields[43], libc.sbrk(0), fields[24],
        memory, middle, middle, memory + size, None, 0, 0xFFFFFFFF,
    )  # fmt: skip
    libc.prctl(PR_SET_MM, PR_SET_MM_MAP, ctypes.byref(chart), ctypes.sizeof(chart), 0)


def open_log(path, number):
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        fd = os.open(path or "/dev/null", flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        fd = os.open(path, flags, 0o666)
    except OSError as problem:
        raise OSError(f"cannot open the worker's log {path}: {problem.strerror}; choose another --log-dir") from None
    os.dup2(fd, number)
    os.close(fd)


def reseed():
    """What a fresh process draws from the system at import. `random` reseeds itself at a fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)
    logging = sys.modules.get("logging")
    if logging is not None:
        import time

        logging._startTime = time.time_ns() if isinstance(logging._startTime, int) else time.time()


def settle(libc, keeper):
    """In a grandchild: waits until the keeper is its parent, to die with it, and leads a session of its own."""
    import time

    limit = time.monotonic() + 10
    while os.getppid() != keeper:  # until the process between us is gone
        if time.monotonic() > limit:
            os._exit(127)
        os.sched_yield()
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:
        os._exit(127)
    os.setsid()


def become_worker(libc, fields, answer, command, server_args, blas, set_by_imports):
    try:
        cwd, mask, out, err, count = fields[:5]
        args = fields[5 : 5 + int(count)]
        environment = [entry.partition("=")[::2] for entry in fields[5 + int(count) :]]
        open_log(out, 1)
        if err == out:
            os.dup2(1, 2)
        else:
            open_log(err, 2)
        os.umask(int(mask))
        if cwd:
            try:
                os.chdir(cwd)
            except OSError as problem:
                raise OSError(f"cannot enter the job's folder {cwd}: {problem.strerror}") from None
        os.environ.clear()
        os.environ.update(environment)
        for key, value in set_by_imports.items():
            os.environ.setdefault(key, value)
        command[len(command) - server_args :] = args
        for argv in (sys.argv, getattr(sys, "orig_argv", [])):
            argv[len(argv) - server_args :] = args if argv else []
        reseed()
        restore_blas_threads(blas)
        show_command(libc, command, environment)
        os.write(answer, b"P%d\n" % os.getpid())
        os.close(answer)
    except BaseException as problem:  # noqa: BLE001  the keeper must hear of anything
        try:
            say(answer, f"E{problem}")
        finally:
            os._exit(127)  # also when it waits no longer: another process is the worker then


def become_store_host(folder, listener, answer, keeper):
    try:
        load_part(folder, "everstep_store_host").serve(answer, keeper, "", 0, listener)
    except BaseException as problem:  # noqa: BLE001
        say(answer, f"E{problem}")
    finally:
        os._exit(1)


# --- the server ---


def check(libc, imports):
    """No thread and no CUDA context may exist when we fork."""
    if thread_count() != 1:
        raise imports.ImportedTooMuch(f"the imports started threads ({thread_count() - 1})")
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda"):
        return
    if torch.cuda.is_initialized():
        raise imports.ImportedTooMuch("the imports initialised CUDA")
    child = os.fork()
    if child == 0:
        os._exit(9 if torch.cuda._is_in_bad_fork() else 0)
    if os.waitpid(child, 0)[1] != 0:
        raise imports.ImportedTooMuch("the imports touched CUDA, which does not survive a fork")


class Seeds:
    """Children forked ahead, each one fork away from a worker: so that a generation's workers start side by side."""

    def __init__(self, libc):
        self.libc = libc
        self.idle = []
        self.spent = []

    def plant(self, forsake):
        """None in the server; in the child, once, the channel on which its request comes."""
        import socket

        ours, theirs = socket.socketpair()
        server, child = os.getpid(), os.fork()
        channel = Control((ours if child else theirs).fileno())
        channel.socket = ours if child else theirs
        (theirs if child else ours).close()
        if child:
            self.idle.append((child, channel))
            return None
        self.libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(0)
        forsake()
        self.forsake()
        return channel

    def forsake(self):
        for _, channel in self.idle:
            channel.close()

    def use(self, fields, passed):
        """False: there is none, or it is gone."""
        while self.idle:
            child, channel = self.idle.pop()
            self.spent.append(child)
            try:
                channel.pass_on(fields, passed)
            except OSError:
                continue
            finally:
                channel.close()
            return True
        return False

    def discard(self):
        """They know less than the server does now."""
        self.forsake()
        self.spent += [child for child, _ in self.idle]
        self.idle = []

    def reap(self):
        self.spent = [child for child in self.spent if os.waitpid(child, os.WNOHANG)[0] == 0]


def run_server(folder, config, control, status, keeper, imports):
    """Returns only in a worker, as the exception Worker."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    _, kind, target, *argv = config.command
    modules = config.preload[1:]
    control_fd = control.fd
    import socket

    control.socket = socket.socket(fileno=control_fd)
    os.set_inheritable(control_fd, False)
    os.set_inheritable(status, False)
    fixed = {"1": 3, "2": 4, "4": 5}[kind]  # python -u SCRIPT | -m MODULE | -c CODE SCRIPT
    server_args = len(argv) - fixed
    before = set(sys.modules)
    blas, set_by_imports = [], {}
    seeds = Seeds(libc)

    def grow(fields, passed):
        """In the grandchild: what it was asked to be."""
        settle(libc, keeper)
        if fields[0] == "store":
            become_store_host(folder, passed[1], passed[0], keeper)
        become_worker(libc, fields[1:], passed[0], argv, server_args, blas, set_by_imports)
        if kind == "4":
            follow_main()
        raise Worker

    def forsake():
        """In a child: the server's own descriptors."""
        control.close()
        os.close(status)

    def learn(pid):
        """Imports what the first generation came to import by itself; a child tries it first."""
        try:
            names = [n for n in imports.extension_modules(pid) if n.split(".")[0] not in local]
        except OSError:
            return  # it has ended
        if not names:
            return
        child = os.fork()
        if child == 0:
            forsake()
            with Importing():
                load(names, None, None)
            torch = sys.modules.get("torch")
            os._exit(thread_count() != 1 or (torch is not None and torch.cuda.is_initialized()))
        if os.waitpid(child, 0)[1] != 0:
            print(f"fork server: not learnt, they start threads or CUDA: {' '.join(names)}", file=sys.stderr)
            return
        with Importing():
            load(names, control, serve)
        blas[:] = blas_libraries()
        seeds.discard()
        say(status, f"learnt {' '.join(names)}")

    def serve(fields, passed):
        if fields[0] == "learn":
            learn(int(fields[1]))
        elif thread_count() != 1:
            say(passed[0], f"Rthe fork server has {thread_count()} threads")
        elif fields[0] != "worker" or not seeds.use(fields, passed):
            child = os.fork()
            if child == 0:
                if os.fork():
                    os._exit(0)
                forsake()
                seeds.forsake()
                grow(fields, passed)
            os.waitpid(child, 0)
        for fd in passed:
            os.close(fd)

    def between(name):
        if name == "torch.distributed" and thread_count() == 1:
            say(status, "store")

    import time

    began = time.monotonic()
    path, folders = imports.source_of(kind, target)
    local = imports.local_names(folders)
    hints = []
    if modules:
        names = modules
    else:
        if not imports.scan(path, local, hints, set()):
            raise imports.Refused("the script imports nothing that is installed: a fresh process starts as fast")
        names = [*PRELOAD, *(hints if config.stage == "2" else [])]
    variables = dict(os.environ)
    with Importing():
        load(names, control, serve, between)
    set_by_imports.update({k: v for k, v in os.environ.items() if variables.get(k) != v})
    shadowed = {m.split(".")[0] for m in set(sys.modules) - before} & set(local)
    if shadowed:
        name = min(shadowed)
        raise imports.Refused(f"{local[name]} takes the place of an imported module ({name})")
    check(libc, imports)
    blas.extend(blas_libraries())
    os.close(config.fd)
    import gc

    gc.collect()
    gc.freeze()
    say(status, f"ready {len(sys.modules)} modules in {time.monotonic() - began:.1f} s")
    want, burst = 2, 0
    while True:
        seeds.reap()
        # Ahead of need, but not while a generation starts: it needs the processors.
        if len(seeds.idle) < want and thread_count() == 1 and not control.waiting(1.0 if burst else 0.0):
            burst = 0
            if (own := seeds.plant(forsake)) is not None:
                fields, passed = own.read()
                if os.fork():
                    os._exit(0)
                own.close()
                grow(fields, passed)
            continue
        fields, passed = control.read()
        if fields[0] == "worker":
            burst += 1
            want = min(max(want, burst), MOST_SEEDS)
        serve(fields, passed)


def follow_main():
    """multiprocessing keeps the __main__ it was imported under as __mp_main__; runpy.run_path makes another one."""
    if "__mp_main__" in sys.modules:
        alias = type(sys)("__main__")
        alias.__getattr__ = lambda name: getattr(sys.modules["__main__"], name)
        sys.modules["__mp_main__"] = alias


class Worker(Exception):
    """Unwinds the server's frames in a worker."""


class Config:
    """What the keeper said first. Outlives an execve in a memfd, so that each stage can read it."""

    def __init__(self, stage, fd):
        self.stage = stage
        self.fd = fd
        self.command = self.preload = ()

    def receive(self, control):
        self.fd = os.memfd_create("everstep-fork-server", 0)
        for _ in range(2):
            head = control.fill(4)
            os.write(self.fd, head + control.fill(int.from_bytes(head, "little")))

    def load(self):
        os.lseek(self.fd, 0, os.SEEK_SET)
        frames = Control(self.fd)
        self.command, self.preload = frames.read()[0], frames.read()[0]


def enter(folder):
    environment = dict(os.environ)
    spec = os.environ.pop("EVERSTEP_FORK_SERVER", "")
    own_path = os.environ.pop("EVERSTEP_FORK_SERVER_PYTHONPATH", None)
    if own_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = own_path
    if not spec:
        return
    stage, control_fd, status, keeper, config_fd = spec.split(":")
    control = Control(int(control_fd))
    imports = load_part(folder, "everstep_script_imports")
    config = Config(stage, int(config_fd))

    def again(next_stage):
        environment["EVERSTEP_FORK_SERVER"] = f"{next_stage}:{control_fd}:{status}:{keeper}:{config.fd}"
        for fd in (control.fd, int(status), config.fd):
            os.set_inheritable(fd, True)
        os.execvpe(config.command[3], config.command[3:], environment)

    try:
        if stage == "1":
            config.receive(control)
            config.load()
            again("2")
        config.load()
        try:
            run_server(folder, config, control, int(status), int(keeper), imports)
        except imports.Refused as refused:
            if stage != "2" or config.preload[1:] or not refused.after_imports:
                raise
            print(f"fork server: {refused}; once more without the script's own imports", file=sys.stderr)
            again("3")
    except Worker:
        return
    except BaseException as problem:  # noqa: BLE001
        try:
            if isinstance(problem, imports.Refused):
                say(int(status), f"failed {problem}")
            else:
                import traceback

                traceback.print_exc()
                say(int(status), f"failed {type(problem).__name__}: {problem}")
        except BaseException:  # noqa: BLE001  nobody listens any more
            pass
    # Never fall through to the user's script: this is no worker.
    os._exit(98)


def leave_no_trace(folder):
    """Undoes our part of sys.path and runs the sitecustomize that the interpreter would have found without us."""
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != folder]
    for key in list(sys.path_importer_cache):
        if os.path.abspath(key or ".") == folder:
            del sys.path_importer_cache[key]
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None:
        # site takes this as "there is none".
        raise ImportError("no sitecustomize", name="sitecustomize")
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    FOLDER = os.path.dirname(os.path.abspath(__file__))
    enter(FOLDER)
    leave_no_trace(FOLDER)
