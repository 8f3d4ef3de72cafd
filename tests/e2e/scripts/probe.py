"""Says what a worker was given, as one JSON file a rank, and ends as it is told. Imports no torch unless asked."""

import json
import os
import signal
import sys
import time


def await_others(count: str) -> None:
    """A launcher ends the others as soon as it sees one fail: they must have said their part before, at most 20 s."""
    until = time.monotonic() + 20
    for rank in range(int(os.environ.get("WORLD_SIZE", "1"))):
        theirs = os.path.join(os.environ["FACTS"], f"{rank}-{count}.json")
        while not os.path.exists(theirs) and time.monotonic() < until:
            time.sleep(0.005)


def main() -> None:
    rank = os.environ.get("RANK", "none")
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "none")
    facts = {
        "environment": dict(os.environ),
        "arguments": sys.argv,
        "directory": os.getcwd(),
        "umask": os.umask(0o22),
        "unbuffered": sys.stdout.write_through or sys.flags.unbuffered,
        "name": __name__,
        "path0": sys.path[0],
    }
    print(f"out of rank {rank}")
    print(f"err of rank {rank}", file=sys.stderr)
    sys.stdout.flush()
    mine = os.path.join(os.environ["FACTS"], f"{rank}-{count}.json")
    with open(f"{mine}.part", "w") as out:
        json.dump(facts, out)
    os.rename(f"{mine}.part", mine)
    ending = os.environ.get("ENDING", "")
    if rank not in os.environ.get("ENDING_RANKS", "0").split(","):
        ending = ""
    if int(count if count != "none" else 0) >= int(os.environ.get("ENDING_COUNT", "1000")):
        ending = ""
    if ending:
        await_others(count)
    if ending == "exit3":
        sys.exit(3)
    if ending == "raise":
        raise ValueError("boom")
    if ending == "record":
        from torch.distributed.elastic.multiprocessing.errors import record

        @record
        def fail() -> None:
            raise ValueError("boom")

        fail()
    if ending.startswith("signal"):
        os.kill(os.getpid(), int(ending.removeprefix("signal")))
        signal.pause()


if __name__ == "__main__":
    main()
