"""Steps without torch: appends `step rank pid generation` to $PROGRESS until the file $PROGRESS.end is there.

$IGNORE_TERM: SIGTERM does nothing. $GOODBYE: SIGTERM is answered with a line in that file, and an exit.
"""

import os
import signal
import sys
import time


def main() -> None:
    progress = os.environ["PROGRESS"]
    if os.environ.get("IGNORE_TERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.environ.get("GOODBYE"):

        def leave(number: int, _frame: object) -> None:
            with open(os.environ["GOODBYE"], "a") as out:
                out.write(f"{os.environ['RANK']} {number}\n")
            sys.exit(0)

        signal.signal(signal.SIGTERM, leave)
    with open(progress, "a", buffering=1) as out:
        step = 0
        while not os.path.exists(progress + ".end"):
            step += 1
            out.write(f"{step} {os.environ['RANK']} {os.getpid()} {os.environ.get('EVERSTEP_GENERATION', '0')}\n")
            time.sleep(0.02)
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} finished", flush=True)


if __name__ == "__main__":
    main()
