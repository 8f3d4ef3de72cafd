"""Overlapped captures, layouts used again and laid out anew, the interval: everstep.Checkpointer over a real arena.

Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import everstep
import numpy as np
import pytest
import torch
from checkpointer_test import DTYPES, Node, inside, node, outside, same  # noqa: F401 (fixtures)
from everstep._library import Client
from everstep._state import RNG
from everstep._table import Decoder
from torch import nn

HERE = Path(__file__).parent


class Run:
    """Training whose forward changes a buffer and draws from a random stream; a few MiB of parameters."""

    def __init__(self, seed: int = 0, width: int = 512) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1),
                                   nn.Linear(width, width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.progress = {"epoch": 0, "seen": torch.zeros(3)}
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
                                      "progress": self.progress}

    def forward(self) -> torch.Tensor:
        return self.model(torch.randn(4, self.model[0].in_features)).square().mean()

    def step(self, n: int) -> float:
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.progress["seen"] += 1
        self.optimizer.step()
        self.scheduler.step()
        self.progress["epoch"] = n
        return loss.item()

    def digest(self) -> str:
        leaves = [*self.model.state_dict().values(), self.progress["seen"], torch.get_rng_state()]
        for values in self.optimizer.state_dict()["state"].values():
            leaves += values.values()
        text = repr((self.scheduler.state_dict(), self.progress["epoch"]))
        return hashlib.sha256(b"|".join(t.detach().contiguous().numpy().tobytes() for t in leaves) + text.encode()).hexdigest()


def held(ck: everstep.Checkpointer, step: int) -> dict[str, Any]:
    """What the arena holds of `step`, checked, in memory of its own."""
    client = ck._client
    assert client is not None
    slot = client.find(step)
    assert slot is not None
    assert slot.step == step
    payload = client.payload(slot)
    copy = memoryview(bytearray(payload))
    return Decoder(copy, bytes(copy[slot.table_offset:slot.table_offset + slot.table_bytes])).root()


def until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.001)


def begin(node: Node, monkeypatch: pytest.MonkeyPatch, generation: int = 1, step: int = -1) -> None:  # noqa: F811
    node.say(f"activate {generation} 1 {step} 0")
    inside(monkeypatch, node, generation)


# --- overlapped ---


def test_every_overlapped_step_has_the_bits_of_a_blocking_one(
        tmp_path: Path, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    kept: dict[str, list[dict[str, Any]]] = {}
    for mode in ("blocking", "overlapped"):
        if mode == "overlapped":
            (tmp_path / "other").mkdir()
            node = second = Node(tmp_path / "other")  # noqa: F811
        begin(node, monkeypatch)
        run = Run()
        random.seed(1)
        np.random.seed(1)
        with everstep.Checkpointer(run.state, mode=mode) as ck:  # type: ignore[arg-type]
            assert ck.restore() == 0
            for n in range(8):
                run.step(n)
                if mode == "overlapped" and n > 0:
                    ck.wait()  # it was published before; now it can be looked at
                    kept.setdefault(mode, []).append(held(ck, n - 1))
                assert ck.step(n), ck.stats()
                if mode == "blocking":
                    kept.setdefault(mode, []).append(held(ck, n))
            ck.wait()
            if mode == "overlapped":
                kept[mode].append(held(ck, 7))
            stats = ck.stats()
        assert (stats.captured, stats.spoiled, stats.mode) == (8, 0, mode)
        assert stats.layouts == 1, "the state is laid out once: its optimizer had its state before the first capture"
    second.close()
    for n, (a, b) in enumerate(zip(kept["blocking"], kept["overlapped"])):
        assert same(a, b), f"step {n}"
    assert RNG in kept["overlapped"][0]


def test_optimizer_step_waits_for_the_copy_and_nothing_else_does(
        node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run()
    release, asked = threading.Event(), threading.Event()
    real = Client.wait

    def slow(self: Client, seconds: float) -> bool:  # as if the copy took until `release`
        if threading.current_thread() is threading.main_thread():
            asked.set()
        release.wait(20)
        return real(self, seconds)

    with everstep.Checkpointer(run.state, mode="overlapped") as ck:
        ck.restore()
        run.step(0)
        monkeypatch.setattr(Client, "wait", slow)
        assert ck.step(0)
        before = run.model[0].weight.detach().clone()
        loss = run.forward()
        loss.backward()
        assert not asked.is_set(), "forward and backward wait for nothing"
        assert ck.stats().captured == 0
        threading.Timer(0.1, release.set).start()
        began = time.monotonic()
        run.optimizer.step()
        assert asked.is_set()
        assert time.monotonic() - began > 0.05
        assert ck.stats().captured == 1
        assert ck.stats().block_seconds > 0.05
        assert torch.equal(held(ck, 0)["model"]["0.weight"], before)


def test_it_is_published_without_the_trainers_help(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run()
    with everstep.Checkpointer(run.state, mode="overlapped") as ck:
        ck.restore()
        run.step(0)
        assert ck.step(0)
        until(lambda: ck.stats().committed_step == 0, "step 0 is committed though nothing is called")


SCRIPT = """
import sys, warnings
sys.path[:0] = [{here!r}, {package!r}]
from capture_modes_test import Run, everstep
run = Run()
ck = everstep.Checkpointer(run.state, mode="overlapped")
for n in range(ck.restore(), {steps}):
    run.step(n)
    print(n, flush=True)
    ck.step(n)
print("bits", run.digest(), flush=True)
"""


def script(tmp_path: Path, steps: int) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.format(here=str(HERE), package=str(HERE.parents[1] / "worker/python"), steps=steps))
    return path


def test_killed_at_random_points_of_overlapped_captures_nothing_is_mixed(
        node: Node, tmp_path: Path) -> None:  # noqa: F811
    path = script(tmp_path, 40)
    clean = Run()
    for n in range(40):
        clean.step(n)
    chance = random.Random(5)
    at, generation, killed, final = -1, 0, 0, ""
    while not final:
        generation += 1
        assert generation < 9
        node.say(f"activate {generation} 1 {at} 0")
        process = subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, **node.environment(generation)})
        assert process.stdout
        said = at
        for line in process.stdout:
            if line.startswith("bits"):
                final = line.split()[1]
                break
            assert int(line) == said + 1, "a step was done twice or left out"
            said = int(line)
            if killed < 6 and said >= at + 4:
                time.sleep(chance.random() * 0.012)  # some way into the capture of `said`, or the steps behind it
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
        process.stdout.close()
        process.wait(20)
        steps = node.steps()  # verified by the survey, torn ones left out
        assert steps
        assert steps[-1] >= said - 1, f"step {said} was being captured, and {steps} is what is left"
        at = steps[-1]
    assert killed >= 4, "where nothing else runs it is six; on a busy machine a trainer runs ahead of who reads it"
    assert final == clean.digest()


def test_a_script_that_ends_in_the_middle_of_a_capture_ends_it(node: Node, tmp_path: Path) -> None:  # noqa: F811
    node.say("activate 1 1 -1 0")
    done = subprocess.run([sys.executable, script(tmp_path, 3)], capture_output=True, text=True, timeout=120,
                          env={**os.environ, **node.environment(1)})
    assert done.returncode == 0, done.stderr
    assert node.steps() == [1, 2], done.stderr


def test_parameters_changed_elsewhere_are_named_and_the_step_is_not_kept(
        node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run()

    def clamp() -> None:
        with torch.no_grad():
            run.model[3].weight.clamp_(-0.01, 0.01)

    real = Client.wait
    hold = threading.Event()
    monkeypatch.setattr(Client, "wait", lambda self, s: hold.wait(20) and real(self, s))  # the change comes first
    with everstep.Checkpointer(run.state, mode="overlapped") as ck:
        ck.restore()
        hold.set()
        run.step(0)
        assert ck.step(0)
        ck.wait()
        clamp()  # after wait(): no harm
        until(lambda: ck.stats().committed_step == 0, "step 0")
        for n, spoiled in ((1, 1), (2, 2)):
            run.step(n)
            hold.clear()
            assert ck.step(n)
            clamp()
            hold.set()
            if n == 1:
                with pytest.warns(RuntimeWarning, match=r"model\['3\.weight'\] changed outside of optimizer\.step.*step 1"):
                    ck.wait()
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ck.wait()
            assert ck.stats().spoiled == spoiled
            assert 0 in node.steps(), "the committed step is still there"
            assert n not in node.steps()
        run.step(3)
        expected = run.model[3].weight.detach().clone()
        hold.clear()
        assert ck.step(3)  # a tensor that spoils twice is copied at once from then on
        clamp()
        hold.set()
        ck.wait()
        assert ck.stats().spoiled == 2
        assert torch.equal(held(ck, 3)["model"]["3.weight"], expected)


def test_auto_goes_back_to_blocking_once_a_capture_was_spoiled(
        node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run()
    with everstep.Checkpointer(run.state, mode="auto") as ck:
        ck.restore()
        run.step(0)
        assert ck.step(0)
        assert ck.stats().mode == "overlapped"
        overlap = ck._parts.overlap
        assert overlap is not None
        overlap._spoiled.append((0, [("model['0.weight']", 1)]))
        with pytest.warns(RuntimeWarning, match="changed outside"):
            ck.wait()
        run.step(1)
        assert ck.step(1)
        assert ck.stats().mode == "blocking"
        assert ck.stats().captured == 2


def test_a_fence_met_by_an_overlapped_capture_is_told_at_the_next_call(
        node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run()
    hold = threading.Event()
    real = Client.wait
    monkeypatch.setattr(Client, "wait", lambda self, s: hold.wait(20) and real(self, s))
    ck = everstep.Checkpointer(run.state, mode="overlapped")
    ck.restore()
    run.step(0)
    ck.step(0)
    node.say("activate 2 1 -1 0")
    hold.set()
    run.step(1)  # its optimizer.step() meets the fence, and the training loop hears of it from step()
    with pytest.raises(everstep.StaleGenerationError):
        ck.step(1)
    assert node.steps() == []
    ck.close()
