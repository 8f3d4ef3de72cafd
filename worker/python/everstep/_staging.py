"""Between a device's memory and the slots of the arena: which tensors go this way, and what is under way.

A device copies by itself, on a stream of its own beside the trainer's, straight into the slot; checksums are taken of
what has landed. From Client.begin() to the publication the slot is torn, so nobody takes half of it for a capture,
whatever becomes of the copies or of the process.

    step()          side stream waits for what the trainer has issued; copies are issued
    forward         trainer's stream waits for the buffers' copies alone
    optimizer.step  trainer's stream waits for the rest; the host waits for nothing
    meanwhile       a thread waits for the copies, has the library take the checksums, publishes

The slots' memory is registered with the device, once. Where it cannot be, copies go into an image of the payload in
pinned memory, and from there as any tensor of the host's goes: one more copy, and one more payload of memory.

`Device` is the seam: `Cuda` here, a stand-in in the tests that copies as late as the order of the streams allows.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from everstep._attach import warn
from everstep._library import Client, pieces

if TYPE_CHECKING:
    from everstep._plan import Plan, Step

VARIABLE = "EVERSTEP_STAGING"
PATIENCE = 60.0  # seconds for the copies of one capture; a slot of 100 GiB takes ten on a slow link
_MARK_BYTES = 64 << 20  # of a blocking capture, between two marks: checksums are taken while the next bytes come
_SLOTS = 2

Pair = tuple[torch.Tensor, torch.Tensor]  # (to, from): same dtype and shape, each contiguous


class StagingError(RuntimeError):
    """The device did not copy, or not in time: the capture is given up, the one before stays."""


class Mark(Protocol):
    """A point among the copies that were issued. Any thread may ask."""

    def done(self) -> bool:
        """All copies before it have landed. Raises RuntimeError with the device's own words when one failed."""

    def gate(self) -> None:
        """What the trainer issues from now on runs after those copies. Waits for nothing itself where the device
        can do that."""


class Device(Protocol):
    """A kind of devices whose tensors do not lie in the host's memory. Used by one thread at a time."""

    name: str

    def owns(self, tensor: torch.Tensor) -> bool:
        """Its copies go this way."""

    def register(self, address: int, size: int) -> str:
        """Has the device reach this host memory by itself. Answers "", or why it cannot be."""

    def unregister(self, address: int) -> None:
        """Ends register(). REQUIRES: no copy is under way."""

    def pinned(self, size: int) -> torch.Tensor:
        """Host memory of its own that it reaches: uint8. Raises RuntimeError."""

    def begin(self) -> None:
        """Copies issued from now on see what the trainer has issued so far."""

    def copy(self, pairs: Sequence[Pair]) -> None:
        """Issues copies, in order, either way between host and device. Raises RuntimeError."""

    def mark(self, used: Mark | None) -> Mark:
        """Behind all copies that were issued; `used`: one that is not needed any more."""


class _CudaMark:
    def __init__(self) -> None:
        self.events: dict[torch.device, torch.cuda.Event] = {}
        self.waits: list[torch.device] = []

    def done(self) -> bool:
        return all(self.events[device].query() for device in self.waits)

    def gate(self) -> None:
        for device in self.waits:
            torch.cuda.current_stream(device).wait_event(self.events[device])


class Cuda:
    """Every CUDA (or ROCm) device of the process, a side stream each."""

    name = "cuda"
    _PORTABLE = 1  # cudaHostRegisterPortable: for every context of the process

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._waited: set[torch.device] = set()  # their streams did, for the trainer's, since begin()

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def register(self, address: int, size: int) -> str:
        result = torch.cuda.cudart().cudaHostRegister(address, size, self._PORTABLE)
        if int(result) == 0:
            return ""
        # The refusal stays behind as the thread's last error, and the next kernel would be blamed for it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")
        return f"cudaHostRegister of {size} bytes answered {int(result)} ({result})"

    def unregister(self, address: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        self._waited.clear()

    def copy(self, pairs: Sequence[Pair]) -> None:
        for to, source in pairs:
            device = source.device if source.is_cuda else to.device
            with torch.cuda.stream(self._stream(device)):
                to.copy_(source, non_blocking=True)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        if device not in self._waited:
            self._waited.add(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def mark(self, used: Mark | None) -> Mark:
        mark = used if isinstance(used, _CudaMark) else _CudaMark()
        mark.waits = list(self._waited)
        for device in mark.waits:
            mark.events.setdefault(device, torch.cuda.Event()).record(self._streams[device])
        return mark


def choose() -> tuple[Device | None, bool]:
    """What EVERSTEP_STAGING says: the devices, and whether the slots may be registered. Raises RuntimeError."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "registered", "pinned", "off"):
        raise RuntimeError(f"{VARIABLE}={wanted}: it is auto, registered, pinned or off")
    if wanted == "off":
        return None, False
    if wanted != "auto" and not torch.cuda.is_available():
        raise RuntimeError(f"{VARIABLE}={wanted}: this PyTorch ({torch.__version__}) finds no CUDA device; leave the "
                           "variable out: tensors of the host need no staging")
    return Cuda(), wanted != "pinned"


class Transfer:
    """The copies of one capture, issued. They land at `base` + their offset in the payload."""

    def __init__(self, staging: Staging, client: Client, base: int, in_slot: bool, ends: list[int],
                 marks: list[Mark]) -> None:
        self._staging, self._client = staging, client
        self._base, self._in_slot = base, in_slot
        self._ends, self._marks = ends, marks  # up to where all has landed, by mark

    def gate(self) -> None:
        """What the trainer issues from now on, on the stream it is at, runs after all copies."""
        with _named("making the trainer's stream wait for the copies"):
            self._marks[-1].gate()

    def sync(self, i: int = -1) -> None:
        """Waits until mark `i` is passed. Raises StagingError."""
        self._staging.await_mark(self._marks[i])

    def write(self) -> None:
        """Has the library take what lands, as it lands. Raises StagingError or EverstepError."""
        at = 0
        for i, end in enumerate(self._ends):
            self.sync(i)
            self._client.write(self.piece(at, end))
            at = end
        self.finished()

    def finished(self) -> None:
        """sync() has returned for the last mark."""
        self._staging.landed()

    def piece(self, begin: int, end: int) -> Any:
        """These bytes of the payload as Client.write() and start() take them."""
        return pieces([(0 if self._in_slot else self._base + begin, end - begin)])


class Staging:
    """The way of one Checkpointer's device tensors. Not thread-safe, but for Transfer.sync()."""

    def __init__(self, client: Client, device: Device, may_register: bool = True, patience: float = PATIENCE) -> None:
        self._client = client
        self.device = device
        self.why = "" if may_register else f"{VARIABLE}=pinned"  # the slots are not registered
        self._patience = patience
        self._registered: dict[int, int] = {}  # address -> bytes
        self._image: torch.Tensor | None = None
        self._marks: list[Mark] = []  # used again by each capture
        self._under_way: list[Mark] = []  # of copies that are not known to have landed
        self._views: dict[int, tuple[Plan, list[Pair], list[Pair]]] = {}  # by base: late and fixed pairs

    @property
    def kind(self) -> str:
        """How device tensors travel: "registered" or "pinned"."""
        return "pinned" if self.why else "registered"

    def prepare(self, payload_bytes: int, flags: int, reserve: bool) -> None:
        """Before Client.begin(): lets go of memory that it may move. Raises StagingError while copies of a capture
        that was given up may still land: in memory that the next one would use."""
        self._drained()
        stays = [self._client.mapped(slot, payload_bytes, flags) for slot in range(_SLOTS)]
        for address in [a for a, size in self._registered.items() if (a, size) not in stays]:
            self._unregister(address)
        if self.why:
            return
        if reserve:
            self._client.reserve(payload_bytes)  # both slots now, so that the second capture need not
            stays = [self._client.mapped(slot, payload_bytes, flags) for slot in range(_SLOTS)]
        for room in stays:
            if room is not None:
                self._register(*room)

    def send(self, step: Step, payload_bytes: int, flags: int, overlapped: bool) -> Transfer:
        """Between Client.begin() and write(): copies the host's pieces, issues the device's. Raises StagingError.

        Overlapped, what the forward pass may change is ahead of whatever the trainer issues from here on.
        """
        for slot in range(_SLOTS):  # the one that was begun may be new
            room = self._client.mapped(slot, payload_bytes, flags)
            if room is not None and not self.why:
                self._register(*room)
        assert step.placed is not None
        expected = step.expected if step.plan.first else None
        base = self._client.place(step.placed, None, expected)
        in_slot = base in self._registered
        if not in_slot:
            base = self._client.place(step.placed, self._image_of(payload_bytes), expected)
        late, fixed = self._pairs(step.plan, base)
        early = [*fixed, *_pairs(base, step.staged)]
        end = step.payload_bytes
        ends: list[int] = []
        with _named("issuing copies to host memory"):
            self.device.begin()
            if overlapped:
                self._issue(early)
                if early:
                    self._under_way[-1].gate()
                self._issue(late)
                ends = [0] * (len(self._under_way) - 1) + [end]
            else:
                since, part = 0, []
                for to, source in [*late, *early]:
                    part.append((to, source))
                    at = to.data_ptr() - base + to.nbytes
                    if at - since >= _MARK_BYTES:
                        self._issue(part)
                        since, part = at // 64 * 64, []
                        ends.append(since)
                self._issue(part)
                ends = [*ends, end] if len(ends) < len(self._under_way) else [*ends[:-1], end]
        return Transfer(self, self._client, base, in_slot, ends, list(self._under_way))

    def release(self) -> None:
        """Before the slots' memory may be moved. Raises StagingError while copies may still land there."""
        self._drained()
        self._release_all()

    def forget(self) -> None:
        """Holds no tensor of a plan any more."""
        self._views = {}

    def owns(self, tensor: torch.Tensor) -> bool:
        """Its copies go this way."""
        return self.device.owns(tensor)

    def bring(self, pairs: list[Pair]) -> list[Pair]:
        """Copies (device tensor, tensor in the slot) and waits for it; answers the pairs that it does not serve.
        REQUIRES: the slot's bytes are checked. Raises StagingError."""
        mine = [(to, source) for to, source in pairs
                if self.device.owns(to) and to.dtype == source.dtype and to.shape == source.shape
                and to.is_contiguous() and source.is_contiguous() and not (to.is_conj() or to.is_neg())]
        if not mine:
            return pairs
        for slot in range(_SLOTS):
            room = self._client.mapped(slot, 0, 0)
            if room is not None and any(room[0] <= source.data_ptr() < sum(room) for _, source in mine):
                self._register(*room)
        if self.why:
            return pairs  # the device would take them by way of memory of its own: as any copy does
        with _named("issuing copies to the device"):
            self.device.begin()
            self._issue(mine)
            self._under_way[-1].gate()
        self.await_mark(self._under_way[-1])
        self.landed()
        taken = {id(to) for to, _ in mine}
        return [pair for pair in pairs if id(pair[0]) not in taken]

    def await_mark(self, mark: Mark) -> None:
        """Waits until the mark is passed, within patience. Raises StagingError. Any thread may ask."""
        deadline, pause = time.monotonic() + self._patience, 20e-6
        with _named("copying to host memory"):
            while not mark.done():
                if time.monotonic() >= deadline:
                    raise StagingError(f"{self.device.name}: copies did not land within {self._patience:g} s; the "
                                       "device hangs, or its queue is longer than that")
                time.sleep(pause)
                pause = min(2 * pause, 1e-3)

    def landed(self) -> None:
        """Nothing that was issued is under way."""
        self._under_way = []

    def close(self) -> None:
        """Lets go of all memory, once copies under way have landed. Idempotent."""
        try:
            if self._under_way:
                self.await_mark(self._under_way[-1])
            self.landed()
            self._release_all()
        except StagingError as error:  # pages that the device may still write to stay registered
            warn(f"{error}; the arena's memory stays registered until this process ends")
        self._views, self._image = {}, None

    def _issue(self, pairs: list[Pair]) -> None:
        """Copies, and a mark behind them."""
        if not pairs:
            return
        n = len(self._under_way)
        used = self._marks[n] if n < len(self._marks) else None
        try:
            self.device.copy(pairs)
        finally:  # some may be under way
            mark = self.device.mark(used)
            self._under_way.append(mark)
            self._marks[n:n + 1] = [mark]

    def _drained(self) -> None:
        with _named("looking after the copies of a capture that was given up"):
            if self._under_way and not self._under_way[-1].done():
                raise StagingError(f"{self.device.name}: copies of a capture that was given up have still not "
                                   "landed: nothing is captured until they have")
        self.landed()

    def _register(self, address: int, size: int) -> None:
        if self.why or self._registered.get(address) == size:
            return
        why = self.device.register(address, size)
        if why:
            self._release_all()
            self.why = why
            warn(f"{self.device.name}: the arena's memory cannot be registered: {why}; captures go through pinned "
                 "memory of their own, as much as the state")
        else:
            self._registered[address] = size

    def _unregister(self, address: int) -> None:
        self.device.unregister(address)
        del self._registered[address]
        self._views.pop(address, None)

    def _release_all(self) -> None:
        for address in list(self._registered):
            self._unregister(address)

    def _image_of(self, size: int) -> int:
        if self._image is None or self._image.numel() < size:
            self._image = None
            self._views = {}
            try:
                self._image = self.device.pinned(size + size // 64)
            except RuntimeError as error:
                raise StagingError(f"{self.device.name}: no {size} bytes of pinned memory: {error}") from None
        return self._image.data_ptr()

    def _pairs(self, plan: Plan, base: int) -> tuple[list[Pair], list[Pair]]:
        found = self._views.get(base)
        if found is None or found[0] is not plan:
            found = (plan, _pairs(base, plan.staged_late), _pairs(base, plan.staged_fixed))
            self._views[base] = found
        return found[1], found[2]


def _pairs(base: int, staged: list[tuple[int, torch.Tensor]]) -> list[Pair]:
    """(offset, source) each, with the host memory at `base` + offset as a tensor of the same kind."""
    return [(_host(base + offset, source.nbytes).view(source.dtype).view(source.shape), source)
            for offset, source in staged]


def _host(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)


class _named:
    """Turns a device's RuntimeError into a StagingError that says what was being done."""

    def __init__(self, doing: str) -> None:
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, StagingError):
            raise StagingError(f"{self._doing}: {type(error).__name__}: {str(error).strip()}") from error


Owns = Callable[[torch.Tensor], bool]
