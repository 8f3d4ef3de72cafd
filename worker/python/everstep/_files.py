"""The fallback without an agent: one file per rank and step in a directory.

File: a header of 128 bytes, the payload (tensors, then the table), as in an arena's slot. Written beside,
fsynced, renamed; its CRC-32 is checked before anything of it is used. The two newest steps are kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import secrets
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from everstep._table import ALIGNMENT, Flattened

_MAGIC = b"EVSTFILE"
_HEADER = struct.Struct("<8sIIqiiQQQII")  # magic, version, header bytes, step, rank, world, payload, table
_HEADER_BYTES = 128
_VERSION = 1
_NAME = re.compile(r"step-(\d{12})\.rank-(\d{5})-of-(\d{5})\.everstep$")
_KEEP = 2


class LoadedFile:
    """A checked file: its payload in memory and where its table lies."""

    def __init__(self, step: int, rank: int, payload: memoryview, table: bytes) -> None:
        self.step = step
        self.rank = rank
        self.payload = payload
        self.table = table


class FileTier:
    """This rank's files in one directory. Raises OSError with the path when the disk refuses."""

    def __init__(self, directory: str | os.PathLike[str], rank: int, world_size: int) -> None:
        self.directory = Path(directory)
        self.rank = rank
        self.world_size = world_size
        self.directory.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Flattened) -> Path:
        """Writes one step; when it returns, the step is on the disk."""
        name = f"step-{step:012d}.rank-{self.rank:05d}-of-{self.world_size:05d}.everstep"
        final, part = self.directory / name, self.directory / f".{name}.{secrets.token_hex(4)}.part"
        try:
            with part.open("wb", buffering=1 << 20) as file:
                file.write(bytes(_HEADER_BYTES))
                crc = at = 0
                for (address, size), offset in zip(state.pieces, state.offsets):
                    view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
                    for piece in (memoryview(bytes(offset - at)), view):
                        file.write(piece)
                        crc = zlib.crc32(piece, crc)
                    at = offset + size
                padding = bytes(-(-at // ALIGNMENT) * ALIGNMENT - at)
                for tail in (padding, state.table):
                    file.write(tail)
                    crc = zlib.crc32(tail, crc)
                table_offset = at + len(padding)
                header = _HEADER.pack(_MAGIC, _VERSION, _HEADER_BYTES, step, self.rank, self.world_size,
                                      table_offset + len(state.table), table_offset, len(state.table), crc, 0)
                header += struct.pack("<I", zlib.crc32(header))
                file.seek(0)
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
            part.replace(final)
            self._sync_directory()
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        self._prune(step)
        return final

    def shards(self, after: int) -> list[LoadedFile] | None:
        """By rank, the newest step that another number of ranks than this world's left whole; None: none after
        `after`."""
        found: dict[tuple[int, int], dict[int, Path]] = {}
        for step, rank, world, path in self._named():
            if world != self.world_size and step > after:
                found.setdefault((step, world), {})[rank] = path
        for (_, world), files in sorted(found.items(), reverse=True):
            loaded = [self._read(files[rank]) for rank in range(world)] if len(files) == world else []
            whole = [file for file in loaded if file is not None]
            if whole and len(whole) == world:
                return whole
        return None

    def load(self, replicated: bool) -> LoadedFile | None:
        """The newest step of which every rank's file is there and this rank's is whole, or, of a replicated
        state, any rank's. None: nothing to start from. Damaged files are passed over."""
        found = self.steps()
        for step in sorted(found, reverse=True):
            files = found[step]
            if len(files) == self.world_size:
                loaded = self._read(files[self.rank])
                if loaded is not None:
                    return loaded
        if not replicated:
            return None
        for _, path in sorted(((step, path) for step, _, _, path in self._named()), reverse=True):
            loaded = self._read(path)
            if loaded is not None:
                return loaded
        return None

    def steps(self) -> dict[int, dict[int, Path]]:
        """Step -> rank -> file, of this number of ranks, whole or not."""
        found: dict[int, dict[int, Path]] = {}
        for step, rank, world, path in self._named():
            if world == self.world_size:
                found.setdefault(step, {})[rank] = path
        return found

    def _named(self) -> Iterator[tuple[int, int, int, Path]]:
        """Step, rank and number of ranks of each file, by its name; whole or not."""
        for path in self.directory.iterdir():
            if match := _NAME.match(path.name):
                yield int(match[1]), int(match[2]), int(match[3]), path

    def read(self, step: int) -> LoadedFile | None:
        """This rank's file of a step. None: it is not there, or damaged."""
        path = self.steps().get(step, {}).get(self.rank)
        return None if path is None else self._read(path)

    def _read(self, path: Path) -> LoadedFile | None:
        try:
            with path.open("rb") as file:
                head = file.read(_HEADER_BYTES)
                fields = _HEADER.unpack_from(head)
                magic, version, header_bytes, step, rank, _, payload, table_at, table_size, crc, _ = fields
                (header_crc,) = struct.unpack_from("<I", head, _HEADER.size)
                if magic != _MAGIC or version != _VERSION or header_crc != zlib.crc32(head[:_HEADER.size]):
                    return None
                size = os.fstat(file.fileno()).st_size
                if size != header_bytes + payload or table_at + table_size != payload:
                    return None
                mapped = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY))[header_bytes:]
        except (OSError, struct.error):
            return None
        if zlib.crc32(mapped) != crc:
            return None
        return LoadedFile(step, rank, mapped, bytes(mapped[table_at:]))

    def _prune(self, newest: int) -> None:
        mine = [(step, path) for step, rank, _, path in self._named() if rank == self.rank and step <= newest]
        for _, path in sorted(mine, reverse=True)[_KEEP:]:
            with contextlib.suppress(OSError):
                path.unlink()

    def _sync_directory(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
