"""What the benchmarks share: rows, the table on the terminal, the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv" / "bin"


def machine() -> str:
    """One line that says what was measured on."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    return f"{os.cpu_count()} cores, {memory} GiB, {model}, Linux {platform.release()}, load {os.getloadavg()[0]:.1f}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def before_all_others() -> None:
    """For preexec_fn: the child and what it starts run before all normal processes. As root."""
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def iperf_rate(address: str, size: int, streams: int, server: list[str] | None = None, client: list[str] | None = None,
               realtime: bool = False) -> float:
    """Bytes a second that iperf3 moves over `address`; `server`, `client`: what goes before their command lines."""
    first = before_all_others if realtime else None
    port = str(free_port())
    try:
        served = subprocess.Popen([*(server or []), "iperf3", "-s", "-1", "-B", address, "-p", port, "--forceflush"],
                                  stdout=subprocess.PIPE, text=True, preexec_fn=first)
    except FileNotFoundError:
        raise SystemExit("error: iperf3 is not there: apt-get install iperf3") from None
    try:
        assert served.stdout
        for line in served.stdout:
            if "listening on" in line:
                break
        done = subprocess.run([*(client or []), "iperf3", "-c", address, "-p", port, "-P", str(streams), "-n", str(size), "--json"],
                              capture_output=True, text=True, timeout=120, preexec_fn=first)
        report = json.loads(done.stdout)
        if "error" in report or done.returncode:
            raise SystemExit(f"error: iperf3: {report.get('error', done.stderr)}")
        return float(report["end"]["sum_received"]["bits_per_second"]) / 8
    finally:
        served.terminate()
        served.wait(10)
        assert served.stdout
        served.stdout.close()


class Results:
    """Samples by (case, system, metric); None is a run in which the metric never came."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.samples: dict[tuple[str, str, str, str], list[float | None]] = {}
        self.goals: dict[tuple[str, str, str, str], str] = {}

    def add(self, case: str, system: str, metric: str, unit: str, value: float | None, goal: str = "") -> None:
        self.samples.setdefault((case, system, metric, unit), []).append(value)
        if goal:
            self.goals[(case, system, metric, unit)] = goal

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for (case, system, metric, unit), values in self.samples.items():
            seen = [v for v in values if v is not None]
            row: dict[str, Any] = {"case": case, "system": system, "metric": metric, "unit": unit,
                                   "median": None, "min": None, "max": None, "runs": len(values)}
            if (case, system, metric, unit) in self.goals:
                row["goal"] = self.goals[(case, system, metric, unit)]
            if seen:
                row |= {"median": statistics.median(seen), "min": min(seen), "max": max(seen)}
            if len(seen) < len(values):
                row["never"] = len(values) - len(seen)
            rows.append(row)
        return rows

    def print(self) -> None:
        print(f"\n{self.benchmark}: {machine()}")
        header = ("CASE", "SYSTEM", "METRIC", "MEDIAN", "MIN", "MAX", "UNIT", "RUNS")
        table = [header]
        for r in self.rows():
            number = lambda v: "never" if v is None else f"{v:.3f}" if abs(v) < 1000 else f"{v:,.0f}"
            runs = str(r["runs"]) + (f" ({r['never']} never)" if r.get("never") else "")
            table.append((r["case"], r["system"], r["metric"], number(r["median"]), number(r["min"]), number(r["max"]), r["unit"], runs))
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        for row in table:
            print("  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))

    def write(self, path: Path | None) -> None:
        if path:
            path.write_text(json.dumps({"benchmark": self.benchmark, "machine": machine(), "rows": self.rows()}, indent=1) + "\n")
            print(f"wrote {path}")

    def markdown(self) -> str:
        """The table as docs/reference/performance.md has it, the command and the machine above it."""
        lines = [f"`{command()}`; {machine()}", "", "| case | system | metric | median | min..max | unit | runs | goal |",
                 "|---|---|---|---|---|---|---|---|"]
        for r in self.rows():
            span = "" if r["median"] is None else f"{figure(r['min'])}..{figure(r['max'])}"
            runs = f"{r['runs']}" + (f", {r['never']} never" if r.get("never") else "")
            cells = (r["case"], r["system"], r["metric"], figure(r["median"]), span, r["unit"], runs, r.get("goal", ""))
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def finish(self, args: argparse.Namespace) -> None:
        """Prints and writes what the flags --markdown and --json ask for."""
        self.print()
        if args.markdown:
            print("\n" + self.markdown())
        self.write(args.json)


def command() -> str:
    """The command line that a reader would type."""
    return " ".join(["tests/bench/run.sh", Path(sys.argv[0]).stem, *sys.argv[1:]])


def figure(value: float | None) -> str:
    """Three digits are what such a figure is worth."""
    if value is None:
        return "never"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
