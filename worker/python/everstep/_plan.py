"""Where each part of a state lies in a slot, worked out once and used again while nothing but values changes.

Payload of a slot, in order:

    late    parameters of modules and the state of PyTorch's optimizers: optimizer.step() alone changes them,
            so that an overlapped capture may copy them during the next forward and backward
    fixed   the other tensors of modules (buffers): their memory stays, the forward pass changes them
    loose   everything else, looked at anew each time: schedulers, samplers, plain values, random streams
    table   what lies where, and all that is no tensor

With `share` a rank keeps its part of each parameter and of its optimizer's state only (_division.py): the same on
every rank, so that all of them together have everything once. The rest stays whole.

A plan is used again when its watches find the same containers, tensors, addresses and shapes as before; what a
plan cannot watch (hooks on state_dict, sharded tensors) makes it one for a single step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from operator import is_not
from typing import Any

import torch
from torch import nn

from everstep._division import Part, divide
from everstep._library import PieceArray, pieces
from everstep._state import RNG, gather_rng, is_stateful, unwrap
from everstep._table import ALIGNMENT, FORMAT, Encoder


class Step:
    """What one capture writes."""

    def __init__(self, plan: Plan, early: PieceArray, expected: list[int], payload_bytes: int, table: bytes,
                 keep: list[object], placed: PieceArray | None, staged: list[tuple[int, torch.Tensor]]) -> None:
        self.plan = plan
        self.early = early  # fixed and loose pieces
        self.expected = expected  # offsets of late and early pieces
        self.payload_bytes = payload_bytes  # without the table
        self.table = table
        self.keep = keep  # owns the memory of the loose pieces
        self.placed = placed  # all pieces, when a device copies some of them itself
        self.staged = staged  # (offset, source) of those among the loose ones


class Plan:
    """The layout of one state. Holds its tensors' memory as long as it lives."""

    def __init__(self, state: Mapping[str, Any], with_rng: bool, never_late: frozenset[int] = frozenset(),
                 share: tuple[int, int] | None = None, find_common: bool = False,
                 owns: Callable[[torch.Tensor], bool] | None = None) -> None:
        """Lays `state` out. Tensors whose memory begins at an address of `never_late` are not late. `share`: the rank
        and the world that capture a state in shares. `find_common`: `common` is asked for. `owns`: tensors that their
        device copies to the slot itself (_staging.py).

        Raises TypeError, with its path, for a part that cannot be kept.
        """
        self._state, self._with_rng = state, with_rng
        self._targets: list[tuple[str, Any]] = []
        self._watches: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = []  # mapping, keys, values
        self._lists: list[tuple[list[Any], list[Any]]] = []  # list, what was in it
        # Optimizers with their state and groups: load_state_dict() puts others in their place.
        self._held: list[tuple[torch.optim.Optimizer, Any, Any]] = []
        self._names: list[tuple[set[str], set[str]]] = []  # set, what was in it
        self._empty: list[Any] = []  # containers that must stay empty
        # Name, its text (None: loose), the optimizer to ask for its groups and the numbers of their parameters.
        self._entries: list[tuple[str, str | None, tuple[torch.optim.Optimizer, list[str]] | None]] = []
        self.reusable = True
        for name, value in state.items():
            if not isinstance(name, str) or name == RNG:
                raise TypeError(f"state: a name must be a str other than {RNG!r}, not {name!r}")
            self._targets.append((name, unwrap(value)))
        known: list[tuple[str, Any, Any, Any]] = []  # name, target, its tree (None: loose), the numbers of its groups
        for name, target in self._targets:
            if isinstance(target, nn.Module):
                known.append((name, target, self._module(target), None))
            elif isinstance(target, torch.optim.Optimizer):
                tree, watched = self._optimizer(target)
                known.append((name, target, tree, _numbers(target) if watched else None))
            else:
                known.append((name, target, None, None))
        found = _common(known) if share is not None or find_common else {}
        self.common = [(path, tensor) for path, (tensor, _) in sorted(found.items())]  # what shares may divide
        parts = _parts(found, *share) if share is not None else {}
        self.shared = bool(parts)  # some tensor is kept in part, the rest of it by other ranks
        self._owns = owns
        encoder = Encoder(_late_addresses([t for _, t in self._targets]) - never_late, parts=parts, owns=owns)
        trees = [(name, None if tree is None else encoder.node(tree, name),
                  None if numbers is None else (target, numbers)) for name, target, tree, numbers in known]
        if encoder.sharded:
            self.reusable = False  # a DTensor's part is another object each time it is asked for
        self.sharded = encoder.sharded
        late, fixed = encoder.late, encoder.rest
        fixed.move(-(-late.end // ALIGNMENT) * ALIGNMENT)
        self._known = encoder.placed()
        for name, node, optimizer in trees:
            self._entries.append((name, None if node is None else _text(node), optimizer))
        self.late, self._fixed = pieces(late.pieces), pieces(fixed.pieces)
        self.staged_late, self.staged_fixed = late.staged, fixed.staged
        self._whole = pieces(fixed.pieces, after=self.late)
        self.late_bytes = late.end
        self._offsets = late.offsets + fixed.offsets
        self._end = fixed.end if fixed.offsets else late.end
        self._keep = (late.keep, fixed.keep)
        self._copies = late.copies + fixed.copies
        self._live = encoder.tensors
        self._marks = [(t.data_ptr(), t.shape) for t in self._live]
        self._late_names = [path for path, _ in late.tensors]
        self._late_tensors = [t for _, t in late.tensors]
        self.first = True  # the step under way is its first
        self._steps = 0

    def _module(self, module: nn.Module) -> Mapping[str, Any]:
        plain = all(_is_plain(m) for m in module.modules())
        if not plain:
            self.reusable = False
            return module.state_dict()
        for m in module.modules():
            for mapping in (m._parameters, m._buffers, m._modules):
                self._watch(mapping)
            self._empty += [m._state_dict_hooks, m._state_dict_pre_hooks]
            self._names.append((m._non_persistent_buffers_set, set(m._non_persistent_buffers_set)))
        return module.state_dict(keep_vars=True)

    def _optimizer(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], bool]:
        """What to encode now, and whether its groups are asked anew each time."""
        tree = optimizer.state_dict()
        plain = type(optimizer).state_dict is torch.optim.Optimizer.state_dict \
            and not optimizer._optimizer_state_dict_pre_hooks and not optimizer._optimizer_state_dict_post_hooks \
            and set(tree) == {"state", "param_groups"} \
            and all(isinstance(k, torch.Tensor) and type(values) is dict for k, values in optimizer.state.items()) \
            and all(v is None or type(v) in (bool, int, float, str) or isinstance(v, torch.Tensor)
                    for values in optimizer.state.values() for v in values.values())
        if not plain:
            self.reusable = False
            return tree, False
        self._held.append((optimizer, optimizer.state, optimizer.param_groups))
        self._watch(optimizer.state)
        for values in optimizer.state.values():
            self._watch(values)
        self._empty += [optimizer._optimizer_state_dict_pre_hooks, optimizer._optimizer_state_dict_post_hooks]
        self._lists.append((optimizer.param_groups, list(optimizer.param_groups)))
        for group in optimizer.param_groups:
            self._lists.append((group["params"], list(group["params"])))
        return tree["state"], True

    def _watch(self, mapping: Mapping[Any, Any]) -> None:
        self._watches.append((mapping, tuple(mapping), tuple(mapping.values())))

    def fits(self) -> bool:
        """The state has the layout it had: nothing was added, taken away, replaced, moved or reshaped."""
        if not self.reusable or any(self._empty):
            return False
        if [k for k, _ in self._targets] != list(self._state) \
                or any(unwrap(self._state[k]) is not t for k, t in self._targets if _is_fixed(t)):
            return False
        for mapping, keys, values in self._watches:
            if len(mapping) != len(values) or any(map(is_not, mapping.values(), values)) \
                    or any(map(is_not, mapping, keys)):
                return False
        for items, were in self._lists:
            if len(items) != len(were) or any(map(is_not, items, were)):
                return False
        if any(now != were_names for now, were_names in self._names) \
                or any(o.state is not held or o.param_groups is not groups for o, held, groups in self._held):
            return False
        return [(t.data_ptr(), t.shape) for t in self._live] == self._marks

    def step(self, meta: dict[str, object]) -> Step:
        """Lays out the state as it is now. REQUIRES: fits(), or the plan is new."""
        self.first = self._steps == 0
        self._steps += 1
        if not self.first:
            for copy, source in self._copies:
                copy.copy_(source)
        encoder = Encoder(known=self._known, start=self._end, owns=self._owns)
        texts = []
        for name, text, optimizer in self._entries:
            key = json.dumps(name)
            if text is None:
                value = unwrap(self._state[name])
                text = _text(encoder.node(value.state_dict() if is_stateful(value) else value, name))
            elif optimizer is not None:
                each = zip(optimizer[0].param_groups, optimizer[1])
                groups = ",".join(_group(encoder, name, group, numbers) for group, numbers in each)
                text = f'{{"d":[["state",{text}],["param_groups",{{"l":[{groups}]}}]]}}'
            texts.append(f"[{key},{text}]")
        if self._with_rng:
            texts.append(f'["{RNG}",{_text(encoder.node(gather_rng(), RNG))}]')
        self.sharded |= encoder.sharded
        loose = encoder.rest
        staged = loose.staged
        placed = pieces(loose.pieces, after=self._whole) if staged or self.staged_late or self.staged_fixed else None
        table = f'{{"format":{FORMAT},"meta":{_text(meta)},"root":{{"d":[{",".join(texts)}]}}}}'
        return Step(self, pieces(loose.pieces, after=self._fixed), self._offsets + loose.offsets, loose.end,
                    table.encode(), loose.keep, placed, staged)

    def versions(self) -> list[int]:
        """How often each late tensor was changed in place so far, as far as PyTorch knows."""
        return [t._version for t in self._late_tensors]

    def changed(self, versions: list[int]) -> list[tuple[str, int]]:
        """Names and addresses of the late tensors that were changed since versions() said `versions`."""
        now = self.versions()
        if now == versions:
            return []
        return [(name, tensor.data_ptr()) for name, tensor, was, is_ in
                zip(self._late_names, self._late_tensors, versions, now) if was != is_]


def _text(node: Any) -> str:
    return json.dumps(node, separators=(",", ":"), allow_nan=False)


def _common(known: list[tuple[str, Any, Any, Any]]) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """What is the same on every rank under data parallelism: parameters and their optimizer's state. By path, and
    with all paths of the same memory: tied tensors are one."""
    found: dict[tuple[Any, ...], tuple[torch.Tensor, list[str]]] = {}  # by memory

    def add(path: str, value: Any) -> None:
        if type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta:
            memory = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
            found.setdefault(memory, (value, []))[1].append(path)

    for name, target, tree, numbers in known:
        if isinstance(target, nn.Module):
            parameters = {key for key, _ in target.named_parameters(remove_duplicate=False)}
            for key in parameters.intersection(tree):
                add(f"{name}[{key!r}]", tree[key])
        elif isinstance(target, torch.optim.Optimizer):
            # A tree with groups apart from it is the state alone.
            states, path = (tree, name) if numbers is not None else (tree.get("state"), f"{name}['state']")
            for index, values in states.items() if isinstance(states, dict) else ():
                for key, value in values.items() if isinstance(values, dict) else ():
                    add(f"{path}[{index!r}][{key!r}]", value)
    return {min(paths): (tensor, paths) for tensor, paths in found.values()}


def _parts(common: Mapping[str, tuple[torch.Tensor, list[str]]], rank: int, world: int) -> dict[str, Part]:
    """Of each tensor that is divided between the ranks, by its path, the part of this one."""
    tensors = {first: (tuple(tensor.shape), tensor.itemsize) for first, (tensor, _) in common.items()}
    return {path: part for first, part in divide(tensors, rank, world).items() for path in common[first][1]}


def _is_fixed(target: Any) -> bool:
    return isinstance(target, (nn.Module, torch.optim.Optimizer))


def _is_plain(module: nn.Module) -> bool:
    """Its state_dict() is its parameters and buffers, and nothing else."""
    kind = type(module)
    return kind.state_dict is nn.Module.state_dict and kind._save_to_state_dict is nn.Module._save_to_state_dict \
        and kind.get_extra_state is nn.Module.get_extra_state and not module._state_dict_hooks \
        and not module._state_dict_pre_hooks


def _numbers(optimizer: torch.optim.Optimizer) -> list[str]:
    """Of each group, its parameters by their number, as state_dict() has them."""
    numbers: dict[int, int] = {}
    out, start = [], 0
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"], start):
            numbers.setdefault(id(p), i)
        start += len(group["params"])
        out.append(_text({"l": [numbers[id(p)] for p in group["params"]]}))
    return out


def _group(encoder: Encoder, name: str, group: dict[str, Any], numbers: str) -> str:
    """One of state_dict()["param_groups"]."""
    rest = encoder.node({k: v for k, v in group.items() if k != "params"}, f"{name}['param_groups']")
    items = [_text(item) for item in rest["d"]] + ['["params",' + numbers + "]"]
    return '{"d":[' + ",".join(items) + "]}"


def _late_addresses(targets: list[Any]) -> frozenset[int]:
    """Where the memory begins that optimizer.step() alone changes."""
    found: set[int] = set()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            local: Any = value
            if hasattr(local, "placements"):
                local = local.to_local()
            # Exactly these: a lazy one has no memory yet, FSDP1's FlatParameter gives it back now and then.
            if type(local) in (torch.Tensor, nn.Parameter) and local.layout == torch.strided and not local.is_meta:
                found.add(local.data_ptr())

    if not any(isinstance(t, torch.optim.Optimizer) for t in targets):
        return frozenset()
    with torch.no_grad():
        for target in targets:
            if isinstance(target, nn.Module):
                for p in target.parameters():
                    add(p)
            elif isinstance(target, torch.optim.Optimizer):
                for values in target.state.values():
                    for value in values.values() if isinstance(values, dict) else ():
                        add(value)
        for target in targets:  # what shares a buffer's memory is none of them
            if isinstance(target, nn.Module):
                for b in target.buffers():
                    if type(b) is torch.Tensor and b.layout == torch.strided and not b.is_meta:
                        found.discard(b.data_ptr())
    return frozenset(found - {0})
