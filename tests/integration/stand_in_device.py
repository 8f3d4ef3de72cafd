"""A device without a device, behind the seam of everstep._staging: its copies are done at the last moment that the order
of the streams allows, in the order in which they were issued, and it can hold them back, fail, or refuse memory.

On a real device a copy may run at any time between its issue and whatever waits for it. Here it runs when something waits:
in Mark.gate(), since what the trainer issues afterwards comes behind it, or in Mark.done(), where the host looks. So whoever
changes a tensor too early finds the changed bytes in the capture, every time.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from everstep._staging import Mark, Pair


class StandInMark:
    def __init__(self, device: StandIn) -> None:
        self._device = device
        self.behind = 0  # copies issued before it

    def done(self) -> bool:
        if self._device.held.is_set():
            return False
        self._device.run(self.behind)
        return True

    def gate(self) -> None:
        if not self._device.held.is_set():  # held: the trainer's stream stands, its host goes on
            self._device.run(self.behind)


class StandIn:
    """Owns the floating-point tensors of the host that have a dimension."""

    name = "stand-in"

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses  # what register() answers
        self.held = threading.Event()  # while it is set nothing lands
        self.fail_at = -1  # of the copies from now on, the one that fails; -1: none
        self.issued = 0
        self.landed = 0
        self.taken: list[int] = []  # sizes registered and pinned, one after the other
        self.registered: dict[int, int] = {}
        self.images: dict[int, int] = {}
        self._queue: list[Pair] = []
        self._lock = threading.Lock()
        self._broken = False

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.dim() > 0 and tensor.is_floating_point()

    def register(self, address: int, size: int) -> str:
        if self.refuses:
            return self.refuses
        assert address not in self.registered, "registered twice"
        assert _is_mapped(address, size)
        self.registered[address] = size
        self.taken.append(size)
        return ""

    def unregister(self, address: int) -> None:
        size = self.registered.pop(address)
        assert _is_mapped(address, size), "unmapped while the device could still write to it"
        assert not self._queue, "let go of while copies are under way"

    def pinned(self, size: int) -> torch.Tensor:
        image = torch.full((size,), 0xA5, dtype=torch.uint8)  # never zero by chance
        self.images[image.data_ptr()] = size
        self.taken.append(size)
        return image

    def begin(self) -> None:
        pass

    def copy(self, pairs: Sequence[Pair]) -> None:
        for to, source in pairs:
            host = to if self._reaches(to) else source
            assert self._reaches(host), "neither end is memory that the device was told of"
            assert to.is_contiguous()
            assert source.is_contiguous()
            with self._lock:
                self._queue.append((to, source))
                self.issued += 1

    def _reaches(self, host: torch.Tensor) -> bool:
        return any(a <= host.data_ptr() and host.data_ptr() + host.nbytes <= a + size
                   for a, size in [*self.registered.items(), *self.images.items()])

    def mark(self, used: Mark | None) -> Mark:
        mark = used if isinstance(used, StandInMark) else StandInMark(self)
        mark.behind = self.issued
        return mark

    def run(self, until: int) -> None:
        """The copies up to the one of this number."""
        with self._lock, torch.no_grad():
            while self.landed < until:
                if self.fail_at == 0 or self._broken:
                    self._broken = True
                    raise RuntimeError("stand-in error: an illegal memory access was encountered")
                self.fail_at -= self.fail_at > 0
                to, source = self._queue.pop(0)
                self.landed += 1
                to.copy_(source)

    def mend(self) -> None:
        """No real one comes back from an error; this one does, with what was under way done."""
        self._broken, self.fail_at = False, -1
        self.run(self.issued)


def _is_mapped(address: int, size: int) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(x, 16) for x in line.split()[0].split("-"))
            if begin <= address and address + size <= end:
                return True
    return False
