"""How a process comes to its rank's arena, and why it does not."""

from __future__ import annotations

import os
import warnings
import weakref

from everstep._library import Client, EverstepError, StaleGenerationError

_warned: set[str] = set()
_attached: dict[str, weakref.ref[Client]] = {}  # by whom


def attach(who: str, commit_wait: float) -> tuple[Client | None, str]:
    """The client of this rank's arena; None and the reason when there is none.

    Raises StaleGenerationError when the process must end, RuntimeError when another part of the package already
    keeps this rank's state: an arena holds one state.
    """
    keeper, job = os.environ.get("EVERSTEP_KEEPER"), os.environ.get("EVERSTEP_JOB")
    if not keeper or not job:
        return None, "this process was not started by `everstep run`"
    for other, reference in list(_attached.items()):
        client = reference()
        if client is None or not client.attached:
            del _attached[other]
        elif other != who:
            raise RuntimeError(f"{who}: this process keeps its state by {other} already, and a rank has memory for "
                               f"one state; use one of both, or close the {other} first")
    rank = number("RANK", 0)
    world = max(number("WORLD_SIZE", 1), rank + 1)
    try:
        client = Client(keeper, job, rank, world, number("EVERSTEP_GENERATION", 0), commit_wait)
    except StaleGenerationError:
        raise
    except (OSError, EverstepError) as error:
        return None, str(error)
    _attached[who] = weakref.ref(client)
    return client, ""


def number(name: str, default: int) -> int:
    """A number of the environment."""
    text = os.environ.get(name, "")
    return int(text) if text.lstrip("-").isdigit() else default


def warn(text: str, stacklevel: int = 4) -> None:
    """Once a process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(f"everstep: {text}", RuntimeWarning, stacklevel=stacklevel)
