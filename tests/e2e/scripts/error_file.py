"""Writes the error file of torch.distributed.elastic by itself and exits 7 in the first FAILS generations."""

import json
import os
import sys
import time


def main() -> None:
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with open(os.environ["PROGRESS"], "a", buffering=1) as progress:
        for step in range(10):
            progress.write(f"{step + 1} {rank} {os.getpid()}\n")
            time.sleep(0.03)
    if rank == 0 and attempt < int(os.environ.get("FAILS", "0")):
        report = {"message": {"message": "disk of rank 0 is gone", "extraInfo": {"py_callstack": "here", "timestamp": str(int(time.time()))}}}
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as out:
            json.dump(report, out)
        sys.exit(7)
    print(f"rank {rank} finished", flush=True)


if __name__ == "__main__":
    main()
