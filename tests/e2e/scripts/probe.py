"""Says what a worker was given, as one JSON file a rank, and ends as it is told. Imports no torch unless asked."""

import json
import os
import signal
import sys


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
    with open(os.path.join(os.environ["FACTS"], f"{rank}-{count}.json"), "w") as out:
        json.dump(facts, out)
    print(f"out of rank {rank}")
    print(f"err of rank {rank}", file=sys.stderr)
    sys.stdout.flush()
    ending = os.environ.get("ENDING", "")
    if rank not in os.environ.get("ENDING_RANKS", "0").split(","):
        ending = ""
    if int(count if count != "none" else 0) >= int(os.environ.get("ENDING_COUNT", "1000")):
        ending = ""
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
