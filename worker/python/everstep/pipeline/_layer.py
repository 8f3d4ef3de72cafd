"""One layer as a rank holds it: its module, its own optimizer and scheduler, its gradient in one piece.

A layer is what moves: its parameters, buffers, optimizer and scheduler state travel together, at one version (the
number of steps that they have seen).
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import torch
from torch import nn

from everstep import _state
from everstep._library import checksum
from everstep._table import Decoder, Encoder
from everstep.pipeline import _keys
from everstep.pipeline._tree import Node, Tree

LayerLike = Union[nn.Module, Callable[[], nn.Module]]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True)
class Tie:
    """Parameters of different layers that are one: (layer, name) of each, ascending; the first one counts."""

    members: tuple[tuple[int, str], ...]


@dataclass
class Recipe:
    """How to make any layer of the model."""

    layers: Sequence[LayerLike]
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    seed: int
    ties: tuple[Tie, ...] = ()
    autocast: torch.dtype | None = None

    def module(self, index: int) -> nn.Module:
        """The user's module, or a new one, whose initial values are the same on each rank."""
        module = self._plain(index)
        for tie in self.ties:
            for layer, name in tie.members[1:]:
                if layer != index or isinstance(self.layers[index], nn.Module):
                    continue
                owner, owners = tie.members[0]
                first = module if owner == index else self._plain(owner)
                with torch.no_grad():
                    module.get_parameter(name).copy_(first.get_parameter(owners))
        return module

    def _plain(self, index: int) -> nn.Module:
        given = self.layers[index]
        if isinstance(given, nn.Module):
            return given
        with torch.random.fork_rng():
            _keys.set_torch(_keys.key(self.seed, _keys.INIT, index))
            made = given()
        if not isinstance(made, nn.Module):
            raise TypeError(f"Pipeline: layer {index} is made by {given!r}, which gave a {type(made).__name__}, not "
                            "a torch.nn.Module")
        return made

    def build(self, index: int) -> Layer:
        """The layer with a fresh optimizer, at version 0."""
        return self.layer(index, self.module(index))

    def layer(self, index: int, module: nn.Module) -> Layer:
        """Of this very module."""
        return Layer(index, module, self.optimizer, self.scheduler, self.autocast)


def check(index: int, module: nn.Module) -> None:
    """Raises TypeError when the engine cannot run or move such a layer."""
    dtypes = {p.dtype for p in module.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise TypeError(f"Pipeline: layer {index} has trainable parameters of {sorted(map(str, dtypes))}; one dtype "
                        "a layer: divide it")
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise TypeError(f"Pipeline: parameter {name} of layer {index} has no shape yet; give layers whose "
                            "parameters exist")
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            raise TypeError(f"Pipeline: {name or type(part).__name__} of layer {index} keeps running statistics, "
                            "which would differ from pipeline to pipeline; use LayerNorm or GroupNorm, or "
                            "track_running_stats=False")


def untie(layers: Sequence[LayerLike], named: Sequence[Sequence[str]]) -> tuple[Tie, ...]:
    """Finds parameters that modules of different layers share, and gives each layer its own; adds those `named`
    ("0.weight", "9.weight"). Their gradients are summed later, so they stay equal."""
    where: dict[int, list[tuple[int, str]]] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.Module):
            for name, parameter in layer.named_parameters():
                where.setdefault(id(parameter), []).append((index, name))
    ties = [tuple(members) for members in where.values() if len(members) > 1]
    for members in ties:
        for index, name in members[1:]:
            layer = layers[index]
            assert isinstance(layer, nn.Module)
            path, _, last = name.rpartition(".")
            old = layer.get_parameter(name)
            setattr(layer.get_submodule(path), last,
                    nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
    for names in named:
        split = sorted((int(head), rest) for head, _, rest in (name.partition(".") for name in names)
                       if head.isdigit() and int(head) < len(layers))
        if len(split) != len(names) or len(split) < 2:
            raise ValueError(f"Pipeline: tied={list(names)!r}: two or more names as 'LAYER.PARAMETER', LAYER from 0 "
                             f"to {len(layers) - 1}")
        ties.append(tuple(split))
    return tuple(Tie(members) for members in ties)


@functools.lru_cache(maxsize=1)
def _crc32c() -> Callable[[int, int, int], int]:
    return checksum()


@dataclass
class Bundle:
    """A layer's state as bytes."""

    table: bytes
    payload: torch.Tensor  # uint8

    @property
    def checksum(self) -> int:
        """Of both."""
        return _crc32c()(zlib.crc32(self.table), self.payload.data_ptr(), self.payload.numel())


    @property
    def meta(self) -> dict[str, Any]:
        """What pack() was given."""
        return self._decoder().meta

    def root(self) -> dict[str, Any]:
        """The state; its tensors are views of the payload."""
        root: dict[str, Any] = self._decoder().root()
        return root

    def _decoder(self) -> Decoder:
        payload = self.payload
        return Decoder(memoryview(payload.numpy().data) if payload.numel() else memoryview(bytearray()), self.table)


class Layer:
    """See the module's text. Not thread-safe."""

    def __init__(self, index: int, module: nn.Module, optimizer: OptimizerFactory,
                 scheduler: SchedulerFactory | None, autocast: torch.dtype | None = None) -> None:
        check(index, module)
        self.index = index
        self.module = module.train()
        self.autocast = autocast
        self.version = 0
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: Any = None
        if self.parameters:
            self.optimizer = make_optimizer(index, optimizer, self.parameters)
            if scheduler is not None:
                self.scheduler = scheduler(self.optimizer)
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.offsets: dict[str, tuple[int, int]] = {}
        self.size = 0
        for name, parameter in zip(names, self.parameters):
            self.offsets[name] = self.size, self.size + parameter.numel()
            self.size += parameter.numel()
        self.gradient: Gradient | None = None

    def empty(self) -> torch.Tensor:
        """Room for a gradient."""
        first = self.parameters[0]
        return torch.empty(self.size, dtype=first.dtype, device=first.device)

    def bind(self, flat: torch.Tensor | None) -> None:
        """Makes parts of `flat` the parameters' gradients; None: takes them away."""
        begin = 0
        for parameter in self.parameters:
            if flat is None:
                parameter.grad = None
                continue
            end = begin + parameter.numel()
            parameter.grad = flat[begin:end].view(parameter.shape)
            begin = end

    def apply(self, gradient: torch.Tensor | None) -> None:
        """One step of optimizer and scheduler, and the next version."""
        if self.optimizer is not None:
            assert gradient is not None
            self.bind(gradient)
            self.optimizer.step()
            self.bind(None)
        if self.scheduler is not None:
            self.scheduler.step()
        self.version += 1

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"module": self.module}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler
        return state

    def pack(self, **meta: object) -> Bundle:
        """Copies the layer's state; `meta` goes with it. Raises TypeError, with the path, for what cannot move."""
        try:
            flat = Encoder().finish(_state.gather(self._state(), with_rng=False), {"layer": self.index, **meta})
        except TypeError as error:
            raise TypeError(f"Pipeline: layer {self.index} has state that cannot be moved: {error}") from None
        payload = torch.zeros(flat.payload_bytes, dtype=torch.uint8)
        base = payload.data_ptr()
        for (address, size), offset in zip(flat.pieces, flat.offsets):
            ctypes.memmove(base + offset, address, size)
        return Bundle(flat.table, payload)

    def unpack(self, bundle: Bundle, version: int) -> None:
        """Takes over a state that pack() gave. Raises RuntimeError when it is another layer's."""
        other = bundle.meta.get("layer")
        if other != self.index:
            raise RuntimeError(f"layer {self.index} was given the state of layer {other}")
        _state.apply(self._state(), bundle.root())
        self.version = version


def make_optimizer(index: int, factory: OptimizerFactory, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The user's optimizer of one layer. Raises TypeError when it is none, or cannot work by layers."""
    made = factory(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"Pipeline: optimizer gave a {type(made).__name__} for layer {index}, not a "
                        "torch.optim.Optimizer")
    if isinstance(made, torch.optim.LBFGS):
        raise TypeError("Pipeline: LBFGS computes the loss again for all layers together; use an optimizer that "
                        "works on each parameter by its gradient")
    if {id(p) for group in made.param_groups for p in group["params"]} != set(map(id, parameters)):
        raise TypeError(f"Pipeline: the optimizer of layer {index} has other parameters than those it was given")
    return made


@dataclass
class Gradient:
    """What a rank has of a layer's gradient for one step: one sum, or the nodes of a tree of microbatches."""

    layer: Layer
    tree: Tree[torch.Tensor] | None = None  # None: one sum
    sum: torch.Tensor | None = None
    _free: list[torch.Tensor] = field(default_factory=list)
    _rooms: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _now: torch.Tensor | None = None
    _bound: bool = False  # the parameters' gradients are parts of the sum

    def begin(self, microbatches: int | None, rescued: Sequence[tuple[Node, torch.Tensor]] = ()) -> None:
        """A step; `microbatches`: how many make up the tree, None: no tree. `rescued`: parts that are there, which
        this gradient owns from now on."""
        if self.tree is not None:
            self._free += self.tree.nodes.values()
        self.tree = None if microbatches is None else Tree(microbatches, self._add)
        self._bound = False
        if self.tree is None:
            self.sum = (self.layer.empty() if self.sum is None else self.sum).zero_()
        for node, flat in rescued:
            if self.tree is not None:
                self.tree.put(node, flat)
            elif self.sum is not None:
                self.sum.add_(flat)

    def room(self, name: tuple[int, int], size: int) -> torch.Tensor:
        """Memory for `size` numbers, under this name the same in every step."""
        if name not in self._rooms:
            self._rooms[name] = self.layer.empty()[:size].clone()
        return self._rooms[name]

    def open(self) -> None:
        """Before the backward pass of a microbatch."""
        if self.tree is None:
            self._now = self.sum
            if self._bound:
                return  # autograd adds to them in place
            self._bound = True
        else:
            self._now = (self._free.pop() if self._free else self.layer.empty()).zero_()
        self.layer.bind(self._now)

    def close(self, microbatch: int) -> None:
        """After it."""
        assert self._now is not None
        if self.tree is not None:
            self.tree.put((0, microbatch), self._now)
        self._now = None

    def parts(self) -> list[tuple[Node, torch.Tensor]]:
        """All of it, in order. One sum is called node (-1, 0)."""
        if self.tree is not None:
            return sorted(self.tree.nodes.items(), key=lambda item: item[0])
        assert self.sum is not None
        return [((-1, 0), self.sum)]

    def _add(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        self._free.append(right)
        return left.add_(right)


def buffer_sums(module: nn.Module) -> Mapping[str, int]:
    """Checksums of the buffers, by name."""
    return {name: zlib.crc32(b.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            for name, b in module.named_buffers() if b.numel()}

