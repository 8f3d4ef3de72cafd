"""A checkpoint of the file tier as a folder that loads without Everstep.

    python -m everstep.export CHECKPOINT OUT --format safetensors|dcp

safetensors: OUT/NAME.safetensors for each name given to Checkpointer, tensors whole (the parts of a
DTensor and the ranks' shares put together), and OUT/state.json with every other value, tensors named where
they stood.
dcp: what torch.distributed.checkpoint.load reads, names joined by dots.

The file format is docs/internals/checkpoint-files.md. No pickle is read or, but by DCP itself, written.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from everstep._shards import open_shards, read_manifest
from everstep._table import SHARE, ShardedLeaf

_SHARD = re.compile(r"S(?:hard)?\((?:dim=)?(\d+)\)$")
_STORED = {  # dtypes of safetensors by torch's; others are refused by name
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The whole state: rank 0's, with every tensor of which the ranks kept parts put together.

    Raises OSError, or ValueError (DamagedError) with the name of what is damaged.
    """
    manifest = read_manifest(folder)
    shards = open_shards(folder, manifest)
    if "dcp" in shards[0].meta:
        return _saved_by_dcp(folder)
    if manifest["replicated_layout"]:
        del shards[1:]
    states = [shard.root() for shard in shards]
    return dict(_joined(states[0], states, ""))


def _saved_by_dcp(folder: Path) -> dict[str, Any]:
    """What everstep.dcp saved, nested as it was given to dcp.save."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from everstep.dcp import StorageReader

    state: dict[str, Any] = {}
    _load_state_dict(state, StorageReader(folder, memory=False), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return state


def _joined(value: Any, ranks: list[Any], path: str) -> Any:
    if isinstance(value, ShardedLeaf):
        return _whole(path, ranks)
    if isinstance(value, dict):
        return type(value)((key, _joined(item, [r[key] for r in ranks], f"{path}.{key}" if path else str(key)))
                           for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(_joined(item, [r[i] for r in ranks], f"{path}.{i}") for i, item in enumerate(value))
    return value


def _whole(path: str, parts: list[ShardedLeaf]) -> torch.Tensor:
    shape, placements = parts[0].shape, parts[0].placements
    if placements == SHARE:
        return _of_shares(path, parts)
    dims = [(i, int(match[1])) for i, p in enumerate(placements) if (match := _SHARD.match(p))]
    if not dims:
        return parts[0].local
    if len(dims) > 1 or len(placements) > 1:
        raise SystemExit(f"error: {path}: placed as {placements}; this export puts tensors together that are sharded "
                         "over one mesh dimension; load it with a Checkpointer in a job of the same shape")
    dim = dims[0][1]
    local = [p.local for p in parts if p.local.shape[dim] > 0]
    whole = torch.cat(local, dim=dim) if local else parts[0].local
    if list(whole.shape) != list(shape):
        raise SystemExit(f"error: {path}: the ranks' parts give {tuple(whole.shape)}, the tensor is {tuple(shape)}")
    return whole


def _of_shares(path: str, parts: list[ShardedLeaf]) -> torch.Tensor:
    whole = torch.empty(parts[0].shape, dtype=parts[0].local.dtype)
    flat, at = whole.reshape(-1), 0  # a share is one run of it
    for begin, local in sorted(((sum(map(math.prod, zip(p.offsets or (), whole.stride()))), p.local) for p in parts
                                if p.local.numel()), key=lambda part: part[0]):
        if begin != at:
            break
        flat[begin:begin + local.numel()] = local.reshape(-1)
        at += local.numel()
    if at != flat.numel():
        raise SystemExit(f"error: {path}: of its {flat.numel()} elements no rank's share holds the one at {at}, or "
                         "two do")
    return whole


def _leaves(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}.{i}")


def _plain(value: Any, path: str) -> Any:
    """As JSON: a tensor is {"tensor": its name}, what JSON lacks is its repr under "repr"."""
    if isinstance(value, torch.Tensor):
        return {"tensor": path}
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{path}.{k}" if path else str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{path}.{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return {"repr": repr(value)}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One file, tensors contiguous; complex ones as pairs of reals in a last dimension."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data: list[torch.Tensor] = []
    at = 0
    for name, tensor in tensors.items():
        flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).contiguous()
        if flat.dtype not in _STORED:
            raise SystemExit(f"error: {name}: safetensors has no {flat.dtype}; export it with --format dcp")
        size = flat.numel() * flat.element_size()
        header[name] = {"dtype": _STORED[flat.dtype], "shape": list(flat.shape), "data_offsets": [at, at + size]}
        data.append(flat)
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for flat in data:
            if flat.numel():
                size = flat.numel() * flat.element_size()
                file.write(memoryview((ctypes.c_ubyte * size).from_address(flat.data_ptr())).cast("B"))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def export_safetensors(state: dict[str, Any], out: Path) -> None:
    """OUT/NAME.safetensors for each name of the state, and OUT/state.json."""
    for name, value in state.items():
        tensors = dict(_leaves(value, ""))
        if tensors:
            write_safetensors(out / f"{name}.safetensors", {key or name: t for key, t in tensors.items()})
    (out / "state.json").write_text(json.dumps({k: _plain(v, "") for k, v in state.items()}, indent=1) + "\n")


def export_dcp(state: dict[str, Any], out: Path) -> None:
    """A folder for torch.distributed.checkpoint.load; values other than tensors are kept as DCP keeps them."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(state, checkpoint_id=str(out), no_dist=True)


def main(arguments: list[str] | None = None) -> int:
    """The command; exits with a sentence on what it cannot do."""
    parser = argparse.ArgumentParser(prog="python -m everstep.export", description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path, help="folder of one checkpoint, step-N.gen-G")
    parser.add_argument("out", type=Path, help="folder to make; must not be there or be empty")
    parser.add_argument("--format", choices=("safetensors", "dcp"), default="safetensors")
    given = parser.parse_args(arguments)
    try:
        if given.out.exists() and any(given.out.iterdir()):
            raise SystemExit(f"error: {given.out} is not empty; name a new folder")
        given.out.mkdir(parents=True, exist_ok=True)
        state = read_checkpoint(given.checkpoint)
        (export_dcp if given.format == "dcp" else export_safetensors)(state, given.out)
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f"error: exporting {given.checkpoint}: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
