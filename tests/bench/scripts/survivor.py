"""The GPT of gpt.py in processes that outlive their peers: LEVEL=2 is a DDP loop in everstep.Session, LEVEL=3 an
everstep.Pipeline (over a link of LINK 10^9 bytes a second). SHAPE: width x blocks. $MARKS/PID.jsonl has a line for each optimizer step. A microbatch's loss takes PAUSE seconds more, as on
a slower device, so that steps last and leave the processors to the others.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import everstep
import gpt
import torch
from torch import nn

PAUSE = float(os.environ["PAUSE"])
WIDTH, BLOCKS = (int(n) for n in os.environ.get("SHAPE", "32x8").split("x"))
LINK = 20.0, float(os.environ.get("LINK", "1.25"))
BATCH, MICROBATCH = int(os.environ.get("BATCH", "24")), 2
end = Path(os.environ["MARKS"]) / "end"
marks = (Path(os.environ["MARKS"]) / f"{os.getpid()}.jsonl").open("a", buffering=1)


def mark(step: int, rank: int, world: int, generation: int, seconds: float) -> None:
    marks.write(json.dumps({"mark": "step", "at": time.time(), "pid": os.getpid(), "step": step, "rank": rank, "world": world,
                            "generation": generation, "seconds": seconds}) + "\n")


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    time.sleep(PAUSE)
    return gpt.loss(logits, target)


def loop(session: everstep.Session) -> None:
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(*[make() for make in gpt.layers(WIDTH, BLOCKS)]))
    optimizer = gpt.optimizer(list(net.parameters()))
    text, step = gpt.Text(), session.restore({"model": net, "optimizer": optimizer})
    ended = torch.zeros(1)
    while not ended.item():
        began = time.perf_counter()
        part = session.share(step, samples=len(text), batch=BATCH)
        optimizer.zero_grad()
        pieces = [part.indices[i:i + MICROBATCH] for i in range(0, len(part.indices), MICROBATCH)]
        for number, piece in enumerate(pieces):
            net.require_backward_grad_sync = number == len(pieces) - 1
            out = loss(net(torch.stack([text[i][0] for i in piece])), torch.stack([text[i][1] for i in piece]))
            (out * (part.weight * len(piece) / len(part.indices))).backward()
        optimizer.step()
        mark(step, session.rank, session.world_size, session.generation, time.perf_counter() - began)
        session.step(step)
        ended[0] = float(end.exists())
        torch.distributed.broadcast(ended, 0)
        step += 1


def told(report: everstep.pipeline.Report) -> None:
    mark(report.step, report.rank, report.world_size, report.generation, report.seconds)


class Planned(logging.Handler):
    """Keeps how long each plan took, of the engine's lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if found := re.search(r"generation (\d+) .*planned in ([\d.]+) ms, ([^)]*)\)", record.getMessage()):
            with (end.parent / "planned.txt").open("a") as file:
                file.write("\t".join(found.groups()) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("everstep").addHandler(Planned())
    logging.getLogger("everstep").setLevel(logging.INFO)
    if os.environ["LEVEL"] == "2":
        everstep.Session(loop).run()
    else:
        everstep.Pipeline(gpt.layers(WIDTH, BLOCKS), loss=loss, optimizer=gpt.optimizer, dataset=gpt.Text(), batch=BATCH,
                          microbatch=MICROBATCH, link=LINK, profile=gpt.profile(WIDTH, BLOCKS, 2)).run(1_000_000, stop=end.exists, on_step=told)
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then
