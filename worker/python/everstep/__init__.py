"""Everstep's Python package: a trainer's state in its node's memory.

    import everstep

    ck = everstep.Checkpointer({"model": model, "optimizer": optimizer, "scheduler": scheduler})
    for step in range(ck.restore(), steps):
        ...
        ck.step(step)

A Session goes further: its processes live on when others are lost, at another number of ranks.

    everstep.Session(train).run()

A Pipeline further still: the model is given as layers, and whatever ranks there are divide them.

    everstep.Pipeline(layers, loss=loss, optimizer=AdamW, dataset=data, batch=64, microbatch=4).run(1000)

Importing it does nothing, and does not import torch; outside of `everstep run` a Checkpointer warns once
and the script runs on.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everstep._library import EverstepError, StaleGenerationError
    from everstep._samples import Share
    from everstep.checkpointer import Checkpointer, Stats
    from everstep.pipeline import Pipeline
    from everstep.session import Session, resilient

__version__ = "0.1.0"
__all__ = ["Checkpointer", "EverstepError", "Pipeline", "Session", "Share", "StaleGenerationError", "Stats",
           "__version__", "resilient"]


def __getattr__(name: str) -> Any:
    """Loads what was asked for when it is asked for."""
    if name in ("Checkpointer", "Stats"):
        from everstep import checkpointer

        return getattr(checkpointer, name)
    if name in ("Session", "resilient"):
        from everstep import session

        return getattr(session, name)
    if name == "Pipeline":
        from everstep import pipeline

        return pipeline.Pipeline
    if name == "Share":
        from everstep._samples import Share

        return Share
    if name in ("EverstepError", "StaleGenerationError"):
        from everstep import _library

        return getattr(_library, name)
    if name in ("dcp", "hf", "pipeline"):
        return importlib.import_module(f"everstep.{name}")
    raise AttributeError(f"module 'everstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
