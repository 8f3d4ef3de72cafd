"""How much memory a state will want, before it is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from everstep._state import is_stateful, unwrap

_TABLE_ROOM = 64 << 10  # first guess of a table's size


def guess_bytes(state: Mapping[str, Any]) -> int:
    """How much a slot will hold once the optimizer has state; a guess."""
    size = _TABLE_ROOM
    for value in map(unwrap, state.values()):
        if isinstance(value, torch.nn.Module):
            size += sum(_local_bytes(t) for t in value.state_dict().values() if isinstance(t, torch.Tensor))
        elif isinstance(value, torch.optim.Optimizer):
            for group in value.param_groups:
                moments = 2 if "betas" in group else 1 if group.get("momentum") else 0
                size += moments * sum(_local_bytes(p) for p in group["params"] if p.requires_grad)
        elif not is_stateful(value):
            size += _plain_bytes(value)
    return size + size // 64


def _local_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") and hasattr(tensor, "placements") else tensor
    return int(local.numel() * local.element_size())


def _plain_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return _local_bytes(value)
    if isinstance(value, Mapping):
        return sum(map(_plain_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_plain_bytes, value))
    return int(getattr(value, "nbytes", 0))
