"""The GPT of tests/e2e/scripts/pipeline.py as a job of the soak: lines as scripts/ledger.py writes them, to $LEDGER/PID.jsonl.

The CRC is that of the step's loss, which deterministic=True makes a function of the step alone, whatever happened. The
ledger of microbatches is $LEDGER/steps/ledger.jsonl. $FILES: a directory for layers, every 10 steps. Ends when $STOP_FILE is
there. A microbatch takes $PAUSE seconds more; MEMORY is what the profile says of a node, in MiB. On a link as slow as this
one a step has time for one layer: newcomers are filled while the others train, and faults fall into that.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import struct
import sys
import time
import zlib
from pathlib import Path

LEDGER = Path(os.environ["LEDGER"])
os.environ["LINES"] = str(LEDGER)
sys.path.insert(0, str(Path(__file__).parents[2] / "e2e/scripts"))

import everstep
import pipeline as model
import torch

if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)  # the soak asks who hangs where it stands
    torch.set_num_threads(1)
    lines = (LEDGER / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def on_step(report: everstep.pipeline.Report) -> None:
        lines.write(json.dumps({"step": report.step, "rank": report.rank, "world": report.world_size,
                                "crc": zlib.crc32(struct.pack("<d", report.loss)), "generation": report.generation,
                                "at": time.time(), "pid": os.getpid()}) + "\n")

    everstep.Pipeline(
        model.MODEL, loss=model.loss, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10)),
        dataset=model.Text(), batch=24, microbatch=2, clip=1.0, seed=11, deterministic=True,
        tied=[("0.words.weight", "9.words.weight")], profile=model.profile(int(os.environ.get("MEMORY", "10"))),
        faults=int(os.environ.get("FAULTS", "1")), ledger=LEDGER / "steps",
        directory=os.environ.get("FILES"), every=10, link=(20.0, 1e-5),
    ).run(1_000_000, on_step=on_step, stop=Path(os.environ["STOP_FILE"]).exists)
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then
