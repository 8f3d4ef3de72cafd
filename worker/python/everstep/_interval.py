"""How often a capture pays: the interval with the least lost time, from what was measured. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

_PRIOR_INTERRUPTIONS, _PRIOR_SECONDS = 1.0, 86400.0  # one a day, until more is known
_RESTART_SECONDS = 5.0  # noticing a failure and starting again, before any was measured
_WEIGHT = 0.2  # of the newest sample in a running mean
MOST = 1000  # steps; more is never at stake


@dataclass(frozen=True)
class Measured:
    """Seconds, and interruptions a second."""

    stall: float  # of the training, for one capture
    step: float  # from one step to the next, without captures
    rate: float
    recovery: float  # to notice, start again and restore


def effective_time(measured: Measured, steps: int) -> float:
    """The share of the time that is training when every `steps`-th step is captured (at least 0):
    1/(1 + s/I) * (1 - rate * (recovery + I/2)), I the interval and s the stall."""
    interval = steps * measured.step
    if interval <= 0.0:
        return 0.0
    lost = measured.rate * (measured.recovery + interval / 2)
    return max(0.0, (1 - lost) / (1 + measured.stall / interval))


def best_interval(measured: Measured) -> int:
    """The number of steps, 1 to MOST, with the greatest effective time."""
    stall, step, rate = measured.stall, measured.step, measured.rate
    whole = 1 - rate * measured.recovery
    if stall <= 0.0 or step <= 0.0 or whole <= 0.0:
        return 1
    if rate <= 0.0:
        return MOST
    # Where the derivative is zero: rate I^2 + 2 rate stall I - 2 stall whole = 0.
    ideal = (math.sqrt(stall * stall + 2 * stall * whole / rate) - stall) / step
    below = min(MOST, max(1, math.floor(ideal)))
    return max((below, min(MOST, below + 1)), key=lambda k: (effective_time(measured, k), -k))


class Meter:
    """Measures a training run as its steps go by. Survives restarts through meta()."""

    def __init__(self) -> None:
        self._stall: float | None = None
        self._step: float | None = None
        self._trained = 0.0
        self._interruptions = 0
        self._recovery = _RESTART_SECONDS

    def restored(self, meta: dict[str, object], seconds: float) -> None:
        """A run whose newest capture said `meta` was interrupted; bringing it back took `seconds` here."""
        trained, interruptions = meta.get("trained"), meta.get("interruptions")
        if isinstance(trained, (int, float)) and isinstance(interruptions, int) and trained >= 0:
            self._trained, self._interruptions = float(trained), interruptions + 1
        self._recovery = _RESTART_SECONDS + seconds

    def meta(self) -> dict[str, object]:
        """What the next process has to know; goes into every capture."""
        return {"trained": round(self._trained, 3), "interruptions": self._interruptions}

    def stepped(self, since_last: float | None, stall: float | None) -> None:
        """A step ended `since_last` seconds after the one before (None: the first), of which the trainer stood
        still for `stall` (None: it was not captured)."""
        if since_last is not None:
            self._trained += since_last
            self._step = _mean(self._step, max(0.0, since_last - (stall or 0.0)))
        if stall is not None:
            self._stall = _mean(self._stall, stall)

    def measured(self) -> Measured | None:
        """None: too little was seen."""
        if self._stall is None or not self._step:
            return None
        rate = (_PRIOR_INTERRUPTIONS + self._interruptions) / (_PRIOR_SECONDS + self._trained)
        return Measured(self._stall, self._step, rate, self._recovery)


def explain(measured: Measured, steps: int) -> str:
    """The choice in one line."""
    return (f"every {'step' if steps == 1 else f'{steps} steps'}: a capture stalls {measured.stall * 1e3:.2f} ms, "
            f"a step takes {measured.step * 1e3:.1f} ms, {measured.rate * 86400:.1f} interruptions a day: "
            f"{100 * effective_time(measured, steps):.3f} % of the time is training")


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
