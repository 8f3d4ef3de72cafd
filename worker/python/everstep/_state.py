"""From the user's objects to a nested state and back: modules, optimizers, any Stateful, plain values."""

from __future__ import annotations

import math
import os
import random
import sys
from array import array
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from everstep._library import copier
from everstep._table import ShardedLeaf, is_sharded

RNG = "__rng__"  # reserved name in a state
_PART = 16 << 20  # bytes that one thread copies at a time
_COPY_THREADS = 4  # more do not copy any faster

Loader = Callable[[list[tuple[int, int, int]]], None]


class Bringer(Protocol):
    """Copies to tensors on a device, which the device does by itself."""

    def owns(self, tensor: torch.Tensor) -> bool:
        """It is on such a device."""

    def bring(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Copies (to, from) and waits for it; answers those that it does not serve."""


def unwrap(value: Any) -> Any:
    """A DistributedDataParallel's own module: names do not depend on the wrapper."""
    while isinstance(value, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
        value = value.module
    return value


def gather(state: Mapping[str, Any], with_rng: bool) -> dict[str, Any]:
    """The state of every object, nothing copied: tensors are the objects' own."""
    out: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str) or name == RNG:
            raise TypeError(f"state: a name must be a str other than {RNG!r}, not {name!r}")
        target = unwrap(value)
        out[name] = target.state_dict() if is_stateful(target) else target
    if with_rng:
        out[RNG] = gather_rng()
    return out


def apply(state: Mapping[str, Any], saved: dict[str, Any], load: Loader | None = None,
          bring: Bringer | None = None) -> None:
    """Puts `saved` into the user's objects. Tensors of `saved` may be views: they are copied.

    `load`: checks the memory behind `saved` and copies (address to, address from, bytes) out of it, in one pass;
    nothing of that memory is used before. Raises RuntimeError when names, shapes or dtypes differ, before anything
    is changed where it can tell. When `load` raises, tensors that it was to fill hold NaN (integers: 0), so that
    nobody trains on them. `bring`: asked first for tensors that lie on a device.
    """
    names = {k for k in saved if k != RNG}
    if names != set(state):
        missing, surplus = sorted(set(state) - names), sorted(names - set(state))
        raise RuntimeError("the checkpoint holds another state than this script's: "
                           + "; ".join(f"{what} {', '.join(map(repr, which))}" for what, which in
                                       (("it lacks", missing), ("it has besides", surplus)) if which)
                           + "; give Checkpointer the same names as the run that captured it")
    for name, value in state.items():
        _check(name, unwrap(value), saved[name])
    pairs: list[tuple[torch.Tensor, Any]] = []
    for name, value in state.items():
        target = unwrap(value)
        if isinstance(target, torch.nn.Module):
            own = target.state_dict()
            pairs += [(own[key], saved[name][key]) for key in own if isinstance(own[key], torch.Tensor)]
        elif isinstance(target, torch.Tensor):
            pairs.append((target, saved[name]))
    _copy_all(pairs, load, bring)
    for name, value in state.items():
        if not isinstance(unwrap(value), torch.Tensor):
            _apply_one(state, name, unwrap(value), saved[name])


def is_stateful(value: Any) -> bool:
    """It has a state_dict() to ask for and a load_state_dict() to give to."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def _local(value: Any) -> torch.Tensor:
    local: torch.Tensor = value.to_local() if is_sharded(value) else value
    return local


def _check(name: str, target: Any, saved: Any) -> None:
    if not isinstance(target, torch.nn.Module):
        if isinstance(target, torch.Tensor):
            _match(name, target, saved)
        return
    own = target.state_dict()
    if set(own) != set(saved):
        missing, surplus = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
        raise RuntimeError(f"{name}: the checkpoint is of another model: it lacks {missing[:5]}, "
                           f"has besides {surplus[:5]} (first 5 each)")
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            _match(f"{name}.{key}", value, saved[key])


def _match(path: str, own: torch.Tensor, saved: Any) -> None:
    local = _local(own)
    other = saved.local if isinstance(saved, ShardedLeaf) else saved
    if not isinstance(other, torch.Tensor):
        raise RuntimeError(f"{path}: the checkpoint holds a {type(other).__name__}, not a tensor")
    if isinstance(saved, ShardedLeaf) != (local is not own):
        raise RuntimeError(f"{path}: sharded in one of checkpoint and script, whole in the other")
    if other.shape != local.shape or other.dtype != local.dtype:
        raise RuntimeError(f"{path}: the checkpoint holds {other.dtype} {tuple(other.shape)}, this rank has "
                           f"{local.dtype} {tuple(local.shape)}; the model or its sharding has changed")


def _apply_one(state: Mapping[str, Any], name: str, target: Any, saved: Any) -> None:
    if isinstance(target, torch.nn.Module):
        _load_extra(target, saved)
    elif isinstance(target, torch.optim.Optimizer):
        _load_optimizer(target, saved)
    elif is_stateful(target):
        target.load_state_dict(_owned(saved))
    elif isinstance(target, MutableMapping) and isinstance(saved, dict):
        _fill(target, saved)
    elif isinstance(state, MutableMapping):
        state[name] = _owned(saved)
    else:
        raise RuntimeError(f"{name}: a {type(target).__name__} cannot be changed in place, and the state given to "
                           "Checkpointer is no dict; give it as a dict")


def _copy(target: torch.Tensor, saved: Any) -> None:
    with torch.no_grad():
        _local(target).copy_(saved.local if isinstance(saved, ShardedLeaf) else saved)


def _copy_all(pairs: list[tuple[torch.Tensor, Any]], load: Loader | None = None,
              bring: Bringer | None = None) -> None:
    """_copy of each pair: plain ones as bytes, by `load` or, large ones, by several threads."""
    plain: list[tuple[int, int, int]] = []
    others: list[tuple[torch.Tensor, torch.Tensor]] = []
    for target, saved in pairs:
        local, source = _local(target), saved.local if isinstance(saved, ShardedLeaf) else saved
        on_host = local.device.type == "cpu" and not (bring is not None and bring.owns(local))
        if on_host and local.dtype == source.dtype and local.shape == source.shape \
                and local.is_contiguous() and source.is_contiguous() and not local.is_conj() and not local.is_neg():
            plain.append((local.data_ptr(), source.data_ptr(), local.numel() * local.element_size()))
        else:
            others.append((local, source))
    if load is not None:
        # Each byte of the checkpoint goes to one place, and each place takes one: what is tied comes afterwards.
        once, plain = _apart([p for p in plain if p[2] > 0])
        try:
            load(once)
        except Exception:
            for target, _ in pairs:
                with torch.no_grad():
                    _local(target).fill_(math.nan if target.is_floating_point() or target.is_complex() else 0)
            raise
    with torch.no_grad():
        for local, source in others if bring is None else bring.bring(others):
            local.copy_(source)
    _copy_plain([(to + at, source + at, min(_PART, size - at)) for to, source, size in plain
                 for at in range(0, size, _PART)])


def _apart(plain: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """(to, from, bytes): those that share no byte with another, ascending by source; the others, in their order."""
    shared: set[int] = set()
    for side in (0, 1):
        order = sorted(range(len(plain)), key=lambda i: plain[i][side])
        last, end = -1, 0
        for i in order:
            begin = plain[i][side]
            if last >= 0 and begin < end:
                shared |= {i, last}
            if begin + plain[i][2] > end:
                last, end = i, begin + plain[i][2]
    return (sorted((p for i, p in enumerate(plain) if i not in shared), key=lambda p: p[1]),
            [p for i, p in enumerate(plain) if i in shared])


def _copy_plain(plain: list[tuple[int, int, int]]) -> None:
    """(to, from, bytes) each, at most _PART, by several threads where that pays."""
    if not plain:
        return
    copy, total = copier(), sum(size for _, _, size in plain)
    threads = min(_COPY_THREADS, os.cpu_count() or 1)
    if threads == 1 or total < _PART:
        for part in plain:
            copy(*part)
        return
    shares: list[list[tuple[int, int, int]]] = [[]]
    filled = 0
    for part in plain:  # a few shares a thread, so that they end together
        if filled * threads * 4 >= total:
            shares.append([])
            filled = 0
        shares[-1].append(part)
        filled += part[2]

    def copy_share(share: list[tuple[int, int, int]]) -> None:
        for part in share:
            copy(*part)

    with ThreadPoolExecutor(threads) as pool:  # the copies run without the interpreter's lock
        list(pool.map(copy_share, shares))


def _load_extra(module: torch.nn.Module, saved: dict[str, Any]) -> None:
    """What get_extra_state() of its submodules gave; its tensors are there."""
    own = module.state_dict()
    extra = {k: v for k, v in saved.items() if not isinstance(own[k], torch.Tensor)}
    if extra:
        module.load_state_dict({**own, **_owned(extra)})


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """As optimizer.load_state_dict, but bit for bit: that one casts moments to their parameter's dtype."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    order = [i for group in saved["param_groups"] for i in group["params"]]
    if len(parameters) != len(order):
        raise RuntimeError(f"the checkpoint's optimizer has {len(order)} parameters, this one {len(parameters)}")
    by_index = dict(zip(order, parameters))
    exact: dict[Any, dict[str, Any]] = {}
    for index, values in saved["state"].items():
        parameter = by_index[index]
        exact[index] = {key: _beside(parameter, value) for key, value in values.items()}
    groups = _owned(saved["param_groups"])
    optimizer.load_state_dict({**{k: _owned(v) for k, v in saved.items() if k not in ("state", "param_groups")},
                               "state": exact, "param_groups": groups})
    for index, values in exact.items():
        own = optimizer.state[by_index[index]]
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and own[key].dtype != value.dtype:
                own[key] = value


def _beside(parameter: torch.Tensor, value: Any) -> Any:
    """A state value in memory of its own, where its parameter lies."""
    if isinstance(value, ShardedLeaf):
        from torch.distributed.tensor import DTensor

        if not isinstance(parameter, DTensor):
            raise RuntimeError("the checkpoint's optimizer is sharded, this one is not")
        shape = torch.Size(value.shape)
        return DTensor.from_local(value.local.to(parameter.device, copy=True), parameter.device_mesh,
                                  parameter.placements, run_check=False, shape=shape,
                                  stride=torch.empty(shape, device="meta").stride())
    if isinstance(value, torch.Tensor):
        # 0-dimensional step counts stay on the CPU, as torch keeps them.
        return value.clone() if value.dim() == 0 else value.to(_local(parameter).device, copy=True)
    return _owned(value)


def _owned(value: Any) -> Any:
    """The same, with tensors that own their memory."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, ShardedLeaf):
        raise RuntimeError("a sharded tensor outside of a model or an optimizer cannot be put back")
    if isinstance(value, dict):
        return type(value)((k, _owned(v)) for k, v in value.items()) if type(value) is not dict else {
            k: _owned(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_owned(v) for v in value)
    return value


def _fill(target: MutableMapping[Any, Any], saved: dict[Any, Any]) -> None:
    """Makes a plain mapping equal to the saved one; its tensors keep their memory where they fit."""
    for key in [k for k in target if k not in saved]:
        del target[key]
    for key, value in saved.items():
        own = target.get(key)
        if isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor) and own.shape == value.shape \
                and own.dtype == value.dtype:
            _copy(own, value)
        elif isinstance(own, MutableMapping) and isinstance(value, dict):
            _fill(own, value)
        else:
            target[key] = _owned(value)


# --- random streams ---


def gather_rng() -> dict[str, Any]:
    """Python's, numpy's (when imported) and torch's generators; CUDA's when it is in use."""
    version, words, gauss = random.getstate()
    # 625 numbers one by one would cost more than all else that a step writes down.
    out: dict[str, Any] = {"python": [version, array("I", words).tobytes(), gauss], "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        import numpy as np

        out["numpy"] = np.random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        out["cuda"] = torch.cuda.get_rng_state_all()
    return out


def apply_rng(saved: dict[str, Any]) -> None:
    """Sets every generator that the process has."""
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(array("I", words)), gauss))
    torch.set_rng_state(saved["torch"].clone())
    if "numpy" in saved:
        import numpy as np

        np.random.set_state(saved["numpy"])
    if "cuda" in saved and torch.cuda.is_available():
        states = [s.clone() for s in saved["cuda"]]
        torch.cuda.set_rng_state_all(states[:torch.cuda.device_count()])


def derive_rng(saved: dict[str, Any], rank: int) -> None:
    """For a rank without streams of its own (the world has grown, or its shard is lost): new ones, the same
    each time, drawn from another rank's and this rank's number."""
    state: torch.Tensor = saved["torch"]
    words = state.clone().view(torch.int64)
    seed = (int((words * torch.arange(1, words.numel() + 1)).sum()) * 1_000_003 + rank) % (1 << 63)
    random.seed(seed)
    torch.manual_seed(seed)  # CUDA's too
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(seed % (1 << 32))
