"""Measures each layer: the profile that the planner reads (docs/reference/profile.md), and what goes between layers.

One rank does it, layer by layer, with a copy of each, so that it never needs more memory than one layer and what it
keeps for its backward pass; the others are given its text, so all have the same numbers.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from everstep.pipeline import _keys
from everstep.pipeline._layer import Layer, Recipe, buffer_sums
from everstep.pipeline._schedule import Spec, Tensors, back, run_layer

_MIB = 1 << 20
_RUNS = 5  # of each layer at most, after one that is not counted
_ENOUGH = 0.2  # seconds of them; what is measured is their quickest


@dataclass(frozen=True)
class Measured:
    """What all ranks know of the model."""

    profile: str  # the text
    specs: tuple[tuple[Spec, ...], ...]  # [layer]: what it gives to the next
    parameters: tuple[int, ...]  # [layer]
    state_bytes: tuple[int, ...]  # [layer]: weights and optimizer


@dataclass
class _Costs:
    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    activation: int = 0
    output: int = 0
    parameters: int = 0
    weight: int = 1
    slots: int = 0  # bytes of the optimizer's state of one parameter


def measure(recipe: Recipe, sample: Tensors, loss: Callable[[Tensors], torch.Tensor], *, microbatch: int,
            memory: int, name: str, latency_us: float, gb_s: float) -> Measured:
    """`sample`: a microbatch's input; `loss`: of the last layer's output. `memory`: bytes of a node, 0: not limited;
    `latency_us`, `gb_s`: of the link between nodes. Raises TypeError or ValueError for a model that cannot be run
    like this."""
    costs: list[_Costs] = []
    specs: list[tuple[Spec, ...]] = []
    now = tuple(t.detach() for t in sample)
    with torch.random.fork_rng():
        for index in range(len(recipe.layers)):
            last = index == len(recipe.layers) - 1
            layer = recipe.layer(index, copy.deepcopy(recipe.module(index)))
            layer.pack()  # what cannot be moved is said before anything runs
            cost, now = _layer(layer, now, loss if last else None)
            costs.append(cost)
            specs.append(tuple(Spec.of(t) for t in now))
    weight = max(c.weight for c in costs)
    slots = min(32, max(c.slots for c in costs))
    text = [
        "everstep-profile 1", f"model = {name}", f"microbatch = {microbatch}",
        f"device-memory-mib = {memory // _MIB}", f"between-latency-us = {latency_us:g}", f"between-gb-s = {gb_s:g}",
        f"weight-bytes = {weight}", f"gradient-bytes = {weight}", f"optimizer-bytes = {slots}",
        "layer,forward_ms,backward_ms,optimizer_ms,activation_mib,output_mib,parameters",
    ]
    text += [f"{i},{c.forward * 1e3:.6f},{c.backward * 1e3:.6f},{c.optimizer * 1e3:.6f},{c.activation / _MIB:.6f},"
             f"{c.output / _MIB:.6f},{c.parameters}" for i, c in enumerate(costs)]
    return Measured("\n".join(text) + "\n", tuple(specs), tuple(c.parameters for c in costs),
                    tuple(c.parameters * (weight + slots) for c in costs))


def _layer(layer: Layer, given: Tensors, loss: Callable[[Tensors], torch.Tensor] | None) -> tuple[_Costs, Tensors]:
    cost = _Costs(parameters=sum(p.numel() for p in layer.module.parameters()))
    if layer.parameters:
        cost.weight = layer.parameters[0].element_size()
    before = buffer_sums(layer.module)
    kept: dict[int, torch.UntypedStorage] = {}  # by address; alive, so that none is used twice
    owned = {p.untyped_storage().data_ptr() for p in layer.module.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    forward: list[float] = []
    backward: list[float] = []
    for run in range(_RUNS + 1):
        if run > 1 and sum(forward) + sum(backward) > _ENOUGH:
            break
        kept.clear()
        began = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            try:
                own, out = run_layer(layer, given, _keys.key(0, layer.index))
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise ValueError(f"Pipeline: layer {layer.index} cannot run on what comes before it, "
                                 f"{[tuple(t.shape) for t in given]}: {error}") from error
            if loss is not None:
                value = loss(out)
                if not isinstance(value, torch.Tensor) or value.dim() or not value.is_floating_point():
                    raise TypeError("Pipeline: loss must give one floating-point number as a tensor, the mean over "
                                    f"the microbatch's samples; it gave {value!r:.80}")
        middle = time.perf_counter()
        layer.bind(None)
        if loss is not None:
            back(layer, own, (value,), [torch.ones_like(value)], None, 0)
        else:
            back(layer, own, out, [torch.ones_like(t) if t.requires_grad else None for t in out], None, 0)
        if run:
            forward.append(middle - began)
            backward.append(time.perf_counter() - middle)
    after = buffer_sums(layer.module)
    for name in before:
        if before[name] != after.get(name):
            raise TypeError(f"Pipeline: buffer {name} of layer {layer.index} changes in the forward pass, so it "
                            "would differ from pipeline to pipeline; keep such values out of the model")
    cost.forward, cost.backward = max(1e-6, min(forward)), min(backward)
    cost.activation = sum(storage.nbytes() for storage in kept.values())
    cost.output = sum(t.numel() * t.element_size() for t in out)
    if layer.optimizer is not None:
        cost.optimizer, cost.slots = _optimizer(layer)
    return cost, tuple(t.detach().requires_grad_(t.requires_grad) for t in out)


def _optimizer(layer: Layer) -> tuple[float, int]:
    """Seconds of a step, and bytes of state for each parameter."""
    assert layer.optimizer is not None
    seconds = math.inf
    for _ in range(2):
        layer.bind(torch.zeros_like(layer.empty()))
        began = time.perf_counter()
        layer.optimizer.step()
        seconds = min(seconds, time.perf_counter() - began)
    held = sum(v.numel() * v.element_size() for state in layer.optimizer.state.values()
               for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    return seconds, math.ceil(held / max(1, layer.size))


def check_profile(text: str, measured: Measured) -> None:
    """Whether a profile that the user gave is of this model. Raises ValueError with the first difference."""
    rows = [line.split(",") for line in text.splitlines() if line and line[0].isdigit()]
    header: list[str] = next((line.split(",") for line in text.splitlines() if "forward_ms" in line), [])
    names = [cell.strip() for cell in header]
    if "parameters" not in names:
        raise ValueError("Pipeline: the profile has no column 'parameters'; docs/reference/profile.md has its form")
    if len(rows) != len(measured.parameters):
        raise ValueError(f"Pipeline: the profile is of {len(rows)} layers, this model has {len(measured.parameters)}")
    place = names.index("parameters")
    for i, (row, count) in enumerate(zip(rows, measured.parameters)):
        said = row[place].strip() if place < len(row) else "?"
        if said != str(count):
            raise ValueError(f"Pipeline: layer {i} has {count} parameters, the profile was measured on one with "
                             f"{said}; measure this model, or leave profile out")


def collate(items: list[Any]) -> tuple[Any, Any]:
    """A microbatch's (input, target). Raises TypeError."""
    batch = torch.utils.data.default_collate(items)
    if not isinstance(batch, (list, tuple)) or len(batch) != 2:
        raise TypeError("Pipeline: a sample of the dataset must be a pair (input, target), not "
                        f"{type(items[0]).__name__}")
    return batch[0], batch[1]

