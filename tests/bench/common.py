"""What the benchmarks share: rows, the table on the terminal, the JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
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


class Results:
    """Samples by (case, system, metric); None is a run in which the metric never came."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.samples: dict[tuple[str, str, str, str], list[float | None]] = {}

    def add(self, case: str, system: str, metric: str, unit: str, value: float | None) -> None:
        self.samples.setdefault((case, system, metric, unit), []).append(value)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for (case, system, metric, unit), values in self.samples.items():
            seen = [v for v in values if v is not None]
            row: dict[str, Any] = {"case": case, "system": system, "metric": metric, "unit": unit,
                                   "median": None, "min": None, "max": None, "runs": len(values)}
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
