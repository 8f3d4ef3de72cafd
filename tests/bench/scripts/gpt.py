"""A GPT given as layers, without dropout, and its data: what the pipeline benchmark trains."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

WORDS, CONTEXT, SAMPLES = 64, 32, 1024


class Embedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(CONTEXT, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.words(tokens) + self.places(torch.arange(tokens.shape[1]))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        normed = self.first(x)
        x = x + self.attention(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        return x + self.mlp(self.second(x))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.words = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.words(self.norm(x))


class Text(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self) -> None:
        self.words = torch.stack([(torch.arange(CONTEXT + 1) * (1 + i % 7) + i) % WORDS for i in range(SAMPLES)])

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.words[i, :-1], self.words[i, 1:]


def layers(width: int, blocks: int) -> list[Callable[[], nn.Module]]:
    return [functools.partial(Embedding, width), *[functools.partial(Block, width)] * blocks, functools.partial(Head, width)]


def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def profile(width: int, blocks: int, stages: int) -> str:
    """Blocks of equal cost, and nodes whose memory holds a little more than one of `stages` parts."""
    counts = [sum(p.numel() for p in make().parameters()) for make in layers(width, blocks)]
    most = 0 if stages == 1 else (max(sum(counts) / stages, max(counts)) * 16 / (1 << 20)) * 1.25
    rows = "".join(f"{i},{'1,2' if 0 < i <= blocks else '0.1,0.2'},0.1,0,0.01,{count}\n" for i, count in enumerate(counts))
    return (f"everstep-profile 1\nmodel = gpt\ndevice-memory-mib = {most:.3f}\nlayer,forward_ms,backward_ms,optimizer_ms,"
            f"activation_mib,output_mib,parameters\n{rows}")
