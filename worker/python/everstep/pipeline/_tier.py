"""Layers in files, for when more ranks are lost at once than there are copies: a file for each layer and step.

The files are those of a Checkpointer's directory, where a layer stands in a rank's place: step-12.rank-3-of-10 is
layer 3 of 10 after 12 steps. They are written by one rank that holds the layer, while training goes on; a step counts
when all its layers are there. Each rank reads what it sees, so the directory may be shared, or the node's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from everstep._files import FileTier
from everstep._table import Flattened
from everstep.pipeline._layer import Bundle


class LayerFiles:
    """Not thread-safe; one thread of its own writes."""

    def __init__(self, directory: str | os.PathLike[str], layers: int, every: int) -> None:
        self._tiers = [FileTier(directory, layer, layers) for layer in range(layers)]
        self._every = every
        self._writer = ThreadPoolExecutor(1, "everstep-layers")
        self._writing: Future[None] | None = None

    def due(self, version: int) -> bool:
        """Whether this step is one to keep."""
        return version % self._every == 0

    def save(self, version: int, bundles: Mapping[int, Bundle]) -> None:
        """Writes layers in the background, once what was given before is written. Raises OSError when that was not
        possible."""
        self.wait()
        if bundles:
            self._writing = self._writer.submit(self._write, version, dict(bundles))

    def wait(self) -> None:
        """Until all is written. Raises OSError."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, version: int, bundles: Mapping[int, Bundle]) -> None:
        for layer, bundle in bundles.items():
            payload = bundle.payload
            self._tiers[layer].save(version, Flattened([(payload.data_ptr(), payload.numel())], [0], payload.numel(),
                                                       bundle.table, False, [payload]))

    def have(self) -> dict[int, tuple[int, ...]]:
        """Version -> layers whose file is there."""
        return {version: tuple(layers) for version, layers in self._tiers[0].steps().items()}

    def read(self, version: int, layer: int) -> Bundle | None:
        """A checked layer. None: it is not there, or damaged."""
        loaded = self._tiers[layer].read(version)
        return None if loaded is None else Bundle(loaded.table, torch.frombuffer(loaded.payload, dtype=torch.uint8))

    def damaged(self, version: int, layers: Iterable[int]) -> list[int]:
        """Which of these cannot be read."""
        return [layer for layer in layers if self.read(version, layer) is None]
