"""Captures and restores of tensors that lie on a device: everstep.Checkpointer over a real arena.

Each test runs with a stand-in for the device (stand_in_device.py), and once more with CUDA where PyTorch has it:

    .venv/bin/python -m pytest -q tests/integration/staging_test.py -k cuda

Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import everstep
import pytest
import torch
from capture_modes_test import begin, held, until
from checkpointer_test import Node, node, outside, same  # noqa: F401 (fixtures)
from everstep import _staging, checkpointer
from everstep._library import Client
from everstep._staging import Cuda
from stand_in_device import StandIn
from torch import nn

HERE = Path(__file__).parent
KINDS = ["stand-in registered", "stand-in pinned", "cuda registered", "cuda pinned"]
HAS_CUDA = torch.cuda.is_available()


def device_of(kind: str) -> Any:
    what, way = kind.split()
    if what == "cuda":
        return Cuda()
    return StandIn("" if way == "registered" else "no memory to lock")


class Rig:
    """The device of one test."""

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        self.device = device_of(kind)
        self.where = "cuda" if kind.startswith("cuda") else "cpu"
        self.way = kind.split()[1]
        may_register = self.way == "registered" or self.where == "cpu"  # the stand-in refuses by itself
        monkeypatch.setattr(checkpointer, "choose", lambda: (self.device, may_register))

    @property
    def stand_in(self) -> StandIn:
        assert isinstance(self.device, StandIn)
        return self.device

    def hold(self) -> None:
        """No copy issued from here on lands within half a second, nor before release()."""
        if self.where == "cpu":
            self.stand_in.held.set()
            return
        self.device.begin()
        with torch.cuda.stream(self.device._stream(torch.empty(0, device="cuda").device)):
            torch.cuda._sleep(2_000_000_000)

    def release(self) -> None:
        if self.where == "cpu":
            self.stand_in.held.clear()


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    if request.param.startswith("cuda") and not HAS_CUDA:
        pytest.skip(f"this PyTorch ({torch.__version__}) finds no CUDA device")
    with warnings.catch_warnings():
        if request.param.endswith("pinned"):
            warnings.filterwarnings("ignore", message=".*cannot be registered")
        yield Rig(request.param, monkeypatch)


class Run:
    """Training whose forward changes buffers; a few MiB of parameters, some of them odd."""

    def __init__(self, where: str, width: int = 256) -> None:
        torch.manual_seed(0)
        self.where = where
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1),
                                   nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)).to(where)
        self.model[4].weight = self.model[3].weight  # tied
        self.model.register_buffer("turned", torch.arange(12.0, device=where).view(3, 4).t())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.progress = {"epoch": 0, "seen": torch.zeros(3, device=where),
                         "wave": torch.zeros(5, dtype=torch.complex64, device=where).conj()}
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "progress": self.progress}

    def forward(self) -> torch.Tensor:
        self.model.turned.add_(1)
        return self.model(torch.randn(4, self.model[0].in_features).to(self.where)).square().mean()

    def step(self, n: int) -> float:
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.progress["seen"] += 1
        self.optimizer.step()
        self.progress["epoch"] = n
        return loss.item()

    def snapshot(self) -> dict[str, Any]:
        """What a capture must hold now, in memory of the host."""
        return {"model": copied(self.model.state_dict()), "optimizer": copied(self.optimizer.state_dict()),
                "progress": copied(self.progress)}


def copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().resolve_conj().cpu().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, list) else value


def kept(ck: everstep.Checkpointer, step: int) -> dict[str, Any]:
    root = held(ck, step)
    return {name: dict(root[name]) for name in ("model", "optimizer", "progress")}


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_each_step_is_kept_as_it_was_whatever_training_does_meanwhile(
        node: Node, rig: Rig, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run(rig.where)
    with everstep.Checkpointer(run.state, mode=mode) as ck:
        assert ck.restore() == 0
        run.step(0)
        for n in range(8):
            expected = run.snapshot()
            assert ck.step(n), ck.stats()
            run.step(n + 1)  # forward, backward and optimizer over the copies
            ck.wait()
            assert same(kept(ck, n), expected), f"step {n}"
        stats = ck.stats()
    assert (stats.captured, stats.spoiled, stats.failed, stats.mode, stats.layouts) == (8, 0, 0, mode, 1)
    assert stats.staging == rig.way


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_a_slot_has_the_very_bytes_of_one_that_the_host_copied(
        tmp_path: Path, node: Node, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    payloads: dict[str, list[bytes]] = {}
    other = tmp_path / "other"
    other.mkdir()
    second = Node(other)
    for where, way in ((node, "device"), (second, "host")):
        begin(where, monkeypatch)
        monkeypatch.setattr(checkpointer, "choose", lambda way=way: (StandIn() if way == "device" else None, True))
        run = Run("cpu")
        with everstep.Checkpointer(run.state, mode=mode, rng=False) as ck:
            ck.restore()
            for n in range(4):
                run.step(n)
                assert ck.step(n)
                ck.wait()
                client = ck._client
                assert client is not None
                slot = client.find(n)
                assert slot is not None
                payloads.setdefault(way, []).append(bytes(client.payload(slot)[:slot.table_offset]))
            assert ck.stats().staging == ("registered" if way == "device" else "host")
    second.close()
    assert payloads["device"] == payloads["host"]


def test_optimizer_step_has_the_device_wait_and_not_the_host(
        node: Node, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run(rig.where)
    with everstep.Checkpointer(run.state, mode="overlapped") as ck:
        ck.restore()
        run.step(0)
        ck.step(0)
        ck.wait()
        run.step(1)
        loss = run.forward()
        loss.backward()
        expected = run.snapshot()
        rig.hold()
        assert ck.step(1)
        if rig.where == "cpu":
            # The stand-in's trainer has no stream that could stand: what a device would delay is done after release().
            assert ck.stats().captured == 1
            began = time.monotonic()
            overlap = ck._parts.overlap
            assert overlap is not None
            overlap._before_step()
            assert time.monotonic() - began < 0.5
            assert ck.stats().captured == 1, "the host went on before the copies landed"
            rig.release()
        run.optimizer.step()
        if rig.where == "cuda":
            assert ck.stats().captured == 1, "the host went on before the copies landed"
        until(lambda: ck.stats().captured == 2, "published once they have")
        assert same(kept(ck, 1), expected)
        assert ck.stats().waited_seconds < 0.5


def test_what_changes_ahead_of_the_optimizer_is_named_and_the_step_before_stays(
        node: Node, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run(rig.where)
    with everstep.Checkpointer(run.state, mode="overlapped") as ck:
        ck.restore()
        run.step(0)
        ck.step(0)
        ck.wait()
        until(lambda: ck.stats().committed_step == 0, "step 0")
        rig.hold()
        assert ck.step(1)
        with torch.no_grad():
            run.model[3].weight.clamp_(-0.01, 0.01)
        rig.release()
        run.step(2)
        with pytest.warns(RuntimeWarning, match=r"model\['3\.weight'\] changed outside of optimizer\.step.*step 1"):
            ck.wait()
        assert ck.stats().spoiled == 1
        assert node.steps() == [0]
        expected = run.snapshot()
        assert ck.step(2)
        ck.wait()
        assert same(kept(ck, 2), expected)


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_nothing_is_taken_after_the_first_step(
        node: Node, rig: Rig, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run(rig.where)
    del run.progress["wave"]  # a conjugate is resolved anew each time
    taken: list[int] = []
    for name in ("register", "pinned"):
        real = getattr(rig.device, name)
        monkeypatch.setattr(rig.device, name, lambda *a, real=real: (taken.append(a[-1]), real(*a))[1])
    made: list[int] = []
    real_host = _staging._host
    monkeypatch.setattr(_staging, "_host", lambda a, size: (made.append(size), real_host(a, size))[1])
    with everstep.Checkpointer(run.state, mode=mode) as ck:
        ck.restore()
        run.step(0)
        for n in range(4):
            ck.step(n)
            ck.wait()
            if n == 0:
                first = len(taken)
        assert first == (2 if rig.way == "registered" else 1 + (rig.where == "cpu")), "both slots, or one image"
        views = len(made)
        device = torch.cuda.memory_stats()["allocation.all.allocated"] if rig.where == "cuda" else 0
        before = resident()
        for n in range(4, 40):
            assert ck.step(n), ck.stats()
            ck.wait()
        assert len(taken) == first
        assert len(made) - views == 36, "the loose tensor's, and nothing of what lies as it lay"
        assert resident() - before < 1 << 20
        if rig.where == "cuda":
            assert torch.cuda.memory_stats()["allocation.all.allocated"] == device


def resident() -> int:
    with open("/proc/self/statm") as statm:
        fields = statm.read().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")  # without what is shared: the arena


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
@pytest.mark.parametrize("fail_at", [0, 3, 7])
@pytest.mark.parametrize("refuses", ["", "no memory to lock"])
def test_an_error_among_the_copies_is_named_and_the_step_before_stays(
        node: Node, mode: Any, fail_at: int, refuses: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    device = StandIn(refuses)
    monkeypatch.setattr(checkpointer, "choose", lambda: (device, True))
    begin(node, monkeypatch)
    run = Run("cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be registered")
        ck = everstep.Checkpointer(run.state, mode=mode)
        ck.restore()
        run.step(0)
        ck.step(0)
        ck.wait()
        until(lambda: ck.stats().committed_step == 0, "step 0")
    expected = run.snapshot()
    device.fail_at = fail_at
    with pytest.warns(RuntimeWarning, match=r"step 1 is not kept, the one before is: .*illegal memory access"):
        assert ck.step(1) is (mode == "overlapped" and fail_at >= 5)  # five buffers: step() itself meets those
        run.forward()
        ck.wait()
    assert ck.stats().failed == 1
    assert node.steps() == [0]
    assert same(kept(ck, 0), expected)
    with pytest.warns(RuntimeWarning, match="step 2 is not kept.*illegal memory access"):
        assert not ck.step(2)  # what a real device says from then on
    device.mend()
    expected = run.snapshot()
    assert ck.step(3)
    ck.wait()
    assert same(kept(ck, 3), expected)
    ck.close()
    assert not device.registered


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_copies_that_come_too_late_fall_into_no_other_capture(
        node: Node, rig: Rig, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    if rig.where == "cuda":
        pytest.skip("a device cannot be held back for as long as it takes; the order is the stand-in's to show")
    monkeypatch.setattr(checkpointer, "Staging",
                        lambda client, device, may: _staging.Staging(client, device, may, patience=0.1))
    begin(node, monkeypatch)
    run = Run(rig.where)
    with everstep.Checkpointer(run.state, mode=mode) as ck:
        ck.restore()
        run.step(0)
        ck.step(0)
        ck.wait()
        until(lambda: ck.stats().committed_step == 0, "step 0")
        kept_0 = kept(ck, 0)
        rig.hold()
        with pytest.warns(RuntimeWarning, match=r"step 1 is not kept.*did not land within 0.1 s"):
            ck.step(1)
            ck.wait()
        with pytest.warns(RuntimeWarning, match="step 2 is not kept.*have still not landed"):
            assert not ck.step(2)
        assert node.steps() == [0]
        assert same(kept(ck, 0), kept_0)
        rig.release()
        run.step(3)
        expected = run.snapshot()
        assert ck.step(3)
        ck.wait()
        assert same(kept(ck, 3), expected)
        assert ck.stats().failed == 2
        assert node.steps() == [0, 3]


def test_a_state_that_grows_moves_its_slots_and_the_device_lets_go_first(
        node: Node, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run(rig.where)
    with everstep.Checkpointer(run.state) as ck:
        ck.restore()
        for n in range(9):
            run.step(n)
            if n % 3 == 2:
                run.progress[f"more {n}"] = torch.full((1 << 20,), float(n), device=rig.where)
            expected = run.snapshot()
            assert ck.step(n)
            assert same(kept(ck, n), expected), f"step {n}"
        assert ck.restore() == 0, "what this generation began with; the device lets go of the slots for it"
        run.step(9)
        expected = run.snapshot()
        assert ck.step(9)
        assert same(kept(ck, 9), expected)


def test_a_restored_run_goes_on_as_if_nothing_had_been(
        node: Node, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    run = Run(rig.where)
    with everstep.Checkpointer(run.state) as ck:
        ck.restore()
        for n in range(3):
            run.step(n)
            ck.step(n)
    losses = [run.step(n) for n in (3, 4)]
    begin(node, monkeypatch, 2, 2)
    again = Run(rig.where)
    with everstep.Checkpointer(again.state) as ck:
        assert ck.restore() == 3
        assert [again.step(n) for n in (3, 4)] == losses
        assert same(again.snapshot(), run.snapshot())
        assert ck.step(4)
        assert same(kept(ck, 4), run.snapshot())


def test_a_device_that_fails_to_take_a_restored_state_is_named(
        node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    device = StandIn()
    monkeypatch.setattr(checkpointer, "choose", lambda: (device, True))
    begin(node, monkeypatch)
    run = Run("cpu")
    with everstep.Checkpointer(run.state) as ck:
        ck.restore()
        run.step(0)
        ck.step(0)
    begin(node, monkeypatch, 2, 0)
    with everstep.Checkpointer(run.state) as ck:
        device.fail_at = 2
        with pytest.raises(RuntimeError, match="illegal memory access"):
            ck.restore()
        device.mend()


SCRIPT = """
import os, signal, sys, warnings
sys.path[:0] = [{here!r}, {package!r}]
import torch, everstep
from everstep import checkpointer
from everstep._library import Client
from staging_test import Run, device_of
kind, mode, point = sys.argv[1:4]
warnings.simplefilter("ignore")
device = device_of(kind)
checkpointer.choose = lambda: (device, kind.endswith("registered") or kind.startswith("stand-in"))
run = Run("cuda" if kind.startswith("cuda") else "cpu")
ck = everstep.Checkpointer(run.state, mode=mode)
ck.restore()

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

for n in range(4):
    run.step(n)
    if n == 3:
        ck.wait()  # step 2's capture is published, which overlapped is the publishing thread's to do
        if point == "issued":
            real = type(device).copy
            type(device).copy = lambda self, pairs: (real(self, pairs), die())
        elif point == "landed":
            Client.write = Client.start = die
        elif point == "summed":
            Client.commit = Client.publish = die
    ck.step(n)
ck.wait()
"""


@pytest.mark.parametrize(("point", "mode"), [("issued", "overlapped"), ("landed", "blocking"), ("landed", "overlapped"),
                                             ("summed", "overlapped")])
def test_killed_between_the_copies_and_the_publication_the_step_before_is_there(
        node: Node, tmp_path: Path, rig: Rig, mode: str, point: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    if rig.way == "pinned" and (point, mode) != ("landed", "overlapped"):
        pytest.skip("from there on it is as with registered memory")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.format(here=str(HERE), package=str(HERE.parents[1] / "worker/python")))
    node.say("activate 1 1 -1 0")
    killed = subprocess.run([sys.executable, path, rig.kind, mode, point], capture_output=True, text=True, timeout=300,
                            env={**os.environ, **node.environment(1)})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert node.steps() == [2], "step 1's slot was torn for step 3, which was never finished"
    begin(node, monkeypatch, 2, 2)
    whole = Run(rig.where)
    losses = [whole.step(n) for n in range(6)]
    run = Run(rig.where)
    with everstep.Checkpointer(run.state) as ck:
        assert ck.restore() == 3
        assert [run.step(n) for n in (3, 4, 5)] == losses[3:]
    assert same(run.snapshot(), whole.snapshot())


def test_tensors_without_data_are_refused_by_name(node: Node, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    with everstep.Checkpointer({"model": nn.Linear(2, 2, device="meta")}) as ck:
        with pytest.raises(TypeError, match=r"model\['weight'\]: cannot checkpoint a Parameter .* on meta"):
            ck.step(0)


@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device")
def test_a_wish_for_staging_without_a_device_is_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    for value, says in (("pinned", "finds no CUDA device; leave the variable out"), ("fast", "it is auto, registered")):
        monkeypatch.setenv("EVERSTEP_STAGING", value)
        with pytest.raises(RuntimeError, match=f"EVERSTEP_STAGING={value}: .*{says}"):
            everstep.Checkpointer({"step": torch.zeros(1)})
    monkeypatch.setenv("EVERSTEP_STAGING", "off")
    with everstep.Checkpointer({"step": torch.zeros(1)}) as ck:
        ck.restore()
        assert ck.step(0)
        assert ck.stats().staging == "host"


def test_the_client_is_told_of_a_step_that_is_not_laid_out_as_its_table_says(
        node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(checkpointer, "choose", lambda: (StandIn(), True))
    begin(node, monkeypatch)
    real = Client.place
    monkeypatch.setattr(Client, "place", lambda self, array, image=None, expected=None: real(
        self, array, image, None if expected is None else [o + 64 for o in expected]))
    with everstep.Checkpointer({"w": torch.zeros(100)}) as ck:
        ck.restore()
        with pytest.raises(everstep.EverstepError, match="laid the state out in another way"):
            ck.step(0)
