"""A worker of a session that trains nothing: tells what it is on stdout, parks when asked, goes on when resumed.

    parked.py           parks at once
    parked.py deaf      opens its session and never parks
    parked.py leaves    closes its session when it is asked to park
    parked.py ends      parks once it may not end its step any more
    parked.py tells     tells its controller three words before that, and one when it is resumed
"""

import os
import sys
import threading
import time

from everstep import _told
from everstep._session_link import Link


def tell(*words: object) -> None:
    print(*words, flush=True)


def flush(link: Link) -> None:
    left = link.flush(60)
    tell("acknowledged", link.acknowledged, left)


def main() -> None:
    how = sys.argv[1] if len(sys.argv) > 1 else ""
    asked = threading.Event()
    link = Link(os.environ["EVERSTEP_KEEPER"], os.environ["EVERSTEP_JOB"], int(os.environ["RANK"]),
                int(os.environ["EVERSTEP_GENERATION"]), asked.set)
    tell("open", os.getpid())
    if how == "tells":
        for kind, body in ((_told.LEDGER, b"one"), (_told.PLAN, b"two"), (_told.LEDGER, b"")):
            link.tell(kind, body)
        threading.Thread(target=flush, args=(link,), daemon=True).start()
    while True:
        asked.wait()
        if how == "ends":
            tell("may", link.boundary)
            while link.boundary:
                time.sleep(0.01)
        if how == "leaves":
            link.close()
        if how in ("deaf", "leaves"):
            time.sleep(600)
        link.parked()
        resume = link.wait_resume()
        asked.clear()
        with open(resume.stdout, "a") as file:
            print("resumed", resume.generation, resume.environment["RANK"], resume.environment["WORLD_SIZE"],
                  os.getpid(), file=file, flush=True)
        if how == "tells":
            link.tell(_told.LEDGER, f"one of {resume.generation}".encode())


if __name__ == "__main__":
    main()
