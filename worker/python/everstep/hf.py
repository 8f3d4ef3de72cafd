"""The state of every step of a Hugging Face Trainer: a callback, and one argument of train().

    from everstep.hf import EverstepCallback

    callback = EverstepCallback(every=10)
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=callback.resume())

Under `everstep run` the state is kept in the node's memory, as a Checkpointer's is; anywhere else in files, when a
directory is given. Needs transformers and accelerate; nothing else of the package does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from everstep._state import apply_rng, gather_rng
from everstep.checkpointer import Checkpointer, Stats
from everstep.export import write_safetensors

try:
    _Base: Any = import_module("transformers").TrainerCallback
except ImportError as error:
    raise ImportError("everstep.hf needs Hugging Face's transformers, which is not installed here: pip install "
                      "transformers accelerate") from error


class EverstepCallback(_Base):  # type: ignore[misc]
    """Captures model, optimizer, scheduler, Trainer state and random streams, and puts them back.

    Args:
        every: captures each `every`-th optimizer step; "auto": Checkpointer's choice.
        directory: as Checkpointer's: for files, when there is no agent.
        mode: as Checkpointer's.
        replicated: as Checkpointer's.

    Data go on where they were: Trainer itself skips what was trained on, by its seed, and the random streams are
    set once the first batch is there. What it logs is averaged since its last log, so the first log after a
    restart averages over fewer steps, as after resuming from one of its own checkpoints. Its own saving
    (`save_steps`) goes on beside, and may be turned off. Other callbacks' states are not kept. For DDP and single
    processes; a model that FSDP or DeepSpeed shards is refused.
    """

    def __init__(self, every: int | Literal["auto"] = 1, *, directory: str | os.PathLike[str] | None = None,
                 mode: Literal["blocking", "overlapped", "auto"] = "blocking",
                 replicated: bool | Literal["shares", "auto"] | None = None) -> None:
        self._state: dict[str, Any] = {"trainer": {"state": "{}", "log": _bytes(b"")}}
        self._make = lambda: Checkpointer(self._state, directory=directory, mode=mode, every=every,
                                          replicated=replicated)
        self._checkpointer: Checkpointer | None = None
        self._stats: Stats | None = None
        self._folder: str | None = None
        self._step = 0  # the global step that resume() found
        self._due = -1  # a global step to capture once it is logged
        self._rng: dict[str, Any] | None = None
        self._logged: list[bytes] = []

    def resume(self) -> str | None:
        """For Trainer.train(resume_from_checkpoint=): a folder with what is to go on from; None: start afresh.

        The folder is temporary, and gone when training begins. Waits for what the agent brings.
        """
        found = self._open().view()
        if found is None:
            return None
        step, saved = found
        if set(saved) != {"trainer", "model", "optimizer", "scheduler"}:
            raise RuntimeError(f"EverstepCallback: step {step} was captured by another script: it has "
                               f"{sorted(saved)}; start this one under another name (`everstep run --name`), or with "
                               "another directory")
        self._step = step + 1
        self._folder = tempfile.mkdtemp(prefix="everstep-")
        entries = bytes(saved["trainer"]["log"].tolist()).splitlines()
        state = json.loads(saved["trainer"]["state"]) | {"log_history": [json.loads(entry) for entry in entries]}
        (Path(self._folder) / "trainer_state.json").write_text(json.dumps(state))
        # Trainer wants weights to be there; the bits of the rest follow in on_train_begin.
        tensors = {name: value for name, value in saved["model"].items() if isinstance(value, torch.Tensor)}
        write_safetensors(Path(self._folder) / "model.safetensors", tensors)
        return self._folder

    def stats(self) -> Stats | None:
        """The Checkpointer's counts and times, of this training or the one that has ended; None before."""
        return self._stats if self._checkpointer is None else self._checkpointer.stats()

    # --- what Trainer calls ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the state back into what Trainer has made."""
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise RuntimeError("EverstepCallback keeps whole models; one that DeepSpeed or FSDP shards is kept by "
                               "everstep.dcp in a loop of its own, or by Trainer's own checkpoints")
        checkpointer = self._open()
        optimizer, scheduler = kwargs["optimizer"], kwargs["lr_scheduler"]
        self._state["model"] = kwargs["model"]
        self._state["optimizer"] = getattr(optimizer, "optimizer", optimizer)  # not accelerate's wrapper
        self._state["scheduler"] = getattr(scheduler, "scheduler", scheduler)
        if self._folder is None:
            found = checkpointer.view()
            if found is not None:
                raise RuntimeError(f"EverstepCallback: step {found[0] + 1} of this job is there to go on from; call "
                                   "trainer.train(resume_from_checkpoint=callback.resume())")
            checkpointer.restore()
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        if state.global_step != self._step:
            raise RuntimeError(f"EverstepCallback: Trainer begins at step {state.global_step}, resume() gave step "
                               f"{self._step}; hand trainer.train what resume() returned")
        checkpointer.restore()
        self._logged = [json.dumps(entry).encode() + b"\n" for entry in state.log_history]
        self._rng = gather_rng()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new epoch draws its order from the streams as they were at the end of the one before."""
        if self._rng is not None and float(state.epoch or 0).is_integer():
            self._set_streams()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In the middle of an epoch the batches that were skipped have drawn numbers: back to what was captured."""
        if self._rng is not None:
            self._set_streams()
        if self._due == state.global_step:  # it was to be logged, and was not
            self._capture(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Captures, or once the step is logged, so that the log has it."""
        if control.should_log:
            self._due = state.global_step
        else:
            self._capture(state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Captures the step that waited for its log."""
        if self._due == state.global_step:
            self._capture(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches; what was captured stays with the node."""
        if self._due == state.global_step:
            self._capture(state)
        if self._checkpointer is not None:
            self._stats = self._checkpointer.stats()
            self._checkpointer.close()
            self._checkpointer = None

    # --- and what it does ---

    def _open(self) -> Checkpointer:
        if self._checkpointer is None:
            self._checkpointer = self._make()
        return self._checkpointer

    def _set_streams(self) -> None:
        assert self._rng is not None
        apply_rng(self._rng)
        self._rng = None

    def _capture(self, state: Any) -> None:
        self._due = -1
        history = state.log_history or []
        if len(history) < len(self._logged):
            self._logged.clear()
        for entry in history[len(self._logged):]:  # each is written down once
            self._logged.append(json.dumps(_plain(entry)).encode() + b"\n")
        fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "log_history"}
        self._state["trainer"].update(state=json.dumps(_plain(fields)), log=_bytes(b"".join(self._logged)))
        assert self._checkpointer is not None
        self._checkpointer.step(int(state.global_step) - 1)


def _bytes(data: bytes) -> torch.Tensor:
    """Bytes that are copied as they lie, not written down in the table."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _plain(value: Any) -> Any:
    """As JSON has it; a number of numpy's or torch's as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"EverstepCallback: Trainer's state holds a {type(value).__name__}, which JSON lacks: "
                    f"{value!r:.80}")
