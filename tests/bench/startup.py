"""Launch to exit of a script that does nothing: everstep run (preload off and on) beside torchrun."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

from common import BIN, Results

SYSTEMS = {
    "everstep --no-preload": [str(BIN / "everstep"), "run", "--standalone", "--no-preload"],
    "everstep": [str(BIN / "everstep"), "run", "--standalone"],
    "torchrun": [str(BIN / "torchrun"), "--standalone"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = Results("startup")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "nothing.py"
        script.write_text("pass\n")
        for i in range(args.runs + 1):  # the first round warms the page cache and does not count
            for system, command in SYSTEMS.items():
                began = time.monotonic()
                done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120)
                if done.returncode:
                    raise SystemExit(f"error: {system} ended with {done.returncode}\n{done.stdout}{done.stderr}")
                if i:
                    results.add("script that does nothing", system, "launch_to_exit", "s", time.monotonic() - began)
    results.print()
    results.write(args.json)


if __name__ == "__main__":
    main()
