"""A process that hosts one generation's TCPStore and watches whether its process group forms.

    python everstep_store_host.py STATUS_FD KEEPER_PID ADDRESS PORT [LISTENER_FD]

The keeper has bound the port already and hands the listener over; only where ADDRESS is a name is it bound here.
Lines on STATUS_FD: "P<pid>", "port <n>" (bound here), "serving", "reached <ranks>" when so many ranks of gloo's default
group have put their addresses there, or "E<text>". Ends with the keeper.
"""

import os
import sys
import time


def serve(status: int, keeper: int, address: str, port: int, listener_fd: int = -1) -> None:
    def say(line: str) -> None:
        os.write(status, (line + "\n").encode())

    try:
        import ctypes
        import importlib.util
        import signal
        import socket

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != keeper:
            os._exit(1)
        say(f"P{os.getpid()}")
        if importlib.util.find_spec("torch") is None:
            raise ModuleNotFoundError("No module named 'torch'")
        if listener_fd >= 0:
            listener = socket.socket(fileno=listener_fd)
        else:
            family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen(2048)
            # Importing torch takes a second; ranks that connect meanwhile wait in the listener's queue.
            say(f"port {listener.getsockname()[1]}")
        host, port = listener.getsockname()[:2]
        from torch.distributed import TCPStore

        store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        say("serving")
    except Exception as problem:  # noqa: BLE001  the keeper must hear of anything
        say(f"E{type(problem).__name__}: {problem}".replace("\n", " "))
        os._exit(1)
    watch(store, say)
    while True:
        time.sleep(3600)


def watch(store, say) -> None:
    """Tells when the ranks of gloo's default group have all put their addresses, keys default_pg/.../RANK."""
    if not hasattr(store, "list_keys"):
        return
    last = (0, 0)
    while True:
        time.sleep(0.1)
        count = store.num_keys()
        if count == last[0]:
            continue
        ranks = set()
        for key in store.list_keys():
            parts = key.split("/")
            # default_pg/0//cpu//0/RANK
            if parts[0] == "default_pg" and len(parts) == 7 and parts[3] == "cpu" and parts[-1].isdigit():
                ranks.add(int(parts[-1]))
        if len(ranks) != last[1] and ranks:
            say(f"reached {len(ranks)}")
        last = (count, len(ranks))


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), *map(int, sys.argv[5:]))
