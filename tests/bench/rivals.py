"""The same state saved and restored by Everstep and by others, interleaved: 64 float32 tensors a rank.

Cases SIZE-wW: SIZE bytes of each of W ranks. Systems everstep and everstep:overlapped (a node a rank, on loopback), and in
environments of their own (tests/bench/environments.py) torch.save, torch.distributed.checkpoint, torchsnapshot, DLRover flash
checkpoint, lm-resiliency and nvidia-resiliency-ext, each as its documentation would have it set up on CPUs; their files lie
on tmpfs. One that cannot run is listed with its error. Metrics, of rank 0:
  first, blocked  how long training waits: the save, and after four memcpys of computation for what is not yet copied
  complete        from the save's begin until all that the system does for it is done (`where` in the table)
  restored        of a new process, after rank 0's exit with an error: into the tensors, every bit compared afterwards
  memory          growth of all processes' own and shared pages and tmpfs files, in units of the state (x)
  descriptors     growth of rank 0's open files
Times in x (one warm memcpy of a rank's bytes in the same process, measured around it) and in s.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import environments
from common import Results, command, figure, machine
from launching import Failed, Job, end_in_order, version

SIZES = {"4MiB": 4 << 20, "16MiB": 16 << 20, "64MiB": 64 << 20, "1GiB": 1 << 30}
SYSTEMS = ["everstep", "everstep:overlapped", "torch_save", "dcp:thread", "dcp:process", "torchsnapshot", "dlrover", "lm_resiliency", "nvrx"]
TIMES = ("first", "blocked", "complete", "restored")


class Notes:
    """What is said of a system beside its figures."""

    def __init__(self) -> None:
        self.config: dict[str, str] = {}
        self.place: dict[tuple[str, str], str] = {}
        self.errors: dict[tuple[str, str], list[str]] = {}

    def failed(self, case: str, system: str, text: str) -> None:
        told = self.errors.setdefault((case, system), [])
        if text not in told:
            told.append(text)


def measure(case: str, system: str, size: int, ranks: int, args: argparse.Namespace, results: Results, notes: Notes) -> None:
    env = {"RIVAL_BYTES": str(size), "RIVAL_SAVES": str(args.saves), "RIVAL_END": "fail"}
    with Job(system, ranks, "rival.py", env, args.realtime, args.limit) as job:
        try:
            rows = job.run()
        except Failed as error:
            notes.failed(case, system, str(error))
            rows = [row for row in job.rows() if "trace" not in row]
    for row in rows:
        if "config" in row:
            notes.config[system], notes.place[(case, system)] = row["config"], row["place"]
        elif row["metric"] in TIMES:
            results.add(case, system, row["metric"], "x", row["value"])
            results.add(case, system, row["metric"], "s", row.get("seconds"))
            if "error" in row:
                notes.failed(case, system, f"{row['metric']}: {row['error']}")
        else:
            results.add(case, system, row["metric"], "x" if row["metric"] == "memory" else "open files", row["value"])
    print(f"{case} {system}: " + "  ".join(f"{r['metric']} {figure(r['value'])}" for r in rows if "metric" in r), flush=True)


def markdown(results: Results, notes: Notes, versions: dict[str, str]) -> str:
    """One row a system: medians, times as multiples of one memcpy."""
    lines = [f"`{command()}`; {machine()}.", "",
             "| case | system | first save blocks | save blocks | complete | restored | memory | files open | where it lies when complete |",
             "|---|---|---|---|---|---|---|---|---|"]
    medians = {(r["case"], r["system"], r["metric"], r["unit"]): r["median"] for r in results.rows()}
    for case, system in dict.fromkeys((r["case"], r["system"]) for r in results.rows()):
        cells = []
        for metric in (*TIMES, "memory"):
            value, seconds = medians.get((case, system, metric, "x")), medians.get((case, system, metric, "s"))
            cells.append("-" if value is None else f"{figure(value)}x" + ("" if seconds is None else f" ({figure(seconds)} s)"))
        files = medians.get((case, system, "descriptors", "open files"))
        cells.append("-" if files is None else f"{files:.0f}")
        lines.append("| " + " | ".join([case, system, *cells, notes.place.get((case, system), "-")]) + " |")
    lines += ["", *(f"- {system} ({versions.get(system, 'not installed')}): {config}" for system, config in notes.config.items())]
    lines += [f"- {case}, {system}: {text}" for (case, system), told in notes.errors.items() for text in told]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="jobs of each system and case, by turns")
    parser.add_argument("--saves", type=int, default=4, help="saves of each kind in a job, the first one not counted")
    parser.add_argument("--sizes", default="64MiB,1GiB")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", action="store_true", help="also print the table for docs/reference/performance.md")
    parser.add_argument("--realtime", action="store_true", help="before all other processes of a busy machine (as root)")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one job")
    args = parser.parse_args()
    end_in_order()
    results, notes, versions = Results("rivals"), Notes(), {}
    systems: list[Any] = []
    cases = [(f"{size}-w{ranks}", SIZES[size], int(ranks)) for size in args.sizes.split(",") for ranks in args.ranks.split(",")]
    for system in args.systems.split(","):
        try:
            environments.python(system)
            versions[system] = version(system)
            systems.append(system)
        except environments.Unavailable as error:
            notes.failed("all", system, str(error))
    for case, size, ranks in cases:
        for _ in range(args.runs):
            for system in systems:
                measure(case, system, size, ranks, args, results, notes)
    results.print()
    for (case, system), told in notes.errors.items():
        for text in told:
            print(f"{case} {system}: {text}")
    if args.markdown:
        print("\n" + markdown(results, notes, versions))
    results.write(args.json)


if __name__ == "__main__":
    main()
