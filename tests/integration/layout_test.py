"""Layouts of a state: laid out once, seen to have changed, laid out anew; every dtype; the interval of "auto".

Environment: EVERSTEP_BUILD, the build folder (default build/release).
"""

from __future__ import annotations

import math
import random
import time
import tracemalloc
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import everstep
import numpy as np
import pytest
import torch
from capture_modes_test import begin, held, until
from checkpointer_test import DTYPES, Node, node, outside, same  # noqa: F401 (fixtures)
from everstep._interval import MOST, Measured, Meter, best_interval, effective_time
from everstep._plan import Plan
from torch import nn


class Net(nn.Module):
    """Tied weights, a buffer, a buffer that is not kept, a parameter that lies across."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8, bias=False)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(8)
        self.across = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.b(self.a(x))) + self.across.sum() + self.blocks[0](x)


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


def build() -> dict[str, Any]:
    torch.manual_seed(3)
    net = Net()
    return {"net": net, "optimizer": torch.optim.AdamW(net.parameters()), "plain": {"n": 0, "t": torch.zeros(4)}}


def freeze(s: dict[str, Any]) -> None:
    s["net"].a.weight.requires_grad_(False)
    del s["optimizer"].state[s["optimizer"].param_groups[0]["params"].pop(0)]


def grow(s: dict[str, Any]) -> None:
    s["net"].blocks.append(nn.Linear(8, 300))
    s["optimizer"].add_param_group({"params": s["net"].blocks[1].parameters()})


def halve(s: dict[str, Any]) -> None:
    s["net"].blocks[0].weight.data = s["net"].blocks[0].weight.data[:4]  # the same address


def untie(s: dict[str, Any]) -> None:
    s["net"].b.weight = nn.Parameter(s["net"].a.weight.detach().clone() + 1)


def reload(s: dict[str, Any]) -> None:
    s["optimizer"].load_state_dict(s["optimizer"].state_dict())


def hook(s: dict[str, Any]) -> None:
    s["net"]._register_state_dict_hook(lambda module, out, prefix, meta: out.update(extra=torch.ones(2)))


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "frozen": freeze,
    "grown": grow,
    "other memory": lambda s: setattr(s["net"].a.bias, "data", s["net"].a.bias.data.clone() + 1),
    "smaller at the same address": halve,
    "another precision": lambda s: s["net"].double(),
    "untied": untie,
    "buffer replaced": lambda s: setattr(s["net"].norm, "running_mean", torch.full((8,), 7.0)),
    "buffer added": lambda s: s["net"].register_buffer("more", torch.ones(5)),
    "buffer kept from now on": lambda s: s["net"]._non_persistent_buffers_set.clear(),
    "parameter removed": lambda s: delattr(s["net"].a, "bias"),
    "module replaced": lambda s: setattr(s["net"], "a", nn.Linear(8, 8)),
    "optimizer loaded": reload,
    "optimizer state gone": lambda s: s["optimizer"].state.clear(),
    "optimizer state changed": lambda s: next(iter(s["optimizer"].state.values())).update(extra=torch.ones(3)),
    "optimizer state counts": lambda s: next(iter(s["optimizer"].state.values())).update(count=1),
    "object replaced": lambda s: s.update(net=Net()),
    "object added": lambda s: s.update(more=nn.Linear(2, 2)),
    "a hook": hook,
}


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """What each object says of itself, in memory of its own."""
    def own(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return type(value)((k, own(v)) for k, v in value.items())
        return [own(v) for v in value] if isinstance(value, list) else value

    return {k: own(v.state_dict() if hasattr(v, "state_dict") else v) for k, v in state.items()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_a_change_of_the_layout_is_seen(node: Node, monkeypatch: pytest.MonkeyPatch, mode: str,  # noqa: F811
                                        change: str) -> None:
    monkeypatch.setattr("everstep.checkpointer._OVERLAP_BYTES", 0)
    begin(node, monkeypatch)
    state = build()
    with everstep.Checkpointer(state, mode=mode) as ck:  # type: ignore[arg-type]
        ck.restore()
        for n in range(3):
            train(state["net"], state["optimizer"])
            state["plain"]["n"] = n
            assert ck.step(n)
            ck.wait()
        assert ck.stats().layouts == 1, "nothing but values changed"
        CHANGES[change](state)
        said = gathered(state)
        assert ck.step(3)
        ck.wait()
        assert ck.stats().layouts == 2
        now = held(ck, 3)
        now.pop("__rng__")
        assert list(now) == list(said)
        for name in said:
            assert same(now[name], type(now[name])(said[name])), name


def test_the_last_committed_slot_outlives_a_new_layout(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    state = build()
    with everstep.Checkpointer(state, commit_wait=20.0) as ck:
        ck.restore()
        assert ck.step(0)  # the optimizer has no state yet
        until(lambda: ck.stats().committed_step == 0, "step 0")
        before = held(ck, 0)
        node.say("commit off")
        train(state["net"], state["optimizer"])
        grow(state)
        assert ck.step(1)  # several times as large: its slot gets another extent
        assert node.steps() == [0, 1]
        assert same(held(ck, 0), before)
        assert ck.stats().layouts == 2
        node.say("commit on")


def test_nothing_is_allocated_once_the_layout_stands(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("everstep.checkpointer._OVERLAP_BYTES", 0)
    begin(node, monkeypatch)
    state = build()
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    with everstep.Checkpointer(state, mode="overlapped", commit_wait=20.0) as ck:
        ck.restore()
        for n in range(400):
            train(state["net"], state["optimizer"])
            assert ck.step(n)
            if n == 100:
                tracemalloc.start()
                traced, memory = tracemalloc.get_traced_memory()[0], resident()
        ck.wait()
        grown, more = tracemalloc.get_traced_memory()[0] - traced, resident() - memory
        tracemalloc.stop()
        assert ck.stats().layouts <= 2
    assert grown < 200_000, "Python objects are left over by each step"
    assert more < 30 << 20, "memory grows with the steps"


# --- every kind of leaf, through a layout that is used again ---


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 100, (6 * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(2, 3)


@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_every_kind_of_leaf_goes_and_comes(node: Node, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:  # noqa: F811
    monkeypatch.setattr("everstep.checkpointer._OVERLAP_BYTES", 0)
    begin(node, monkeypatch)

    def state(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        module = nn.Module()
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            module.register_buffer(f"b_{name}", tensor_of(dtype))
            module.register_parameter(f"p_{name}", nn.Parameter(tensor_of(dtype), requires_grad=False))
        module.register_parameter("empty", nn.Parameter(torch.empty(0, 3)))
        module.register_parameter("scalar", nn.Parameter(torch.rand(())))
        module.register_parameter("across", nn.Parameter(torch.rand(5, 7).t()))
        module.register_parameter("part", nn.Parameter(torch.rand(6, 6)[::2, 1:4]))
        module.register_parameter("channels", nn.Parameter(torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)))
        module.register_parameter("tied", module.scalar)
        module.register_buffer("conjugate", torch.rand(3, dtype=torch.complex64).conj())
        module.register_buffer("negative", torch.rand(3, dtype=torch.complex64).conj().imag)
        plain = {"t": {str(d): tensor_of(d) for d in DTYPES} if seed == 1 else {}, "list": [1, 2.5, (None, True, -0.0)],
                 "o": OrderedDict(z=torch.rand(2), a=math.inf), "count": Counter(x=2), "bytes": b"\0\xff", "j": 1j,
                 "np": np.arange(4, dtype=">i2"), "big": 1 << 80, "nan": math.nan, "text": "é\n\"", "view": torch.rand(9)[2:5]}
        return {"module": module, "optimizer": torch.optim.SGD([module.across, module.part], momentum=0.9), "plain": plain}

    first = state(1)
    with everstep.Checkpointer(first, mode=mode) as ck:  # type: ignore[arg-type]
        ck.restore()
        for n in range(3):
            with torch.no_grad():
                for p in (first["module"].across, first["module"].part, first["module"].channels):
                    p.add_(1)  # copies of what lies across are made anew each step
                first["module"].conjugate.mul_(2)
            assert ck.step(n)
            ck.wait()
    begin(node, monkeypatch, 2, 2)
    second = state(2)
    with everstep.Checkpointer(second) as ck:
        assert ck.restore() == 3
    for name, value in first["module"].state_dict().items():
        other = second["module"].state_dict()[name]
        assert same(other.resolve_conj().resolve_neg(), value.resolve_conj().resolve_neg()), name
    assert same(second["plain"], first["plain"])
    assert second["module"].tied is second["module"].scalar


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("value", "path"), [
    ({"inner": [1, {"f": object()}]}, r"bad\['inner'\]\[1\]\['f'\]: cannot checkpoint an object of type object"),
    (torch.zeros(3).to_sparse(), "bad: cannot checkpoint a Tensor of layout torch.sparse_coo"),
    (torch.zeros(3, device="meta"), "bad: cannot checkpoint a Tensor of layout torch.strided on meta"),
    ([{1, 2}], r"bad\[0\]: cannot checkpoint an object of type set"),
])
def test_what_cannot_be_kept_is_refused_by_its_path(node: Node, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
                                                    value: Any, path: str) -> None:
    begin(node, monkeypatch)
    state = {**build(), "bad": value}
    with everstep.Checkpointer(state, mode="overlapped") as ck:
        ck.restore()
        with pytest.raises(TypeError, match=path):
            ck.step(0)
        state["bad"] = 1
        assert ck.step(1), "the next step goes on"


# --- how often ---


def test_the_best_interval_is_the_best_of_all() -> None:
    chance = random.Random(2)
    for _ in range(300):
        m = Measured(stall=10 ** chance.uniform(-5, 1), step=10 ** chance.uniform(-3, 2),
                     rate=10 ** chance.uniform(-7, -3), recovery=10 ** chance.uniform(-1, 3))
        best = best_interval(m)
        brute = max(range(1, MOST + 1), key=lambda k: effective_time(m, k))
        assert effective_time(m, best) == pytest.approx(effective_time(m, brute), rel=1e-12), m
    assert best_interval(Measured(0.0, 1.0, 1e-5, 1.0)) == 1, "what costs nothing is done each step"
    # The published formula's own example: a stall of 0.2 s, steps of 30 s, 15 failures a day: every step or two.
    assert best_interval(Measured(0.2, 30.0, 15 / 86400, 300.0)) == 2
    assert best_interval(Measured(30.0, 30.0, 15 / 86400, 300.0)) == 18  # Young and Daly, less one stall: 588 s - 30 s


def test_the_meter_remembers_interruptions_across_restarts() -> None:
    meter = Meter()
    assert meter.measured() is None
    for _ in range(50):
        meter.stepped(0.5, 0.1)
    first = meter.measured()
    assert first is not None
    assert first.stall == pytest.approx(0.1)
    assert first.step == pytest.approx(0.4)
    again = Meter()
    again.restored(meter.meta(), seconds=2.0)
    again.stepped(0.5, 0.1)
    second = again.measured()
    assert second is not None
    assert second.rate == pytest.approx(2 / (86400 + 25.5))
    assert second.recovery == pytest.approx(7.0)
    again.restored({"trained": "x", "interruptions": None}, 1.0)  # of another release: told nothing


def test_auto_captures_less_often_when_captures_are_dear(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("everstep.checkpointer._DECIDE_STEPS", 8)
    begin(node, monkeypatch)
    real = Plan.step

    def dear(self: Plan, meta: dict[str, object]) -> Any:
        time.sleep(0.03)
        return real(self, meta)

    monkeypatch.setattr(Plan, "step", dear)
    state = build()
    with everstep.Checkpointer(state, every="auto") as ck:
        ck.restore()
        captured = [n for n in range(40) if ck.step(n)]
        stats = ck.stats()
    assert captured[:8] == list(range(8))
    assert stats.every > 8
    assert "steps: a capture stalls" in stats.why
    assert stats.captured == len(captured) < 20
    assert all(n % stats.every == 0 for n in captured if n >= 32)
