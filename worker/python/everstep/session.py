"""A training loop whose process outlives the loss of its peers: everstep.Session and everstep.resilient."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from everstep import _samples
from everstep._attach import number, warn
from everstep._collectives import Group, hosted_store, lost_peer, release
from everstep._library import EverstepError, StaleGenerationError
from everstep._samples import Share
from everstep._session_link import Link, Resume
from everstep.checkpointer import Checkpointer

T = TypeVar("T")
# Seconds: a loop whose bytes move gets to the end of its step by itself; gloo has told everyone whom it will tell;
# of the time that a worker has before it is killed, what leaving and parking may take.
_PATIENCE, _STUCK, _RESERVE = 2.0, 0.15, 3.5
_BACKENDS = ("gloo", "nccl", "cpu:gloo,cuda:nccl")
_STARTED_ANEW = 75  # exit code of a worker that cannot live on (EX_TEMPFAIL)
_IDENTITY = frozenset(("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
                       "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


class _LeaveError(Exception):
    """The generation is over; raised out of the training function at the end of a step."""


class Session:
    """Runs a training function again and again, in one process, with whatever ranks there are.

        def train(session: everstep.Session) -> None:
            model = DDP(Net())
            optimizer = torch.optim.AdamW(model.parameters())
            for step in range(session.restore({"model": model, "optimizer": optimizer}), STEPS):
                part = session.share(step, samples=len(data), batch=48)
                loss = criterion(model(x[part.indices]), y[part.indices]) * part.weight
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                session.step(step)

        everstep.Session(train).run()

    The process group stands when `train` is called. When a rank is lost, or one joins, the ranks that are left come
    out of whatever collective they are in, `train` is left by an exception, and, once the next generation is known,
    called again in the same process: with a new process group, new rank and world size, and restore() giving the
    newest step that every rank's state exists of. So `train` makes its model, wrappers and optimizer itself, and lets
    exceptions pass.

    Args:
        body: the training function; what it returns, run() returns.
        backend: of the process group: "gloo", "nccl", or "cpu:gloo,cuda:nccl". NCCL is aborted and formed anew;
            before a step is captured, what the device has of it in its queue is waited for.
        timeout: seconds that a collective may take.
        loss_wait: seconds to wait for the controller's word when a collective fails, before the error is raised as
            the script's own: a node's loss is known when its lease has run out.

    `@everstep.resilient` before the function, and calling it, is the same. Needs `everstep run`; anywhere else
    `train` runs once, as in any script. A worker that does not come out of its function within five seconds of being
    asked (it computes, or waits for something else) is killed and started anew, as every worker is without a Session;
    where nobody is lost, a node joins or drains, it has fifteen, so that a step may end first.
    TCP connections that the script opens while a process group stands are ended with those of the group. Not
    thread-safe.
    """

    def __init__(self, body: Callable[[Session], T], *, backend: str = "gloo", timeout: float = 1800.0,
                 loss_wait: float = 30.0) -> None:
        if backend not in _BACKENDS:
            raise ValueError(f"Session: the backend {backend!r} cannot be left in place; use one of "
                             f"{', '.join(map(repr, _BACKENDS))}")
        self._body: Callable[[Session], Any] = body
        self._backend = backend
        self._timeout = timedelta(seconds=timeout)
        self._loss_wait = loss_wait
        self._group = Group()
        self._forming = False
        self._link: Link | None = None
        self._checkpoint: Checkpointer | None = None
        self._resumed = 0
        self._stuck_since = 0.0
        self._asked_at: float | None = None
        self._stepped_at: float | None = None
        self._seconds: list[float] = []  # of the newest steps

    @property
    def rank(self) -> int:
        """Of this process, now."""
        return number("RANK", 0)

    @property
    def world_size(self) -> int:
        """Ranks there are now."""
        return max(1, number("WORLD_SIZE", 1))

    @property
    def generation(self) -> int:
        """The job's configuration number; 0 outside of `everstep run`."""
        return number("EVERSTEP_GENERATION", 0)

    @property
    def resumed(self) -> int:
        """How often this process went on in another generation."""
        return self._resumed

    def run(self) -> Any:
        """Calls the training function until it returns; then ends the process group.

        Raises what it raises, unless that comes of a change of the generation.
        """
        if "nccl" in self._backend:
            _check_device(self._backend)
        self._open()
        try:
            while True:
                error: BaseException | None = None
                try:
                    self._form()
                    result = self._body(self)
                    self._close_checkpoint()
                    release(None)  # gloo can hang in its end when a module is the last to hold the group
                    self._group.drop()
                    return result
                except Exception as caught:
                    if not self._over(caught):
                        raise
                    error = caught
                self._park(error)
        finally:
            if self._link is not None:
                self._link.close()

    def restore(self, state: Mapping[str, Any], **options: Any) -> int:
        """Makes a Checkpointer of `state` (its `options` are Checkpointer's), loads the newest state and returns the
        step to do next."""
        if self._checkpoint is not None:
            raise RuntimeError("Session.restore: called a second time; a rank has memory for one state: give it all "
                               "that is to be kept in one call")
        self._checkpoint = Checkpointer(state, **options)
        return self._checkpoint.restore()

    def step(self, n: int) -> bool:
        """Captures the state after step `n`, as Checkpointer.step; leaves the training function if the generation is
        over."""
        if self._group.aborts and self._checkpoint is not None:
            _wait_for_device()
            if self._group.leaving:
                raise _LeaveError(f"the generation is over, and what the device did of step {n} may be cut off")
        captured = self._checkpoint.step(n) if self._checkpoint is not None else False
        now = time.monotonic()
        if self._stepped_at is not None:
            self._took(now - self._stepped_at)
        self._stepped_at = now
        self.check()
        return captured

    def check(self) -> None:
        """Leaves the training function if the generation is over: for loops that are long without a collective."""
        if self._link is not None and self._link.asked:
            raise _LeaveError("the generation is over")

    def share(self, step: int, *, samples: int, batch: int, seed: int = 0) -> Share:
        """This rank's part of step `step`: the same samples make up each step's global batch, in the same order,
        whatever the number of ranks and whenever it changed.

        `samples`: of the dataset; `batch`: of a step, over all ranks. An epoch's order is a permutation keyed by
        (seed, epoch); what is left of it after the last whole batch is left out. Multiply the mean loss by `weight`.
        """
        return _samples.share(step, samples=samples, batch=batch, rank=self.rank, world=self.world_size, seed=seed)

    @property
    def checkpoint(self) -> Checkpointer | None:
        """What restore() made; None before."""
        return self._checkpoint

    @property
    def usual(self) -> float:
        """Seconds of a step, the median of the newest; 0: there was none."""
        return sorted(self._seconds)[len(self._seconds) // 2] if self._seconds else 0.0

    def _took(self, seconds: float) -> None:
        self._seconds = [*self._seconds[-8:], seconds]

    def _open(self) -> None:
        keeper, job = os.environ.get("EVERSTEP_KEEPER"), os.environ.get("EVERSTEP_JOB")
        if not keeper or not job:
            return warn("this process was not started by `everstep run`; a Session trains once there")
        try:
            self._link = Link(keeper, job, self.rank, self.generation, self._leave)
        except StaleGenerationError:
            raise
        except (OSError, EverstepError) as error:
            warn(f"this worker will be started anew where it could live on: {error}")

    def _leave(self) -> None:
        """Lets the training thread out of what it is in. By the link's thread, again and again until it is."""
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        if now - self._asked_at >= self._patience:
            self._end_connections()

    @property
    def _patience(self) -> float:
        """Seconds that a step under way has to end by itself: some steps' time where nobody is lost."""
        boundary = 0.0 if self._link is None or self._forming else self._link.boundary
        return max(0.0, min(boundary - _RESERVE, 2 * self.usual))

    def _end_connections(self) -> None:
        if not self._group.leave(_PATIENCE, store=self._forming) or not self._group.stuck():
            self._stuck_since = 0.0
        elif self._stuck_since == 0.0:
            self._stuck_since = time.monotonic()
        elif time.monotonic() - self._stuck_since > _STUCK:
            warn("the loss of a rank cut off a message that gloo was sending or receiving, and gloo waits for the "
                 "rest of it until its timeout: this worker is started anew")
            sys.stderr.flush()
            os._exit(_STARTED_ANEW)

    def _form(self) -> None:
        link = self._link
        options: dict[str, Any] = {}
        if link is not None and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            options = {"connect": lambda: hosted_store(self._timeout, lambda: link.asked), "rank": self.rank,
                       "world_size": self.world_size}
        self._forming = True
        try:
            self._group.form(self._backend, store_port=number("MASTER_PORT", 0), timeout=self._timeout, **options)
        finally:
            self._forming = False
        self.check()

    def _over(self, error: Exception) -> bool:
        """Whether `error` came of a change of the generation."""
        if self._link is None:
            return False
        if self._link.asked or isinstance(error, _LeaveError):
            return True
        # A peer is gone, or this node's agent prepares the next generation: the word is on its way.
        lost = isinstance(error, StaleGenerationError) or lost_peer(error)
        return lost and self._link.wait_asked(self._loss_wait)

    def _park(self, error: BaseException) -> None:
        """Lets go of all that belongs to the old generation; returns in the next."""
        assert self._link is not None
        with contextlib.suppress(EverstepError):  # what became of the capture under way does not matter any more
            self._close_checkpoint()
        while not self._group.leave(_PATIENCE, store=True):
            pass
        self._link.parked()
        # The rest costs the others no time: while the controller decides.
        release(error)
        self._group.drop()
        self._become(self._link.wait_resume())

    def _close_checkpoint(self) -> None:
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None:
            checkpoint.close()

    def _become(self, resume: Resume) -> None:
        """Environment and log files of the new generation."""
        self._asked_at = self._stepped_at = None
        for name in [name for name in os.environ if name in _IDENTITY or name.startswith("TORCHELASTIC_")]:
            if name not in resume.environment:
                del os.environ[name]
        for name, value in resume.environment.items():
            if name in _IDENTITY or name.startswith(("TORCHELASTIC_", "EVERSTEP_")):
                os.environ[name] = value
        for stream, descriptor, path in ((sys.stdout, 1, resume.stdout), (sys.stderr, 2, resume.stderr)):
            stream.flush()
            if path and Path(path).parent.is_dir():
                new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                os.dup2(new, descriptor)
                os.close(new)
        self._resumed += 1


def _check_device(backend: str) -> None:
    import torch
    import torch.distributed as dist

    if not torch.cuda.is_available() or not dist.is_nccl_available():
        raise RuntimeError(f"Session: the backend {backend!r} needs a CUDA device and a PyTorch with NCCL, and there "
                           "is none here; use 'gloo'")


def _wait_for_device() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def resilient(body: Callable[[Session], T]) -> Callable[[], T]:
    """Makes a training function one that outlives the loss of its peers: calling it is Session(body).run().

    @everstep.resilient
    def train(session):
        ...

    train()
    """

    @functools.wraps(body)
    def run() -> T:
        result: T = Session(body).run()
        return result

    return run
