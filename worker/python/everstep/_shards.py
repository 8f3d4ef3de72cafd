"""A rank's file of the file tier, and the manifest that makes a folder of them a checkpoint.

The formats of docs/internals/checkpoint-files.md, which checkpoint/files (C++) writes and reads: what is
written here is listed, verified and exported by `everstep ckpt`, and what agents wrote is read here. Files are
written beside, synced and renamed, the manifest last. A file's tensors are read in place and each is checked
against its CRC32C when it is first asked for, so that a reader pays for what it takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
import os
import re
import secrets
import struct
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from everstep import __version__
from everstep._library import REPLICATED_LAYOUT, checksum
from everstep._table import _DTYPES, ALIGNMENT, Decoder, Flattened, ShardedLeaf

MANIFEST = "manifest.json"
DAMAGED = "damaged"
_CHUNK = 1 << 20
_FIELDS = struct.Struct("<QqiiIIQQQQII")  # SlotFields (arena.md)
_SEAL, _SEAL_END = ',\n "crc32c": "', '"}\n'
_LIMIT_HEADER = 100_000_000  # of safetensors
_CHECKPOINT = re.compile(r"step-(\d{1,18})\.gen-(\d{1,14})$")
_NUMBER = re.compile(r"(\d{1,18})$")
_STORED = {  # dtype of torch -> dtype of safetensors; complex ones are pairs in a last dimension
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}
_COMPLEX = {"complex32": "F16", "complex64": "F32", "complex128": "F64"}


class DamagedError(ValueError):
    """A file whose bytes are not what was written, or not a checkpoint's at all."""


@cache
def _crc() -> Any:
    return checksum()


def crc32c(data: bytes) -> int:
    """Of a few bytes; large ones are summed where they lie."""
    return int(_crc()(0, ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data)))


class Facts:
    """Who wrote which step."""

    def __init__(self, job: str, generation: int, step: int, rank: int, world_size: int, replicated: bool) -> None:
        self.job = job
        self.generation = generation
        self.step = step
        self.rank = rank
        self.world_size = world_size
        self.replicated = replicated


def number_of(name: str) -> tuple[int | None, int]:
    """Step and generation that a name tells: "step-000000000120.gen-3" both, "ckpt/step-120" the step."""
    match = _CHECKPOINT.search(name.rstrip("/"))
    if match:
        return int(match[1]), int(match[2])
    match = _NUMBER.search(name.rstrip("/"))
    return (int(match[1]) if match else None), 0


# --- writing ---


def write_shard(path: Path, state: Flattened, facts: Facts) -> dict[str, Any]:
    """Makes one rank's state durable at `path`; answers its entry for the manifest. Raises OSError."""
    crc = _crc()
    at = state.offsets[-1] + state.pieces[-1][1] if state.pieces else 0
    table_offset = -(-at // ALIGNMENT) * ALIGNMENT
    payload_bytes = table_offset + len(state.table)
    chunks = struct.pack(f"<{-(-payload_bytes // _CHUNK)}I", *_chunk_crcs(state, table_offset))
    captured = time.time_ns()
    fields = _FIELDS.pack(facts.generation, facts.step, facts.rank, facts.world_size,
                          REPLICATED_LAYOUT if facts.replicated else 0, _CHUNK, payload_bytes, table_offset,
                          len(state.table), captured, crc32c(facts.job.encode()), 0)
    root = crc32c(fields + chunks)
    header, pieces, shared = _entries(state)
    header = {"__metadata__": {
        "everstep": json.dumps({"version": 1, "job": facts.job, "generation": facts.generation, "step": facts.step,
                                "rank": facts.rank, "world_size": facts.world_size,
                                "replicated_layout": facts.replicated, "payload_bytes": payload_bytes,
                                "table_offset": table_offset, "captured_ns": captured}, separators=(",", ":")),
        "everstep.chunks": "".join(f"{c:08x}" for c in struct.unpack(f"<{len(chunks) // 4}I", chunks)),
        "everstep.crc32c": "".join(f"{crc(0, address, size):08x}" for _, address, size in pieces),
        "everstep.fields": fields.hex(),
        "everstep.offsets": json.dumps([offset for offset, _, _ in pieces], separators=(",", ":")),
        "everstep.root": f"{root:08x}",
        "everstep.shared": json.dumps(shared, separators=(",", ":")),
        "everstep.table": state.table.decode(),
        "format": "pt"}, **header}
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > _LIMIT_HEADER:
        raise ValueError(f"{path}: a header of {len(text)} bytes; the format's limit is {_LIMIT_HEADER}: keep large "
                         "plain values as tensors")
    text += b" " * (-(len(text) + 8) % 64)
    head = struct.pack("<Q", len(text)) + text
    head_crc = total = crc32c(head)
    size = len(head)
    with _beside(path) as file:
        file.write(head)
        for _, address, length in pieces:
            if length:
                file.write(memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B"))
                total = crc(total, address, length)
                size += length
    return {"rank": facts.rank, "file": path.name, "bytes": size, "crc32c": f"{total:08x}", "head_bytes": len(head),
            "head_crc32c": f"{head_crc:08x}", "crc_root": f"{root:08x}", "payload_bytes": payload_bytes,
            "captured_ns": captured}


def _chunk_crcs(state: Flattened, table_offset: int) -> Iterator[int]:
    crc, zeros = _crc(), ctypes.create_string_buffer(2 * ALIGNMENT)
    table = ctypes.create_string_buffer(state.table, len(state.table))
    parts: list[tuple[int, int]] = []
    at = 0
    for (address, size), offset in zip(state.pieces, state.offsets):
        parts += [(ctypes.addressof(zeros), offset - at), (address, size)]
        at = offset + size
    parts += [(ctypes.addressof(zeros), table_offset - at), (ctypes.addressof(table), len(state.table))]
    value = filled = 0
    for address, size in parts:
        while size:
            length = min(size, _CHUNK - filled)
            value = crc(value, address, length)
            address, size, filled = address + length, size - length, filled + length
            if filled == _CHUNK:
                yield value
                value = filled = 0
    if filled:
        yield value


def _entries(state: Flattened) -> tuple[dict[str, Any], list[tuple[int, int, int]], dict[str, str]]:
    """The header's tensors in the order of their bytes, (offset, address, bytes) of each, and who shares whose."""
    at = dict(zip(state.offsets, state.pieces))
    header: dict[str, Any] = {}
    pieces: list[tuple[int, int, int]] = []
    shared: dict[str, str] = {}
    begin, last = 0, (-1, 0, "")
    leaves = sorted(_leaves(json.loads(state.table)["root"], ""), key=lambda leaf: leaf[3:])
    for name, dtype, shape, offset, size in leaves:
        unique, n = name or "state", 2
        while unique in header or unique in shared:
            unique, n = f"{name}#{n}", n + 1
        if size and last[:2] == (offset, size):
            shared[unique] = last[2]
            continue
        header[unique] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        pieces.append((offset, at[offset][0] if size else 0, size))
        begin += size
        if size:
            last = (offset, size, unique)
    return header, pieces, shared


def _leaves(node: Any, path: str) -> Iterator[tuple[str, str, list[int], int, int]]:
    """Name, safetensors' dtype and shape, offset and bytes of all that lies in the payload."""
    if not isinstance(node, dict):
        return
    (tag, body), = node.items()
    if tag in ("T", "N", "n"):
        shape = list(body[1])
        stored, parts, item = _stored(body[0]) if tag == "T" else _numpy(body[0])
        yield path, stored, shape + ([parts] if parts > 1 else []), body[2], math.prod(shape) * item
    elif tag in ("d", "o", "C"):
        for i, (key, value) in enumerate(body):
            name = key if isinstance(key, str) else str(key) if type(key) is int else f"key{i}"
            yield from _leaves(value, f"{path}.{name}" if path else name)
    elif tag in ("l", "t"):
        for i, value in enumerate(body):
            yield from _leaves(value, f"{path}.{i}" if path else str(i))


def _stored(name: str) -> tuple[str, int, int]:
    size = _DTYPES[name].itemsize
    if name in _COMPLEX:
        return _COMPLEX[name], 2, size
    return (_STORED[name], 1, size) if name in _STORED else ("U8", size, size)


def _numpy(name: str) -> tuple[str, int, int]:
    import numpy as np

    dtype = np.dtype(name)
    plain = {"f": "F", "i": "I", "u": "U", "b": "BOOL"}.get(dtype.kind)
    stored = plain if plain == "BOOL" else f"{plain}{8 * dtype.itemsize}" if plain else ""
    if stored in _STORED.values() and not name.startswith(">"):
        return stored, 1, dtype.itemsize
    return "U8", dtype.itemsize, dtype.itemsize


def write_manifest(folder: Path, facts: Facts, ranks: list[dict[str, Any]]) -> None:
    """Makes `folder` a checkpoint of the files that `ranks` (write_shard) tells of. Raises OSError."""
    captured = min((entry["captured_ns"] for entry in ranks), default=0)
    lines = ",".join("\n  " + json.dumps({k: v for k, v in entry.items() if k != "captured_ns"})
                     for entry in sorted(ranks, key=lambda e: int(e["rank"])))
    text = (f'{{"format": "everstep-checkpoint", "version": 1,\n "job": {json.dumps(facts.job)}, '
            f'"generation": {facts.generation}, "step": {facts.step},\n "world_size": {facts.world_size}, '
            f'"replicated_layout": {json.dumps(facts.replicated)},\n "captured_ns": {captured}, '
            f'"sealed_ns": {time.time_ns()}, "writer": {json.dumps(f"everstep {__version__}")},\n "ranks": [{lines}]')
    with _beside(folder / MANIFEST) as file:
        file.write(f"{text}{_SEAL}{crc32c(text.encode()):08x}{_SEAL_END}".encode())


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Any]:
    """A file to write that takes `path`'s place once all of it is on the disk."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb", buffering=1 << 20) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


# --- reading ---


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises OSError, or DamagedError when it is not what was written."""
    path = folder / MANIFEST
    text = path.read_text()
    end = text.rfind(_SEAL)
    if end < 0 or text[end + len(_SEAL):] != f"{crc32c(text[:end].encode()):08x}{_SEAL_END}":
        raise DamagedError(f"{path}: its checksum is wrong or missing: truncated or changed since")
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or manifest.get("format") != "everstep-checkpoint" \
            or manifest.get("version") != 1:
        raise DamagedError(f"{path}: not a manifest of a version that this package reads (1)")
    if (folder / DAMAGED).exists():
        raise DamagedError(f"{folder}: marked as damaged: {(folder / DAMAGED).read_text().strip()[:200]}")
    return manifest


def checkpoints(folder: Path) -> list[Path]:
    """Folders with a manifest: `folder` itself, or those in it."""
    if (folder / MANIFEST).is_file():
        return [folder]
    return [inner.parent for inner in sorted(folder.glob(f"*/{MANIFEST}"))] if folder.is_dir() else []


class ShardFile(Decoder):
    """One rank's file, read in place. Tensors are views of the mapped file, each checked at its first use.

    Raises OSError, or DamagedError with the file's and the tensor's name.
    """

    def __init__(self, path: Path, entry: dict[str, Any] | None = None) -> None:
        """`entry`: the manifest's, whose size and checksum of the head are then compared."""
        self.path = path
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))[0]
            if length > min(_LIMIT_HEADER, size - 8) or (entry is not None and size != entry["bytes"]):
                raise DamagedError(f"{path}: {size} bytes" + (f", written were {entry['bytes']}" if entry else "")
                                   + f" and a header of {length}: truncated or changed since")
            file.seek(0)
            head = file.read(8 + length)
            self._map = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))[8 + length:]
        if entry is not None and f"{crc32c(head):08x}" != entry["head_crc32c"]:
            raise DamagedError(f"{path}: its header fails its checksum")
        header = json.loads(head[8:])
        metadata = header.pop("__metadata__", {})
        if "everstep.table" not in metadata:
            raise DamagedError(f"{path}: not written by Everstep: no table in its metadata")
        self.facts: dict[str, Any] = json.loads(metadata["everstep"])
        document = json.loads(metadata["everstep.table"])
        self.meta: dict[str, Any] = document["meta"]
        self._root = document["root"]
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._map)) if len(self._map) else 0
        sums = metadata["everstep.crc32c"]
        listed = sorted(header.items(), key=lambda item: (item[1]["data_offsets"], item[0]))
        offsets = json.loads(metadata["everstep.offsets"])
        if len(offsets) != len(listed) or len(sums) != 8 * len(listed):
            raise DamagedError(f"{path}: {len(listed)} tensors, {len(offsets)} offsets, {len(sums) // 8} checksums")
        self._at: dict[int, tuple[str, int, int, str]] = {}  # offset in the payload -> name, begin, bytes, CRC
        for i, ((name, told), offset) in enumerate(zip(listed, offsets)):
            begin, end = told["data_offsets"]
            if not 0 <= begin <= end <= len(self._map):
                raise DamagedError(f"{path}: tensor {name} at {begin} to {end} of {len(self._map)}")
            if end > begin:
                self._at[offset] = (name, begin, end - begin, sums[8 * i:8 * i + 8])
        self._checked: set[int] = set()

    def _bytes_at(self, offset: int, size: int) -> memoryview:
        name, begin, length, told = self._at.get(offset, ("", 0, -1, ""))
        if length != size:
            raise DamagedError(f"{self.path}: its table wants {size} bytes at {offset}, the file has {length}")
        if offset not in self._checked:
            found = f"{_crc()(0, self._address + begin, size):08x}"
            if found != told:
                raise DamagedError(f"{self.path}: tensor {name} has CRC {found}, not {told}: damaged on the disk")
            self._checked.add(offset)
        return self._map[begin:begin + size]

    def _tensor(self, body: list[Any]) -> torch.Tensor | ShardedLeaf:
        dtype, shape = _DTYPES[body[0]], body[1]
        size = math.prod(shape) * dtype.itemsize
        local = torch.frombuffer(self._bytes_at(body[2], size), dtype=torch.uint8).view(dtype).reshape(shape) \
            if size else torch.empty(shape, dtype=dtype)
        return ShardedLeaf(local, body[3]) if len(body) > 3 else local

    def _array(self, body: list[Any]) -> Any:
        import numpy as np

        dtype = np.dtype(body[0])
        if dtype.hasobject:
            raise DamagedError(f"{self.path}: a numpy array of dtype {body[0]}")
        size = math.prod(body[1]) * dtype.itemsize
        data = self._bytes_at(body[2], size) if size else b""
        return np.frombuffer(data, dtype=dtype).reshape(body[1]).copy()


def open_shards(folder: Path, manifest: dict[str, Any]) -> list[ShardFile]:
    """Every rank's file of one checkpoint, by rank."""
    return [ShardFile(folder / entry["file"], entry) for entry in manifest["ranks"]]
