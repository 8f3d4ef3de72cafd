"""A worker of a session that trains nothing: tells what it is on stdout, parks when asked, goes on when resumed.

    parked.py           parks at once
    parked.py deaf      opens its session and never parks
    parked.py leaves    closes its session when it is asked to park
"""

import os
import sys
import threading
import time

from everstep._session_link import Link


def tell(*words: object) -> None:
    print(*words, flush=True)


def main() -> None:
    how = sys.argv[1] if len(sys.argv) > 1 else ""
    asked = threading.Event()
    link = Link(os.environ["EVERSTEP_KEEPER"], os.environ["EVERSTEP_JOB"], int(os.environ["RANK"]),
                int(os.environ["EVERSTEP_GENERATION"]), asked.set)
    tell("open", os.getpid())
    while True:
        asked.wait()
        if how == "leaves":
            link.close()
        if how:
            time.sleep(600)
        link.parked()
        resume = link.wait_resume()
        asked.clear()
        with open(resume.stdout, "a") as file:
            print("resumed", resume.generation, resume.environment["RANK"], resume.environment["WORLD_SIZE"],
                  os.getpid(), file=file, flush=True)


if __name__ == "__main__":
    main()
