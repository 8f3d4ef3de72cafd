"""A worker that refuses what it was given: no restart helps, so the job ends once, with the reason.

Who refuses raises an exception as ever. Where nobody catches it, the process writes the reason beside
TORCHELASTIC_ERROR_FILE before it ends; the agent tells the controller.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_FILE = "refused.txt"  # worker/agent/error_file.h
_MOST_BYTES = 4096
_MARK = "_everstep_refused"


@contextlib.contextmanager
def refusals(prefix: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """TypeErrors and ValueErrors that leave the block and begin with `prefix` are refusals of the input; `but`: not
    these, where another start may find what is missing."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith(prefix) and not isinstance(error, but):
            setattr(error, _MARK, True)
            _install()
        raise


def _install() -> None:
    if getattr(sys.excepthook, _MARK, False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        seen: BaseException | None = error
        while seen is not None and not getattr(seen, _MARK, False):
            seen = seen.__cause__ or seen.__context__
        if seen is not None:
            _tell(str(seen))
        before(kind, error, trace)

    setattr(hook, _MARK, True)
    sys.excepthook = hook


def _tell(why: str) -> None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or "EVERSTEP_JOB" not in os.environ:
        return
    with contextlib.suppress(OSError):  # then it is a failure as any other
        Path(path).with_name(_FILE).write_bytes(why.encode("ascii", "backslashreplace")[:_MOST_BYTES])
