"""What a capture costs: two nodes on loopback with their agents and keepers, a state of 64 float32 tensors.

Cases first-SIZE (a fresh arena's first save), blocking-SIZE, overlapped-SIZE and shares-SIZE (from the second save on; shares:
both ranks hold the state, each captures half of it, and both restore all of it at once). With --modes alone,copies3,parity:
four nodes, a state of SIZE each, kept on no other node, on two others, or by rs(2+2), which survives as much. Metrics,
each a multiple (x) of one warm memcpy of the same bytes in the same process, measured around it:
  blocked     how long the training waits: step(), and in overlapped mode optimizer.step()'s wait for the copy
  replicated  from step() until the step is committed: checked on the peer's node (its parities made) and recorded by the controller
  step_time   overlapped: of a step of 20 memcpys' computation with a capture beside it, a multiple of one without
  restored    restore() of a new process after SIGKILL, from the node's memory, every byte checked
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path

from common import BIN, ROOT, Results, before_all_others, free_port

SCRIPT = ROOT / "tests/bench/scripts/capture.py"
SIZES = {"16MiB": 16 << 20, "64MiB": 64 << 20, "1GiB": 1 << 30}
KEPT = {"alone": "replicate(1)", "copies3": "replicate(3)", "parity": "rs(2+2)"}  # by mode, on four nodes


def launch(everstep: Path, mode: str, size: int, steps: int, limit: float, realtime: bool) -> list[dict]:
    """One job of two nodes, or four; the lines that rank 0 wrote."""
    count = 4 if mode in KEPT else 2
    flags = ["--redundancy", KEPT[mode]] if mode in KEPT else []
    with tempfile.TemporaryDirectory(prefix="esc-", dir="/tmp") as folder:
        out = Path(folder) / "out"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "EVERSTEP_", "TORCHELASTIC", "CAPTURE_"))}
        env |= {"BENCH_OUT": str(out), "CAPTURE_MODE": mode, "CAPTURE_BYTES": str(size), "CAPTURE_STEPS": str(steps),
                "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "worker/python"),
                "EVERSTEP_LIBRARY": os.environ.get("EVERSTEP_LIBRARY", str(everstep.resolve().parent.parent / "lib/libeverstep.so"))}
        port = free_port()
        nodes = []
        try:
            for i in range(count):
                args = ["run", "--state-dir", f"{folder}/s{i}", "--nnodes", str(count), "--nproc-per-node", "1", *flags,
                        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", f"bench{port}",
                        "--node-rank", str(i), "--max-restarts", "3", str(SCRIPT)]
                nodes.append(subprocess.Popen([str(everstep), *args], env=env, stdin=subprocess.DEVNULL,
                                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                              preexec_fn=before_all_others if realtime else None))
            said = [n.communicate(timeout=limit)[0] for n in nodes]
        finally:
            for n in nodes:
                if n.poll() is None:
                    n.terminate()
                    try:
                        n.wait(15)
                    except subprocess.TimeoutExpired:
                        n.kill()
                        n.wait()
        if any(n.returncode for n in nodes) or not out.exists():
            raise SystemExit(f"error: {mode}, {size} bytes: the job ended with {[n.returncode for n in nodes]}\n" + "\n".join(said))
        return [json.loads(line) for line in out.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="jobs of each mode and size")
    parser.add_argument("--steps", type=int, default=6, help="captures of each job")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true", help="also print the table for docs/reference/performance.md")
    parser.add_argument("--sizes", default="64MiB,1GiB")
    parser.add_argument("--modes", default="blocking,overlapped,shares")
    parser.add_argument("--everstep", type=Path, default=BIN / "everstep")
    parser.add_argument("--realtime", action="store_true", help="before all other processes of a busy machine (as root)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one job")
    args = parser.parse_args()
    results = Results("capture")
    for size in args.sizes.split(","):
        for run in range(args.runs):
            for mode in args.modes.split(","):
                # The smallest job gives the first save's restore; the others restore what later saves left.
                if mode == "blocking":
                    for row in launch(args.everstep, mode, SIZES[size], 1, args.limit, args.realtime):
                        results.add(f"first-{size}", "everstep", row["metric"], "x", row["value"])
                rows = launch(args.everstep, mode, SIZES[size], args.steps, args.limit, args.realtime)
                for row in rows:
                    if row.get("when") != "first":
                        results.add(f"{mode}-{size}", "everstep", row["metric"], "x", row["value"])
                memcpy = sorted(r["memcpy"] for r in rows if "memcpy" in r)
                print(f"{mode} {size} {run + 1}/{args.runs}: memcpy {SIZES[size] / 2**30 / memcpy[len(memcpy) // 2]:.1f} GiB/s  "
                      + "  ".join(f"{r['metric']}{' first' if r.get('when') == 'first' else ''} {r['value']:.2f}" for r in rows), flush=True)
    results.finish(args)


if __name__ == "__main__":
    main()
