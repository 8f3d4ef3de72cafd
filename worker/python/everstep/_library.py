"""libeverstep.so through ctypes: the C ABI of worker/client/everstep.h, and nothing more."""

from __future__ import annotations

import ctypes as c
import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

ABI_VERSION = 1
OK, SKIPPED, NONE = 0, 1, 2
EINVAL, ENOMEM, ECORRUPT, ESTALE, EUNAVAILABLE, ETIMEDOUT, EREFUSED, EINTERNAL = range(-1, -9, -1)
REPLICATED_LAYOUT = 1
SHARE = 8
ASSEMBLED = 16


class EverstepError(RuntimeError):
    """What the library or the agent answered. `code` is one of EVERSTEP_E... (everstep.h)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class StaleGenerationError(EverstepError):
    """This process belongs to a generation of the job that is over; it must end."""


class _Options(c.Structure):
    _fields_ = [
        ("size", c.c_uint32),
        ("rank", c.c_int32),
        ("world_size", c.c_int32),
        ("connect_timeout_ms", c.c_uint32),
        ("commit_wait_ms", c.c_uint32),
        ("reserved", c.c_uint32),
        ("generation", c.c_uint64),
        ("job", c.c_char_p),
        ("keeper", c.c_char_p),
    ]


class Slot(c.Structure):
    """everstep_slot: one whole, checked content of the arena."""

    _fields_ = [
        ("size", c.c_uint32),
        ("slot", c.c_uint32),
        ("sequence", c.c_uint64),
        ("step", c.c_int64),
        ("generation", c.c_uint64),
        ("rank", c.c_int32),
        ("world_size", c.c_int32),
        ("flags", c.c_uint32),
        ("crc_root", c.c_uint32),
        ("payload_bytes", c.c_uint64),
        ("table_offset", c.c_uint64),
        ("table_bytes", c.c_uint64),
    ]


class _Piece(c.Structure):
    _fields_ = [("data", c.c_void_p), ("bytes", c.c_uint64)]


class _Target(c.Structure):
    _fields_ = [("offset", c.c_uint64), ("bytes", c.c_uint64), ("to", c.c_void_p)]


class Range(c.Structure):
    """everstep_range."""

    _fields_ = [
        ("rank", c.c_int32),
        ("count", c.c_uint32),
        ("source", c.c_uint64),
        ("source_stride", c.c_uint64),
        ("dest", c.c_uint64),
        ("dest_stride", c.c_uint64),
        ("bytes", c.c_uint64),
    ]


PieceArray = c.Array  # of _Piece


def pieces(listed: list[tuple[int, int]], after: PieceArray[_Piece] | None = None) -> PieceArray[_Piece]:
    """(address, bytes) pairs as the library takes them, behind those of `after`. Address 0: Client.place()."""
    ahead = 0 if after is None else len(after)
    array = (_Piece * (ahead + len(listed)))()
    if after is not None:
        c.memmove(array, after, c.sizeof(after))
    for i, (address, size) in enumerate(listed, ahead):
        array[i] = _Piece(address, size)
    return array


class RawStats(c.Structure):
    """everstep_stats."""

    _fields_ = [
        ("size", c.c_uint32),
        ("agent_alive", c.c_uint32),
        ("captured", c.c_uint64),
        ("skipped", c.c_uint64),
        ("replaced", c.c_uint64),
        ("waited_ns", c.c_uint64),
        ("copy_ns", c.c_uint64),
        ("newest_step", c.c_int64),
        ("committed_step", c.c_int64),
        ("last_skip", c.c_char * 32),
    ]


def address_of(view: memoryview) -> int:
    """Where the bytes of a writable view lie."""
    return c.addressof(c.c_ubyte.from_buffer(view))


def library_paths() -> list[Path]:
    """Where libeverstep.so is looked for, in order."""
    given = os.environ.get("EVERSTEP_LIBRARY")
    if given:
        return [Path(given)]
    here = Path(__file__).resolve().parent
    paths = [here / "libeverstep.so"]  # a wheel
    if len(here.parents) >= 3:  # a checkout: worker/python/everstep
        root = here.parents[2]
        paths += [root / "build" / preset / "lib" / "libeverstep.so" for preset in ("release", "debug")]
    return paths


def _declare(lib: c.CDLL) -> None:
    handle = c.c_void_p
    signatures = {
        "everstep_open": [c.POINTER(_Options), c.POINTER(handle)],
        "everstep_reserve": [handle, c.c_uint64],
        "everstep_restore": [handle, c.c_uint32, c.POINTER(Slot)],
        "everstep_restore_table": [handle, c.c_uint32, c.POINTER(Slot)],
        "everstep_load": [handle, c.POINTER(Slot), c.POINTER(_Target), c.c_uint32],
        "everstep_catalog": [handle, c.c_uint32, c.POINTER(Slot)],
        "everstep_request": [handle, c.POINTER(Slot), c.POINTER(Range), c.c_uint32, c.c_uint64, c.c_uint32,
                             c.c_char_p, c.c_uint64],
        "everstep_find": [handle, c.c_int64, c.POINTER(Slot)],
        "everstep_payload": [handle, c.POINTER(Slot), c.POINTER(c.c_void_p)],
        "everstep_capture_begin": [handle, c.c_int64, c.c_uint64, c.c_uint32],
        "everstep_capture_write": [handle, c.POINTER(_Piece), c.c_uint32, c.POINTER(c.c_uint64)],
        "everstep_capture_place": [handle, c.POINTER(_Piece), c.c_uint32, c.c_void_p, c.POINTER(c.c_uint64),
                                   c.POINTER(c.c_void_p)],
        "everstep_capture_mapped": [handle, c.c_uint32, c.c_uint64, c.c_uint32, c.POINTER(c.c_void_p),
                                    c.POINTER(c.c_uint64)],
        "everstep_capture_commit": [handle, c.c_char_p, c.c_uint64],
        "everstep_capture_start": [handle, c.POINTER(_Piece), c.c_uint32, c.POINTER(_Piece), c.c_uint32, c.c_char_p,
                                   c.c_uint64, c.POINTER(c.c_uint64)],
        "everstep_capture_wait": [handle, c.c_uint32],
        "everstep_capture_watch": [handle, c.POINTER(c.c_uint64), c.c_uint32],
        "everstep_capture_publish": [handle],
        "everstep_report_step": [handle, c.c_int64],
        "everstep_get_stats": [handle, c.POINTER(RawStats)],
    }
    for name, arguments in signatures.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, c.c_int
    for name in ("everstep_close", "everstep_capture_abort"):
        function = getattr(lib, name)
        function.argtypes, function.restype = [handle], None
    lib.everstep_copy.argtypes, lib.everstep_copy.restype = [c.c_void_p, c.c_void_p, c.c_uint64], None
    lib.everstep_crc32c.argtypes, lib.everstep_crc32c.restype = [c.c_uint32, c.c_void_p, c.c_uint64], c.c_uint32
    lib.everstep_last_error.argtypes, lib.everstep_last_error.restype = [handle], c.c_char_p
    lib.everstep_version.restype = c.c_char_p


def load_library() -> c.CDLL:
    """Loads the library and checks its ABI. Raises OSError, with the places looked at."""
    tried = library_paths()
    for path in tried:
        if path.exists():
            lib = c.CDLL(str(path))
            lib.everstep_abi_version.restype = c.c_uint32
            found = lib.everstep_abi_version()
            if found != ABI_VERSION:
                raise OSError(f"{path} has ABI version {found}, this package needs {ABI_VERSION}; "
                              "build both from the same release")
            try:
                _declare(lib)
            except AttributeError as error:
                raise OSError(f"{path} is older than this package: {error}; build both from the same "
                              "release") from None
            return lib
    raise OSError("libeverstep.so is not there; looked at " + ", ".join(map(str, tried))
                  + "; run deploy/setup.sh, or set EVERSTEP_LIBRARY")


def copier() -> Callable[[int, int, int], object]:
    """memcpy(to, from, bytes) for what is loaded once: past the cache where the library is there."""
    try:
        return load_library().everstep_copy  # type: ignore[no-any-return]
    except OSError:
        return c.memmove


def checksum() -> Callable[[int, int, int], int]:
    """crc32c(crc, address, bytes), the checksum of every tier. Raises OSError without the library."""
    return load_library().everstep_crc32c  # type: ignore[no-any-return]


class Client:
    """One attached arena. wait(), watch(), publish(), abort() and stats() are thread-safe. Not for a forked child."""

    def __init__(self, keeper: str, job: str, rank: int, world_size: int, generation: int,
                 commit_wait: float = 2.0, connect_timeout: float = 5.0) -> None:
        """Attaches. Times in seconds. Raises OSError (no library) or EverstepError."""
        self._lib = load_library()
        self._lock = threading.Lock()  # a capture may be published by another thread than the trainer's
        self._handle = c.c_void_p()
        options = _Options(c.sizeof(_Options), rank, world_size, int(connect_timeout * 1000),
                           max(1, int(commit_wait * 1000)), 0, generation, job.encode(), keeper.encode())
        code = self._lib.everstep_open(c.byref(options), c.byref(self._handle))
        try:
            self._check(code)
        except EverstepError:
            self.close()
            raise

    def _check(self, code: int) -> int:
        if code >= 0:
            return code
        text = self._lib.everstep_last_error(self._handle).decode(errors="replace")
        raise (StaleGenerationError if code == ESTALE else EverstepError)(code, text)

    @property
    def attached(self) -> bool:
        """Not closed."""
        return bool(self._handle)

    def close(self) -> None:
        """Detaches; the arena and what is in it stay with the node. Idempotent."""
        if self._handle:
            self._lib.everstep_close(self._handle)
            self._handle = c.c_void_p()

    def reserve(self, payload_bytes: int) -> None:
        """Takes the memory of both slots now."""
        self._check(self._lib.everstep_reserve(self._handle, payload_bytes))

    def restore(self, timeout: float, table_only: bool = False) -> Slot | None:
        """Waits for what this generation starts from; None: nothing. `table_only`: load() checks the rest."""
        slot = Slot(size=c.sizeof(Slot))
        wait = self._lib.everstep_restore_table if table_only else self._lib.everstep_restore
        code = self._check(wait(self._handle, math.ceil(timeout * 1000), c.byref(slot)))
        return slot if code == OK else None

    def load(self, slot: Slot, targets: list[tuple[int, int, int]]) -> None:
        """Checks every byte of the slot and copies (offset, bytes, address to), ascending and apart, in one pass.
        When it raises, what the targets hold is undefined."""
        array = (_Target * len(targets))(*(_Target(*target) for target in targets))
        self._check(self._lib.everstep_load(self._handle, c.byref(slot), array, len(targets)))

    def catalog(self, timeout: float) -> Slot | None:
        """The shards of another world's step, when this generation starts from those; None: call restore()."""
        slot = Slot(size=c.sizeof(Slot))
        code = self._check(self._lib.everstep_catalog(self._handle, math.ceil(timeout * 1000), c.byref(slot)))
        return slot if code == OK else None

    def request(self, catalog: Slot, ranges: Sequence[tuple[int, int, int, int, int, int, int]], data_bytes: int,
                flags: int, table: bytes) -> None:
        """Answers catalog(): ranges as everstep_range has them."""
        array = (Range * len(ranges))(*(Range(*each) for each in ranges))
        self._check(self._lib.everstep_request(self._handle, c.byref(catalog), array, len(ranges), data_bytes, flags,
                                               table, len(table)))

    def find(self, max_step: int) -> Slot | None:
        """The newest whole and checked slot at or under max_step."""
        slot = Slot(size=c.sizeof(Slot))
        code = self._check(self._lib.everstep_find(self._handle, max_step, c.byref(slot)))
        return slot if code == OK else None

    def payload(self, slot: Slot) -> memoryview:
        """The slot's bytes in place; valid until the next capture or reserve."""
        data = c.c_void_p()
        self._check(self._lib.everstep_payload(self._handle, c.byref(slot), c.byref(data)))
        assert data.value is not None
        return memoryview((c.c_ubyte * slot.payload_bytes).from_address(data.value)).cast("B")

    def begin(self, step: int, payload_bytes: int, flags: int) -> bool:
        """Tears the slot to write; False: skipped."""
        code = self._lib.everstep_capture_begin(self._handle, step, payload_bytes, flags)
        return self._check(code) == OK

    def write(self, array: PieceArray[_Piece], expected: list[int] | None = None) -> None:
        """Appends pieces. `expected`: where each must come to lie, when that is to be checked."""
        offsets = None if expected is None else (c.c_uint64 * len(array))()
        self._check(self._lib.everstep_capture_write(self._handle, array, len(array), offsets))
        self._laid(offsets, expected)

    def place(self, array: PieceArray[_Piece], image: int | None = None, expected: list[int] | None = None) -> int:
        """Lays pieces out in the slot, or at the address `image`, and copies those with an address; the others are
        the caller's to fill. The address of the payload's beginning."""
        offsets = None if expected is None else (c.c_uint64 * len(array))()
        base = c.c_void_p()
        self._check(self._lib.everstep_capture_place(self._handle, array, len(array), image, offsets, c.byref(base)))
        self._laid(offsets, expected)
        assert base.value is not None
        return base.value

    def mapped(self, slot: int, payload_bytes: int, flags: int) -> tuple[int, int] | None:
        """Where a slot lies in this process, address and bytes, if begin() with these would leave it there."""
        data, size = c.c_void_p(), c.c_uint64()
        code = self._check(self._lib.everstep_capture_mapped(self._handle, slot, payload_bytes, flags, c.byref(data),
                                                             c.byref(size)))
        return (data.value, size.value) if code == OK and data.value is not None else None

    def _laid(self, offsets: c.Array[c.c_uint64] | None, expected: list[int] | None) -> None:
        if offsets is not None and list(offsets) != expected:
            raise EverstepError(EINTERNAL, "libeverstep.so laid the state out in another way than its table says; "
                                "build it and this package from the same release")

    def start(self, late: PieceArray[_Piece], early: PieceArray[_Piece], table: bytes,
              expected: list[int] | None = None) -> None:
        """Has the library's thread write everything; `late` must not change until wait() has said True."""
        offsets = None if expected is None else (c.c_uint64 * (len(late) + len(early)))()
        self._check(self._lib.everstep_capture_start(self._handle, late, len(late), early, len(early), table,
                                                     len(table), offsets))
        self._laid(offsets, expected)

    def wait(self, seconds: float) -> bool:
        """No bytes are being copied (any more). Any thread may ask."""
        return bool(self._lib.everstep_capture_wait(self._handle, int(seconds * 1000)) == OK)

    def watch(self, count: int, seconds: float) -> int:
        """Waits until the number of copies that have ended is not `count`; answers the number. Any thread may ask."""
        now = c.c_uint64(count)
        self._lib.everstep_capture_watch(self._handle, c.byref(now), int(seconds * 1000))
        return now.value

    def publish(self) -> None:
        """Publishes what start() began. REQUIRES: wait() has said True."""
        with self._lock:
            self._check(self._lib.everstep_capture_publish(self._handle))

    def commit(self, table: bytes) -> None:
        """Publishes the slot."""
        self._check(self._lib.everstep_capture_commit(self._handle, table, len(table)))

    def abort(self) -> None:
        """Gives the capture up."""
        with self._lock:
            self._lib.everstep_capture_abort(self._handle)

    def report_step(self, step: int) -> None:
        """Tells the agent about a step that was not captured."""
        self._check(self._lib.everstep_report_step(self._handle, step))

    def stats(self) -> RawStats:
        """Counts since the process attached."""
        stats = RawStats(size=c.sizeof(RawStats))
        with self._lock:
            self._check(self._lib.everstep_get_stats(self._handle, c.byref(stats)))
        return stats
