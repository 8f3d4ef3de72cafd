"""Copies a state aside, so that dcp.async_save may write it while training goes on."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from everstep._state import _copy_all

_Key = tuple[Any, ...]


class Stager:
    """An AsyncStager whose memory is taken once: from the second save on a stage is one copy, by several threads.

    A StorageWriter is one, and dcp.async_save takes it by itself. What is staged is on the CPU. A save that
    begins while the one before is still being written gets memory of its own, so that none is ever torn.
    """

    _synchronize_after_execute = True

    def __init__(self) -> None:
        self._pools: list[_Pool] = []

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Nothing is left to wait for: stage() returns when all is copied."""
        return self._synchronize_after_execute

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same state in memory that training does not change."""
        pool = next((pool for pool in self._pools if pool.free()), None)
        if pool is None:
            pool = _Pool()
            self._pools.append(pool)
        pool.begin()
        with torch.no_grad():
            staged = pool.value(state_dict)
            _copy_all(pool.pairs)
        pool.end()
        return staged  # type: ignore[no-any-return]

    def synchronize_staging(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Gives the memory back."""
        self._pools.clear()


class _Pool:
    """Memory of one staged state: given out anew when nobody holds a tensor of it any more."""

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._memory: dict[_Key, torch.Tensor] = {}
        self._used: dict[_Key, torch.Tensor] = {}
        self._seen: dict[_Key, torch.Tensor] = {}
        self._counts: dict[_Key, int] = {}
        self._out: list[weakref.ref[torch.Tensor]] = []

    def free(self) -> bool:
        return all(reference() is None for reference in self._out)

    def begin(self) -> None:
        self._used, self._seen, self._counts, self._out = {}, {}, {}, []

    def end(self) -> None:
        self.pairs, self._seen, self._memory = [], {}, self._used

    def value(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            made = {key: self.value(item) for key, item in value.items()}
            return made if type(value) is dict else _like(value, made)
        if type(value) in (list, tuple):
            return type(value)(self.value(item) for item in value)
        if value is None or isinstance(value, (bool, int, float, str, bytes, complex, torch.dtype, torch.device)):
            return value
        return copy.deepcopy(value)

    def _tensor(self, value: torch.Tensor) -> Any:
        if hasattr(value, "placements"):
            from torch.distributed.tensor import DTensor

            local = self._tensor(value.to_local())  # type: ignore[attr-defined]
            return DTensor(local, value._spec, requires_grad=False)  # type: ignore[attr-defined]
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_meta:
            return copy.deepcopy(value)
        same = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.is_conj(), value.is_neg())
        if value.numel() and same in self._seen:
            return self._seen[same]
        key: _Key = (value.dtype, tuple(value.shape))
        at = self._counts.get(key, 0)
        self._counts[key] = at + 1
        memory = self._memory.get((*key, at))
        if memory is None:
            memory = torch.empty(value.shape, dtype=value.dtype)
        self._used[(*key, at)] = memory
        staged = memory.detach()  # another object on the same memory: when it is gone, the memory is free
        self._out.append(weakref.ref(staged))
        self._seen[same] = staged
        self.pairs.append((staged, value.detach()))
        return staged


def _like(value: Mapping[Any, Any], made: dict[Any, Any]) -> Any:
    try:
        return type(value)(made)  # type: ignore[call-arg]
    except TypeError:
        return made
