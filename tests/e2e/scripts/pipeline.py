"""A GPT of ten small layers as everstep.Pipeline: $LINES/PID.jsonl has a line for each start and step.

Trains until $LINES/end is there, or STEPS steps; then $LINES/PID.pt has the layers that this process holds. MEMORY is what
the profile says of a node, in MiB, MICROBATCH the samples of one. While ranks switch, each process whose id is in $LINES/kill is killed, once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import everstep
import torch
from everstep.pipeline import _holdings
from torch import nn

LINES, STEPS, PAUSE = Path(os.environ["LINES"]), int(os.environ.get("STEPS", "100000")), float(os.environ["PAUSE"])
WORDS, WIDTH, CONTEXT, LAYERS = 32, 32, 12, 10
logging.basicConfig(level=logging.INFO, stream=sys.stderr)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(CONTEXT, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens) + self.places(torch.arange(tokens.shape[1]))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        normed = self.first(x)
        x = x + self.attention(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        return x + self.mlp(self.second(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.words = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.words(self.norm(x))


class Text(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 240

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        words = (torch.arange(CONTEXT + 1) * (1 + i % 5) + i) % WORDS
        return words[:-1], words[1:]


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    time.sleep(PAUSE)  # so that faults come in the middle of a step
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def profile(memory_mib: int) -> str:
    """Layers of the same weight: a node of 10 MiB holds nearly the whole model, so a pipeline has two stages or more."""
    counts = [sum(p.numel() for p in layer().parameters()) for layer in MODEL]
    rows = "".join(f"{i},1,2,0.1,1,0.1,{count}\n" for i, count in enumerate(counts))
    return (f"everstep-profile 1\nmodel = tiny-gpt\ndevice-memory-mib = {memory_mib}\nlayer,forward_ms,backward_ms,optimizer_ms,"
            f"activation_mib,output_mib,parameters\n{rows}")


MODEL = [Embedding, *[Block] * (LAYERS - 2), Head]

def fetch(*args: Any, **options: Any) -> Any:
    with contextlib.suppress(OSError):  # nobody is to be killed, or another rank was here first
        (LINES / "kill").rename(LINES / "killed")
        for pid in (LINES / "killed").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    return fetch_layers(*args, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fetch_layers, _holdings.fetch = _holdings.fetch, fetch
    lines = (LINES / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def on_step(report: everstep.pipeline.Report) -> None:
        lines.write(json.dumps({"step": report.step, "loss": report.loss, "world": report.world_size, "at": time.time(),
                                "rank": report.rank, "generation": report.generation, "pipelines": report.pipelines,
                                "seconds": report.seconds}) + "\n")

    pipeline = everstep.Pipeline(
        MODEL, loss=loss, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10)),
        dataset=Text(), batch=24, microbatch=int(os.environ.get("MICROBATCH", "2")), clip=1.0, seed=11, deterministic=os.environ.get("DETERMINISTIC") == "1",
        tied=[("0.words.weight", "9.words.weight")], profile=profile(int(os.environ.get("MEMORY", "10"))),
        faults=int(os.environ.get("FAULTS", "1")), link=(20.0, float(os.environ.get("LINK", "1.25"))),
        ledger=None if os.environ.get("TOLD") == "1" else LINES)
    pipeline.run(STEPS, on_step=on_step, stop=(LINES / "end").exists)
    torch.save({i: m.state_dict() for i, m in pipeline.layers.items()}, LINES / f"{os.getpid()}.pt")
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then
