"""A Session that ends the step under way, where that is possible, before it leaves a generation."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

from everstep import _told
from everstep._attach import attach, warn
from everstep._library import Client
from everstep.pipeline._ledger import Told
from everstep.session import Session

_TELL_PATIENCE, _LOOK = 10.0, 0.1  # seconds: for the controller's acknowledgements at the end
_LEAST_PATIENCE, _MOST_PATIENCE = 0.1, 1.5  # seconds; the agent kills who has not parked after 5


class PipelineSession(Session):
    """Connections stay for as long as two steps usually take after this process was asked to park: a join or a drain
    then finds a step that all have taken, and of a step that is lost the pipelines that lost nobody are done."""

    def __init__(self, generation: Callable[[PipelineSession], int]) -> None:
        """`generation`: trains until it returns the steps taken, or is left."""
        super().__init__(lambda _: generation(self))
        self.training = False  # it has its place; else it leaves at once
        self._agent: Client | None = None  # attached while a generation lasts, to tell of steps
        self._attached = False

    @property
    def asked(self) -> bool:
        """To leave."""
        return self._link is not None and self._link.asked

    def took(self, step: int, seconds: float) -> None:
        """A step: the node's agent is told, so that the controller sees progress."""
        self._took(seconds)
        if not self._attached:
            self._attached = True
            self._agent, _ = attach("Pipeline", commit_wait=0.0)
        if self._agent is not None:
            self._agent.report_step(step)

    def told(self) -> Told | None:
        """The ledger that this job's controller keeps; None: there is none."""
        link = self._link
        return None if link is None else Told(lambda word: link.tell(_told.LEDGER, word), lambda: link.acknowledged)

    def tell(self, kind: int, text: str) -> None:
        """Of what only the newest counts. One that is too large is not told."""
        if self._link is None:
            return
        try:
            self._link.tell(kind, text.encode())
        except (ValueError, BufferError) as error:
            what = "profile" if kind == _told.PROFILE else "plan"
            warn(f"the controller is not told of this job's {what}: {error}")

    def flush(self) -> None:
        """Waits a while until the controller has all that was told. Leaves if the generation is over."""
        until = time.monotonic() + _TELL_PATIENCE
        while self._link is not None and (left := self._link.flush(_LOOK)):
            self.check()
            if time.monotonic() >= until:
                return warn(f"the controller did not acknowledge {left} of this job's words within "
                            f"{_TELL_PATIENCE:g} s; its ledger ends before the job")

    def leave_together(self) -> None:
        """Some rank was asked to leave when it voted, so this one is or will be."""
        if self._link is not None:
            self._link.wait_asked(self._loss_wait)
        self.check()

    @property
    def _patience(self) -> float:
        if not self.training:
            return 0.0
        return max(super()._patience, min(_MOST_PATIENCE, max(_LEAST_PATIENCE, 2 * self.usual)))

    def _close_checkpoint(self) -> None:
        super()._close_checkpoint()
        agent, self._agent, self._attached = self._agent, None, False
        if agent is not None:
            agent.close()

    def _become(self, resume: Any) -> None:
        self.training = False
        super()._become(resume)


def alone() -> None:
    """Makes this process a world of one: a script that was started by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
