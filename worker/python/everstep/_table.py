"""A nested state as a list of raw byte ranges and a JSON table that says what they are. No pickle.

Leaves: tensors (any strided dtype, also DTensor's local part), numpy arrays and scalars, None, bool, int,
float, complex, str, bytes, torch.dtype, torch.device. Containers: dict, OrderedDict, defaultdict (comes
back as dict), Counter, list, tuple, torch.Size. Anything else raises TypeError with its path.

Table: {"format": 1, "root": NODE, "meta": {...}}. A NODE is a JSON scalar or an object of one key, the
kind: {"T": [dtype, shape, offset]} a tensor, {"d": [[key, node], ...]} a dict, and so on (_DECODERS).
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from everstep._division import Part

FORMAT = 1
ALIGNMENT = 64
SHARE = ["share"]  # "placements" of a part of a tensor that is the same on every rank (_division.py)
_DEEPEST = 100  # containers in containers; the reader of tables (checkpoint/files/json.h) has a limit, too
_LONGEST_INT = 14_000  # bits: Python itself reads no longer ones (sys.set_int_max_str_digits)

_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values() if isinstance(value, torch.dtype)
}


class Flattened:
    """One state, ready to be written: pieces in order of their offsets, and the table."""

    def __init__(self, pieces: list[tuple[int, int]], offsets: list[int], payload_bytes: int, table: bytes,
                 sharded: bool, keep: list[object]) -> None:
        self.pieces = pieces  # (address, bytes)
        self.offsets = offsets
        self.payload_bytes = payload_bytes  # with padding, without the table
        self.table = table
        self.sharded = sharded  # some tensor is this rank's part of a larger one
        self.keep = keep  # owns the memory of pieces


class Zone:
    """A run of pieces, each at the next multiple of ALIGNMENT."""

    def __init__(self) -> None:
        self.pieces: list[tuple[int, int]] = []
        self.offsets: list[int] = []
        self.end = 0
        self.keep: list[object] = []  # owns the memory of pieces
        self.tensors: list[tuple[str, torch.Tensor]] = []  # (path, the tensor itself)
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []  # (what a piece points at, made from)
        self.bodies: list[list[Any]] = []  # table entries whose [2] is an offset in this zone
        self._staged: list[tuple[int, torch.Tensor]] = []  # number of a piece without an address, what it is of

    def add(self, address: int, size: int) -> int:
        """The offset at which `size` bytes will lie."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        self.pieces.append((address, size))
        self.offsets.append(offset)
        self.end = offset + size
        return offset

    def stage(self, source: torch.Tensor) -> None:
        """The newest piece has no address: `source`, contiguous, is copied there by its device."""
        self._staged.append((len(self.offsets) - 1, source))

    @property
    def staged(self) -> list[tuple[int, torch.Tensor]]:
        """(offset, what a device copies there)."""
        return [(self.offsets[i], source) for i, source in self._staged]

    def move(self, base: int) -> None:
        """Puts the zone at `base`, a multiple of ALIGNMENT. Once."""
        self.offsets = [base + offset for offset in self.offsets]
        for body in self.bodies:
            body[2] += base
        self.end = base + self.end


class Encoder:
    """Flattens one state. The memory of its tensors must not change until the pieces are copied.

    Tensors whose memory begins at one of the addresses `late` come into a zone of their own. `known`: memory
    that already lies somewhere, by its key. `start`: where the other zone begins. `parts`: of the tensors at these
    paths only this part is kept. `owns`: tensors whose device copies them to the slot by itself: their pieces have no
    address.
    """

    def __init__(self, late: frozenset[int] = frozenset(), known: dict[tuple[Any, ...], int] | None = None,
                 start: int = 0, parts: Mapping[str, Part] | None = None,
                 owns: Callable[[torch.Tensor], bool] | None = None) -> None:
        self.late, self.rest = Zone(), Zone()
        self.rest.end = start
        self.tensors: list[torch.Tensor] = []  # all that were met, pieces of their own or not
        self.sharded = False
        self._late_addresses = late
        self._known = {} if known is None else known
        self._parts = {} if parts is None else parts
        self._owns = owns
        self._depth = 0
        self._seen: dict[tuple[Any, ...], tuple[Zone, int]] = {}

    def finish(self, root: object, meta: dict[str, object]) -> Flattened:
        """Encodes `root`; `meta` is plain JSON that travels with it."""
        node = self.node(root, "")
        table = json.dumps({"format": FORMAT, "meta": meta, "root": node}, separators=(",", ":"),
                           allow_nan=False).encode()
        return Flattened(self.rest.pieces, self.rest.offsets, self.rest.end, table, self.sharded, self.rest.keep)

    def placed(self) -> dict[tuple[Any, ...], int]:
        """Where each piece of memory lies, by its key, once the zones are moved to their places; for `known`."""
        bases = {id(zone): zone.offsets[0] if zone.offsets else 0 for zone in (self.late, self.rest)}
        return {key: bases[id(zone)] + offset for key, (zone, offset) in self._seen.items()}

    def _raw(self, body: list[Any], address: int, size: int, owner: object, late: bool,
             key: tuple[Any, ...] | None = None) -> Zone | None:
        """Sets body[2] to where `size` bytes will lie; the same memory again lies there once. None: nowhere new."""
        if size == 0:
            body[2] = 0
            return None
        if key is not None and key in self._known:
            body[2] = self._known[key]
            return None
        if key is not None and key in self._seen:
            zone, body[2] = self._seen[key]
            zone.bodies.append(body)
            return None
        zone = self.late if late else self.rest
        zone.keep.append(owner)  # also keeps a temporary's address from being used again
        zone.bodies.append(body)
        body[2] = zone.add(address, size)
        if key is not None:
            self._seen[key] = (zone, body[2])
        return zone

    def _tensor(self, value: torch.Tensor, path: str) -> object:
        local: Any = value
        placements = getattr(value, "placements", None)  # of a DTensor
        if placements is not None:
            local = local.to_local()
            self.sharded = True
        if type(local) not in (torch.Tensor, torch.nn.Parameter) or local.layout != torch.strided \
                or local.is_quantized or local.is_meta or local.is_nested:
            kind = "quantized " if local.is_quantized else "nested " if local.is_nested else ""
            raise TypeError(f"{path}: cannot checkpoint a {kind}{type(value).__name__} of layout {local.layout} on "
                            f"{local.device}; keep dense tensors with data in the state")
        self.tensors.append(local)
        address = local.data_ptr()
        part = self._parts.get(path)
        source = local.detach() if part is None else local.detach().narrow(*part)
        flat = source
        if flat.is_conj() or flat.is_neg():
            flat = flat.resolve_conj().resolve_neg()
        staged = self._owns is not None and self._owns(local)
        if flat.device.type != "cpu" and not staged:
            flat = flat.cpu()
        flat = flat.contiguous()
        dtype = str(flat.dtype).removeprefix("torch.")
        here = flat.data_ptr()
        key = (here, dtype, tuple(flat.shape))
        body: list[Any] = [dtype, list(flat.shape), 0]
        zone = self._raw(body, 0 if staged else here, flat.numel() * flat.element_size(), flat,
                         address in self._late_addresses, key)
        if zone is not None:
            if staged:
                zone.stage(flat)
            zone.tensors.append((path, local))
            if here != source.data_ptr():
                zone.copies.append((flat, source))
        if placements is not None:
            body.append(region(value))
        elif part is not None:
            body.append({"global": list(local.shape), "placements": SHARE, "offsets": part.offsets(local.dim())})
        return {"T": body}

    def _array(self, value: Any, path: str) -> object:
        import numpy as np

        if value.dtype.hasobject or value.dtype.kind == "V":
            raise TypeError(f"{path}: cannot checkpoint a numpy array of dtype {value.dtype}; numbers, bools "
                            "and fixed-size strings can be")
        flat = np.ascontiguousarray(value)
        body: list[Any] = [value.dtype.str, list(value.shape), 0]
        self._raw(body, flat.ctypes.data, flat.nbytes, flat, late=False)
        return {"N" if isinstance(value, np.ndarray) else "n": body}

    def _key(self, key: object, path: str) -> object:
        if key is None or type(key) in (bool, int, str):
            return key
        if type(key) in (float, tuple, bytes):
            return self.node(key, f"{path} (key)")
        raise TypeError(f"{path}: cannot checkpoint a dict with a key of type {_name(key)}: {key!r:.80}")

    def _items(self, value: Any, path: str) -> list[object]:
        self._enter(path)
        items: list[object] = [[self._key(k, path), self.node(v, f"{path}[{k!r}]" if path else str(k))]
                               for k, v in value.items()]
        self._depth -= 1
        return items

    def _enter(self, path: str) -> None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise TypeError(f"{path:.200}...: cannot checkpoint what is nested deeper than {_DEEPEST} containers, or "
                            "contains itself")

    def node(self, value: Any, path: str) -> Any:
        """The table's entry for `value`, which lies at `path` of the state."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            if value.bit_length() > _LONGEST_INT:
                raise TypeError(f"{path}: cannot checkpoint an int of {value.bit_length()} bits; the limit is "
                                f"{_LONGEST_INT}: keep it as bytes")
            return value
        if kind is float:
            return value if math.isfinite(value) else {"f": struct.pack("<d", value).hex()}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if kind in (dict, defaultdict):
            return {"d": self._items(value, path)}
        if kind is OrderedDict:
            return {"o": self._items(value, path)}
        if kind is Counter:
            return {"C": self._items(value, path)}
        if kind in (list, tuple, torch.Size):
            tag = "l" if kind is list else "t" if kind is tuple else "z"
            self._enter(path)
            items = [self.node(v, f"{path}[{i}]") for i, v in enumerate(value)]
            self._depth -= 1
            return {tag: items}
        if kind is bytes:
            return {"b": base64.b64encode(value).decode()}
        if kind is complex:
            return {"c": struct.pack("<dd", value.real, value.imag).hex()}
        if kind is torch.dtype:
            return {"y": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"v": str(value)}
        if kind.__module__ == "numpy" and hasattr(value, "dtype") and hasattr(value, "nbytes"):
            return self._array(value, path)
        raise TypeError(
            f"{path or 'state'}: cannot checkpoint an object of type {_name(value)}; keep tensors, numbers, "
            "strings, dicts, lists and tuples in the state, or give the object a state_dict() and a "
            "load_state_dict()")


def is_sharded(value: object) -> bool:
    """A DTensor: this rank's part of a larger tensor."""
    return hasattr(value, "to_local") and hasattr(value, "placements")


def region(value: Any) -> dict[str, Any]:
    """Which part of the whole a DTensor's local tensor is, as a table has it; no "offsets": that cannot be told.

    Sharded dimensions are divided as torch.chunk does: parts of ceil(n / ranks), the last ones shorter or empty. A
    strided placement (FSDP2 over tensor parallelism) divides what the plain ones have left.
    """
    described: dict[str, Any] = {"global": list(value.shape), "placements": [str(p) for p in value.placements]}
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:
        return described
    offsets, lengths = [0] * value.dim(), list(value.shape)
    dims = [(placement, i) for i, placement in enumerate(value.placements)]
    strided = [type(placement).__name__ == "_StridedShard" for placement, _ in dims]
    for (placement, i), _ in sorted(zip(dims, strided), key=lambda item: item[1]):
        if placement.is_replicate():
            continue
        if not hasattr(placement, "dim"):
            return described  # a partial sum
        dim = placement.dim % value.dim()
        part = -(-lengths[dim] // value.device_mesh.size(i))
        begin = min(part * coordinate[i], lengths[dim])
        offsets[dim] += begin
        lengths[dim] = min(part, lengths[dim] - begin)
    if tuple(lengths) == tuple(value.to_local().shape):
        described["offsets"] = offsets
    return described


def itemsize(kind: str, dtype: str) -> int:
    """Bytes of an element of a leaf: "T" a tensor's, "N" and "n" a numpy array's. Raises RuntimeError."""
    if kind == "T":
        found = _DTYPES.get(dtype)
        if found is None:
            raise RuntimeError(f"a tensor of dtype {dtype}, which this PyTorch ({torch.__version__}) does not have")
        return found.itemsize
    import numpy as np

    return int(np.dtype(dtype).itemsize)


def _name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class ShardedLeaf:
    """This rank's part of a larger tensor: a share, or of a DTensor, put back into the one of the new process."""

    def __init__(self, local: torch.Tensor, described: Mapping[str, Any]) -> None:
        self.local = local
        self.shape: list[int] = described["global"]
        self.placements: list[str] = described["placements"]
        self.offsets: list[int] | None = described.get("offsets")  # None: cannot be told


class Decoder:
    """Builds the state again. Tensors are views of `payload`: copy before the memory changes."""

    def __init__(self, payload: memoryview, table: bytes) -> None:
        self._payload = payload
        document = json.loads(table)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"a state table of format {document.get('format')!r}, this package knows {FORMAT}")
        self.meta: dict[str, Any] = document["meta"]
        self._root = document["root"]
        self._bytes = torch.frombuffer(payload, dtype=torch.uint8) if len(payload) else None

    def root(self) -> Any:
        """The state, containers anew, tensors in place."""
        return self._node(self._root)

    def _tensor(self, body: list[Any]) -> torch.Tensor | ShardedLeaf:
        name, shape, offset = body[:3]
        dtype = _DTYPES[name]
        size = math.prod(shape) * dtype.itemsize
        if size == 0:
            local = torch.empty(shape, dtype=dtype)
        else:
            self._in_bounds(offset, size)
            assert self._bytes is not None
            local = self._bytes[offset:offset + size].view(dtype).reshape(shape)
        if len(body) > 3:
            return ShardedLeaf(local, body[3])
        return local

    def _array(self, body: list[Any]) -> Any:
        import numpy as np

        name, shape, offset = body
        dtype = np.dtype(name)
        if dtype.hasobject:
            raise ValueError(f"a state table with a numpy array of dtype {name}")
        size = math.prod(shape) * dtype.itemsize
        self._in_bounds(offset, size)
        return np.frombuffer(self._payload[offset:offset + size], dtype=dtype).reshape(shape).copy()

    def _in_bounds(self, offset: int, size: int) -> None:
        if offset < 0 or offset + size > len(self._payload):
            raise ValueError(f"a state table points at {size} bytes at {offset} of {len(self._payload)}")

    def _items(self, body: list[Any]) -> list[tuple[Any, Any]]:
        return [(self._node(k), self._node(v)) for k, v in body]

    def _node(self, node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        (tag, body), = node.items()
        decode = _DECODERS.get(tag)
        if decode is None:
            raise ValueError(f"a state table with an unknown kind of node, {tag!r}")
        return decode(self, body)


_DECODERS: dict[str, Callable[[Decoder, Any], Any]] = {
    "T": lambda d, b: d._tensor(b),
    "N": lambda d, b: d._array(b),
    "n": lambda d, b: d._array(b)[()],
    "d": lambda d, b: dict(d._items(b)),
    "o": lambda d, b: OrderedDict(d._items(b)),
    "C": lambda d, b: Counter(dict(d._items(b))),
    "l": lambda d, b: [d._node(x) for x in b],
    "t": lambda d, b: tuple(d._node(x) for x in b),
    "z": lambda d, b: torch.Size(b),
    "f": lambda d, b: struct.unpack("<d", bytes.fromhex(b))[0],
    "c": lambda d, b: complex(*struct.unpack("<dd", bytes.fromhex(b))),
    "b": lambda d, b: base64.b64decode(b),
    "y": lambda d, b: _DTYPES[b],
    "v": lambda d, b: torch.device(b),
}
