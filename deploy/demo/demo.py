"""The demo: one real training job on three nodes and a spare, four SIGKILLs, no step lost for good.

Runs train_gpt.py twice on a cluster of separate processes on this machine: first undisturbed, then while it kills
a worker, a node, an agent and the controller. Ends with exit 0 only if every fault was recovered, each cost at most
one step, and the final weights of both runs are equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EVERSTEP = str(ROOT / ".venv/bin/everstep")
BEGAN = time.time()


def say(text: str, mark: str = "  ") -> None:
    print(f"{time.time() - BEGAN:7.2f}s {mark} {text}", flush=True)


def everstep(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([EVERSTEP, *args], capture_output=True, text=True, timeout=120)
    if check and done.returncode:
        raise SystemExit(f"error: everstep {' '.join(args)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@dataclass
class Mark:
    step: int
    rank: int
    loss: float
    ended: float
    pid: int


def read_trace(path: Path) -> list[Mark]:
    marks = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                e = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line its writer was killed in
            marks.append(Mark(e["step"], e["rank"], e["loss"], e["ended"], e["pid"]))
    return marks


@dataclass
class Run:
    """`everstep run` under way: its output is shown, its trace tells the steps."""

    name: str
    trace: Path
    steps: int
    lines: list[str] = field(default_factory=list)

    def start(self) -> None:
        command = [EVERSTEP, "run", "--name", self.name, "--controller", os.environ["EVERSTEP_CONTROLLER"],
                   "--nnodes", "3", "--spares", "1", "--nproc-per-node", "1", "--max-restarts", "3",
                   str(ROOT / "deploy/demo/train_gpt.py"), "--steps", str(self.steps), "--trace", str(self.trace)]
        say("$ " + " ".join(["everstep", *command[1:]]).replace(str(ROOT) + "/", ""))
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)
            say(line.rstrip(), " |")

    def last_step(self) -> int:
        return max((m.step for m in read_trace(self.trace)), default=-1)

    def wait_step(self, step: int, seconds: float = 60) -> None:
        deadline = time.time() + seconds
        while self.last_step() < step:
            if self.process.poll() is not None:
                raise SystemExit(f"error: the run ended with {self.process.returncode} before step {step}")
            if time.time() > deadline:
                raise SystemExit(f"error: no step {step} within {seconds:.0f} s; last one is {self.last_step()}")
            time.sleep(0.02)

    def finish(self) -> str:
        """The weights' hash that rank 0 printed."""
        code = self.process.wait(180)
        self.reader.join(10)
        found = re.search(r"weights ([0-9a-f]{16})", "".join(self.lines))
        if code or not found:
            raise SystemExit(f"error: the run ended with {code}" + ("" if found else " and printed no weights' hash"))
        return found[1]


@dataclass
class FaultResult:
    what: str
    killed: float
    step_before: int
    detected: float | None = None
    first_step: float | None = None
    steps_lost: int | None = None


def job(name: str) -> dict:
    return json.loads(everstep("job", "show", name, "-o", "json").stdout)


def node_of(name: str, rank: int) -> str:
    return next(r["node"] for r in job(name)["ranks"] if int(r.get("rank", 0)) == rank)


def inject(run: Run, what: str, *command: str) -> FaultResult:
    """Kills, waits until every rank has made a step that began afterwards, and measures."""
    before = run.last_step()
    say(f"SIGKILL {what} at step {before}: everstep {' '.join(command)}", "**")
    killed = time.time()
    everstep(*command)
    result = FaultResult(what, killed, before)
    restarts = what.startswith(("worker", "node"))
    old = {m.pid for m in read_trace(run.trace)}
    deadline = time.time() + 60
    while time.time() < deadline:
        after = [m for m in read_trace(run.trace) if m.ended > killed and (not restarts or m.pid not in old)]
        if len({m.rank for m in after}) == 3:
            first: dict[int, Mark] = {}
            for m in after:
                first.setdefault(m.rank, m)
            result.first_step = max(m.ended for m in first.values()) - killed
            done = max(m.step for m in read_trace(run.trace) if m.ended <= killed)
            result.steps_lost = max(0, done + 1 - min(m.step for m in first.values())) if restarts else 0
            break
        time.sleep(0.02)
    if result.first_step is None:
        return result
    say(f"first new step of all ranks {result.first_step:.2f} s after the kill, {result.steps_lost} step(s) redone", "=>")
    run.wait_step(run.last_step() + 5)
    return result


def detected_after(result: FaultResult, events: list[dict]) -> float | None:
    from datetime import datetime

    for e in events:
        at = datetime.fromisoformat(e["time"].replace("Z", "+00:00")).timestamp()
        if at >= result.killed - 0.001 and e.get("reason", "none") not in ("", "none", "committed", "registered"):
            return at - result.killed
    return None


def plot_terminal(runs: dict[str, list[Mark]], faults: list[FaultResult], width: int = 100, height: int = 14) -> None:
    series = {name: smooth(marks) for name, marks in runs.items()}
    top = max(v for s in series.values() for _, v in s)
    low = min(v for s in series.values() for _, v in s)
    last = max(x for s in series.values() for x, _ in s)
    grid = [[" "] * width for _ in range(height)]
    for fault in faults:
        x = min(width - 1, int(fault.step_before / last * (width - 1)))
        for row in grid:
            row[x] = ":"
    for (_name, points), symbol in zip(series.items(), ".x"):
        for x, v in points:
            grid[min(height - 1, int((top - v) / (top - low + 1e-9) * (height - 1)))][int(x / last * (width - 1))] = symbol
    print()
    for i, row in enumerate(grid):
        print(f"{top - (top - low) * i / (height - 1):6.2f} |{''.join(row)}")
    print("       +" + "-" * width + f"\n        loss by step 0..{last};  . undisturbed   x with faults (drawn on top where equal)   : a fault")


def smooth(marks: list[Mark]) -> list[tuple[int, float]]:
    by_step: dict[int, float] = {m.step: m.loss for m in marks if m.rank == 0}
    steps = sorted(by_step)
    return [(s, sum(by_step[t] for t in steps[max(0, i - 4): i + 5]) / len(steps[max(0, i - 4): i + 5])) for i, s in enumerate(steps)]


def plot_png(runs: dict[str, list[Mark]], faults: list[FaultResult], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for (name, marks), style in zip(runs.items(), ({"lw": 4, "alpha": 0.35}, {"lw": 1.3})):
        points = smooth(marks)
        axes.plot([s for s, _ in points], [v for _, v in points], label=name, **style)
    top = axes.get_ylim()[1]
    for fault in faults:
        axes.axvline(fault.step_before, color="crimson", ls="--", lw=1)
        axes.text(fault.step_before, top, f" {fault.what}", rotation=90, va="top", ha="right", color="crimson", fontsize=8)
    axes.set(xlabel="step", ylabel="training loss (mean of 9 steps)", title="Byte-level GPT, 3 nodes and a spare, four SIGKILLs")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output")
    args = parser.parse_args()
    out: Path = args.output
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("*.jsonl"):
        old.unlink()

    say("a controller and four nodes, each its own processes:")
    name = f"demo-{os.getpid()}"
    say(f"$ everstep cluster up --nodes 4 --name {name}")
    everstep("cluster", "up", "--nodes", "4", "--name", name)
    try:
        listing = json.loads(everstep("cluster", "list", "-o", "json").stdout)
        cluster = next(c for c in listing["items"] if c["name"] == name)
        os.environ["EVERSTEP_CONTROLLER"] = cluster["controller"]

        say("the undisturbed run, for comparison")
        calm = Run("calm", out / "calm.jsonl", args.steps)
        calm.start()
        calm_hash = calm.finish()

        say("the same job again, and now things die")
        stormy = Run("stormy", out / "stormy.jsonl", args.steps)
        stormy.start()
        part = args.steps // 6
        faults = []
        stormy.wait_step(part)
        faults.append(inject(stormy, "worker (rank 1)", "cluster", "kill", "worker", "stormy", "1"))
        stormy.wait_step(2 * part)
        victim = node_of("stormy", 2)
        faults.append(inject(stormy, f"node {victim} (rank 2)", "cluster", "kill", "node", victim))
        stormy.wait_step(3 * part)
        victim = node_of("stormy", 0)
        faults.append(inject(stormy, f"agent of {victim} (rank 0)", "cluster", "kill", "agent", victim))
        stormy.wait_step(4 * part)
        faults.append(inject(stormy, "controller", "cluster", "kill", "controller"))
        stormy_hash = stormy.finish()
        print(everstep("job", "show", "stormy").stdout)
        events = [json.loads(line) for line in everstep("events", "-o", "jsonl").stdout.splitlines()]
        for fault in faults:
            fault.detected = detected_after(fault, events)
    finally:
        say(f"$ everstep cluster down {name}")
        everstep("cluster", "down", name, check=False)

    runs = {"undisturbed": read_trace(out / "calm.jsonl"), "with faults": read_trace(out / "stormy.jsonl")}
    plot_terminal(runs, faults)
    plot_png(runs, faults, out / "loss.png")
    print(f"\nplot: {out / 'loss.png'}\n")
    show = lambda v, unit: "-" if v is None else f"{v:.2f} {unit}" if isinstance(v, float) else str(v)
    rows = [("FAULT (SIGKILL)", "DETECTED AFTER", "FIRST NEW STEP AFTER", "STEPS LOST")]
    rows += [(f.what, show(f.detected, "s"), show(f.first_step, "s"), show(f.steps_lost, "")) for f in faults]
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    for r in rows:
        print("  ".join(c.ljust(w) for c, w in zip(r, widths)))
    print(f"\nweights: undisturbed {calm_hash}, with faults {stormy_hash}: {'EQUAL' if calm_hash == stormy_hash else 'DIFFERENT'}")
    bad = [f.what for f in faults if f.first_step is None or f.steps_lost is None or f.steps_lost > 1]
    if bad:
        print(f"error: not recovered within one step: {', '.join(bad)}")
    return 0 if not bad and calm_hash == stormy_hash else 1


if __name__ == "__main__":
    sys.exit(main())
