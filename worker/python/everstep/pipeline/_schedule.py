"""One stage's part of a step: forward and backward passes in 1F1B order, activations and gradients by send and recv.

    stage 0  F0 F1 F2 B0 F3 B1    B2    B3        warm: S - 1 - i forward passes
    stage 1     F0 F1 B0 F2 B1 F3 B2 B3           then one forward, one backward
    stage 2        F0 B0 F1 B1 F2 B2 F3 B3        then what is left of the backward passes

The graph is cut between layers: each layer's backward pass runs by itself. So what a layer computes does not depend
on which layers lie on the same rank, and its gradient can leave while the layers before it still work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from everstep.pipeline import _keys
from everstep.pipeline._layer import Gradient, Layer

TAG_FORWARD, TAG_BACKWARD = 4 << 24, 5 << 24

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Spec:
    """One tensor that goes from a layer to the next."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        """Of this tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def tensors(value: Any, what: str) -> Tensors:
    """What a layer takes or gives. Raises TypeError."""
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, (tuple, list)) and value and all(isinstance(t, torch.Tensor) for t in value):
        return tuple(value)
    raise TypeError(f"Pipeline: {what} is a {type(value).__name__}; it must be a tensor or a tuple of tensors")


def run_layer(layer: Layer, inputs: Tensors, stream: int) -> tuple[Tensors, Tensors]:
    """Its own inputs, cut from what made them, and its outputs."""
    own = tuple(t.detach().requires_grad_(t.requires_grad) for t in inputs)
    _keys.set_torch(stream)
    with torch.autocast("cpu", layer.autocast) if layer.autocast is not None else contextlib.nullcontext():
        out = layer.module(*own)
    return own, tensors(out, f"what layer {layer.index} gives")


def back(layer: Layer, inputs: Tensors, roots: Tensors, gradients: Sequence[torch.Tensor | None],
         gradient: Gradient | None, microbatch: int) -> list[torch.Tensor | None]:
    """The backward pass of one layer: the gradients of its inputs; its parameters' are added to `gradient`."""
    if gradient is not None:
        gradient.open()
    pairs = [(root, g) for root, g in zip(roots, gradients) if root.requires_grad and g is not None]
    if pairs:
        torch.autograd.backward([root for root, _ in pairs], [g for _, g in pairs])
    if gradient is not None:
        gradient.close(microbatch)
    return [t.grad for t in inputs]


class _Inbox:
    """Receives messages of one kind from one neighbour, one ahead."""

    def __init__(self, rank: int, specs: Sequence[Spec], tag: int, count: int) -> None:
        self._rank, self._specs, self._tag, self._left = rank, specs, tag, count
        self._next: list[tuple[Any, torch.Tensor]] = []
        self._post()

    def _post(self) -> None:
        self._next = []
        if self._left == 0:
            return
        self._left -= 1
        for i, spec in enumerate(self._specs):
            buffer = torch.empty(spec.shape, dtype=spec.dtype)
            self._next.append((dist.irecv(buffer, self._rank, tag=self._tag + i), buffer))

    def take(self) -> Tensors:
        came = self._next
        for work, _ in came:
            work.wait()
        self._post()
        return tuple(buffer for _, buffer in came)


@dataclass
class Stage:
    """What a rank does of a step. `before`, `after`: the neighbours' ranks; None: first, last stage."""

    layers: list[Layer]  # ascending
    index: int
    stages: int
    before: int | None
    after: int | None
    takes: Sequence[Spec]  # from `before`
    gives: Sequence[Spec]  # to `after`
    loss: Callable[[Any, Any], torch.Tensor]
    data: Callable[[int, int], tuple[Any, Any]]  # (step, microbatch) -> input, target
    stream: Callable[[int, int, int], int]  # (step, microbatch, layer) -> key of its random stream
    share: float  # of a microbatch's loss in the step's

    def run(self, step: int, microbatches: Sequence[int], gradients: dict[int, Gradient],
            done: Callable[[Layer], None]) -> dict[int, float]:
        """The losses by microbatch, on the last stage. `done`: is told when a layer's gradient is whole; layers come
        from the last to the first."""
        count = len(microbatches)
        wanted = [spec for spec in self.gives if spec.needs_grad]
        self._step, self._gradients = step, gradients
        self._sends: list[tuple[Any, torch.Tensor]] = []
        self._forward = None if self.before is None else _Inbox(self.before, self.takes, TAG_FORWARD, count)
        self._backward = None if self.after is None else _Inbox(self.after, wanted, TAG_BACKWARD, count)
        self._kept: dict[int, tuple[list[tuple[Tensors, Tensors]], torch.Tensor | None]] = {}
        losses: dict[int, float] = {}
        warm = min(count, self.stages - 1 - self.index)
        for k in range(warm):
            self._go_forward(microbatches[k], losses)
        for k in range(count):
            if warm + k < count:
                self._go_forward(microbatches[warm + k], losses)
            self._go_backward(microbatches[k], done if k == count - 1 else None)
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()
        return losses

    def _go_forward(self, microbatch: int, losses: dict[int, float]) -> None:
        target: Any = None
        if self._forward is None or self.after is None:
            given, target = self.data(self._step, microbatch)
        if self._forward is None:
            now = tensors(given, "a microbatch's input")
        else:
            now = tuple(t.requires_grad_(spec.needs_grad) for t, spec in zip(self._forward.take(), self.takes))
        kept: list[tuple[Tensors, Tensors]] = []
        for layer in self.layers:
            own, now = run_layer(layer, now, self.stream(self._step, microbatch, layer.index))
            kept.append((own, now))
        loss: torch.Tensor | None = None
        if self.after is None:
            _keys.set_torch(self.stream(self._step, microbatch, self.layers[-1].index + 1))
            loss = self.loss(now[0] if len(now) == 1 else now, target)
            losses[microbatch] = float(loss.detach())
        else:
            self._check(now)
            self._send(now, self.after, TAG_FORWARD)
        self._kept[microbatch] = kept, loss

    def _go_backward(self, microbatch: int, done: Callable[[Layer], None] | None) -> None:
        kept, loss = self._kept.pop(microbatch)
        gradients: list[torch.Tensor | None]
        if self._backward is not None:
            came = iter(self._backward.take())
            gradients = [next(came) if spec.needs_grad else None for spec in self.gives]
        for place in reversed(range(len(self.layers))):
            layer, (own, roots) = self.layers[place], kept[place]
            if loss is not None and place == len(self.layers) - 1:
                roots, gradients = (loss * self.share,), [torch.ones_like(loss)]
            gradients = back(layer, own, roots, gradients, self._gradients.get(layer.index), microbatch)
            if done is not None:
                done(layer)
        if self.before is not None:
            made = tuple(g if g is not None else torch.zeros(spec.shape, dtype=spec.dtype)
                         for g, spec in zip(gradients, self.takes) if spec.needs_grad)
            self._send(made, self.before, TAG_BACKWARD)

    def _send(self, values: Tensors, rank: int, tag: int) -> None:
        self._sends = [(work, t) for work, t in self._sends if not work.is_completed()]
        for i, value in enumerate(values):
            piece = value.detach().contiguous()
            self._sends.append((dist.isend(piece, rank, tag=tag + i), piece))

    def _check(self, now: Tensors) -> None:
        if len(now) != len(self.gives) or any(tuple(t.shape) != s.shape or t.dtype != s.dtype
                                              for t, s in zip(now, self.gives)):
            raise RuntimeError(f"Pipeline: layer {self.layers[-1].index} gave {[tuple(t.shape) for t in now]} in "
                               f"step {self._step}, and {[s.shape for s in self.gives]} when it was measured; every "
                               "microbatch must have the same shapes: pad them")
