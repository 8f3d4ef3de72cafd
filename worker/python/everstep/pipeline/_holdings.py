"""The layers that a rank holds: where they come from, and where they are put."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from everstep.pipeline import _agree
from everstep.pipeline._agree import Layout, Standing, Status
from everstep.pipeline._layer import Bundle, Layer, Recipe
from everstep.pipeline._switch import Moved, fetch, gather
from everstep.pipeline._tier import LayerFiles


class Holdings:
    """Of one rank. Methods that are collective say so."""

    def __init__(self, recipe: Recipe, files: LayerFiles | None) -> None:
        self.layers: dict[int, Layer] = {}
        self._recipe = recipe
        self._files = files

    def standing(self, statuses: Sequence[Status], rank: int) -> Standing:
        """How far the job is. Collective where files are needed: without the steps of which some layer cannot be
        read."""
        while True:
            now = _agree.standing(statuses, len(self._recipe.layers))
            if not now.files:
                return now
            assert self._files is not None
            bad = self._files.damaged(now.version, now.files[rank])
            good = next(iter(now.files[rank] - set(bad)), None)
            bundle = None if good is None else self._files.read(now.version, good)
            meta: Mapping[str, Any] = {} if bundle is None else bundle.meta
            told = gather((bad, meta.get("line"), meta.get("words") or []))
            if not any(each for each, _, _ in told):
                words = next((words for _, _, words in told if words), [])
                return dataclasses.replace(now, line=next((line for _, line, _ in told if line is not None), None),
                                           told=tuple((step, begins, word) for step, begins, word in words))
            statuses = [dataclasses.replace(s, files={
                version: tuple(x for x in layers if version != now.version or x not in each)
                for version, layers in s.files.items()}) for s, (each, _, _) in zip(statuses, told)]

    def take(self, now: Standing, layout: Layout, rank: int, sizes: Sequence[int]) -> Moved:
        """Collective: gives this rank the layers of its place in `layout`, at the version that goes on, and drops the
        others. `sizes`: of the layers, bytes."""
        count = len(self._recipe.layers)
        offers = {index: [r for r, holds in enumerate(now.holds) if index in holds] for index in range(count)}
        for index in range(count):
            offers[index] = offers[index] or [r for r, files in enumerate(now.files) if index in files]
        mine = layout.layers(rank)
        held = now.holds[rank]
        new = [index for index in range(count) if not offers[index]]
        if new and now.version:
            raise RuntimeError(f"Pipeline: layer {new[0]} of step {now.version} is nowhere")
        made: dict[int, Layer] = {}
        for index in new:  # nobody ever trained it: the first holder's is the one
            whole = isinstance(self._recipe.layers[index], torch.nn.Module)
            source = 0 if whole else min(layout.holder(p, index) for p in range(len(layout.ranks)))
            offers[index] = [source]
            if rank == source or index in mine:
                made[index] = self._recipe.build(index)
        sums = gather({index: layer.pack().checksum for index, layer in made.items()}) if new else [{}]
        same = {index for index in made if sums[rank][index] == sums[offers[index][0]][index]}
        self.layers |= {index: made[index] for index in same if index in mine}
        wanted = [index for index in mine if index not in held and index not in same]

        def pack(index: int) -> Bundle:
            if index in made or index in held:
                return (made if index in made else self.layers)[index].pack()
            bundle = None if self._files is None else self._files.read(now.version, index)
            if bundle is None:
                raise RuntimeError(f"Pipeline: the file of layer {index} of step {now.version} was there just now, "
                                   "and is gone")
            return bundle

        def install(index: int, bundle: Bundle) -> None:
            layer = self._recipe.build(index)
            layer.unpack(bundle, now.version)
            self.layers[index] = layer

        moved = fetch(wanted, offers, sizes, pack, install)
        for index in [i for i in self.layers if i not in mine]:
            del self.layers[index]
        return moved

    def export(self, path: str | os.PathLike[str], rank: int, layout: Layout, sizes: Sequence[int]) -> None:
        """Collective: the whole model's weights into a file of rank 0's."""
        count = len(self._recipe.layers)
        whole: dict[int, dict[str, torch.Tensor]] = {
            i: dict(x.module.state_dict()) for i, x in self.layers.items()} if rank == 0 else {}

        def install(index: int, bundle: Bundle) -> None:
            whole[index] = bundle.root()["module"]

        fetch([i for i in range(count) if i not in whole] if rank == 0 else [],
              {i: [layout.holder(p, i) for p in range(len(layout.ranks))] for i in range(count)},
              sizes, lambda index: self.layers[index].pack(), install)
        if rank == 0:
            part = Path(f"{os.fspath(path)}.part")
            torch.save({f"{i}.{name}": value for i in range(count) for name, value in whole[i].items()}, part)
            part.replace(path)
