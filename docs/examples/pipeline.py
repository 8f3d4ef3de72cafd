"""A GPT on pipelines: kill -9 any of my ranks. everstep run --standalone --nproc-per-node 4 pipeline.py"""
import os
import time

import everstep
import torch
from torch import nn

WORDS, WIDTH, CONTEXT, STEPS = 64, 48, 16, int(os.environ.get("STEPS", "200"))


class Embedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(CONTEXT, WIDTH)

    def forward(self, tokens):
        return self.words(tokens) + self.places(torch.arange(tokens.shape[1]))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1))

    def forward(self, x):
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        normed = self.first(x)
        x = x + self.attention(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        return x + self.mlp(self.second(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.words = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, x):
        return self.words(self.norm(x))


class Counting(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, i):
        words = (torch.arange(CONTEXT + 1) * (1 + i % 7) + i) % WORDS
        return words[:-1], words[1:]


def loss(logits, target):
    time.sleep(0.005)  # of a larger model
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def told(report):
    print("step", report.step, "rank", report.rank, "of", report.world_size, "pid", os.getpid(), f"loss {report.loss:.3f}", flush=True)


pipeline = everstep.Pipeline(
    [Embedding, *[Block] * 8, Head], loss=loss, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    dataset=Counting(), batch=32, microbatch=4, clip=1.0, tied=[("0.words.weight", "9.words.weight")],
    memory=5 << 20, ledger="ledger")  # nodes that do not hold the model alone
pipeline.run(STEPS, on_step=told)
print(pipeline.plan, flush=True)
os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then
