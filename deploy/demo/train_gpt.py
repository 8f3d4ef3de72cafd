"""A byte-level GPT trained with DistributedDataParallel on the Python standard library's own sources.

A stock script: it knows torch.distributed's environment and nothing of who started it. The two lines
that mention everstep make its state survive; without an agent (under torchrun, say) they only warn.

    torchrun     --standalone --nproc-per-node 2 deploy/demo/train_gpt.py --steps 20
    everstep run --standalone --nproc-per-node 2 deploy/demo/train_gpt.py --steps 20

Deterministic: the same world size gives the same weights, however often the job was interrupted.
The batch of a step is a function of (seed, step, rank) alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sysconfig
import time
from pathlib import Path

import everstep
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Block(nn.Module):
    """Pre-norm transformer block: [batch, time, width] -> the same shape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (
            y.view(b, t, self.heads, w // self.heads).transpose(1, 2)
            for y in self.qkv(self.norm1(x)).split(w, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes [batch, time] int64 -> logits [batch, time, 256]."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def load_text(limit: int = 4 << 20) -> Tensor:
    """The standard library's sources, one tensor of bytes; the same on every node with this Python."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data = path.read_bytes()
        parts.append(data)
        size += len(data)
        if size >= limit:
            break
    return torch.frombuffer(bytearray(b"".join(parts)[:limit]), dtype=torch.uint8)


def get_batch(text: Tensor, step: int, rank: int, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed((args.seed << 40) + step * 1024 + rank)
    at = torch.randint(len(text) - args.context - 1, (args.batch,), generator=generator)
    rows = torch.stack([text[i : i + args.context + 1] for i in at.tolist()]).long()
    return rows[:, :-1], rows[:, 1:]


def weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank and step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trace", type=Path, help="append one JSON line a step and rank to this file")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    text = load_text()
    # DDP lays its buckets anew after a process's first step, and with three ranks the order of a sum depends on the
    # bucket: with find_unused_parameters it does not, so a step gives the same bits whenever its process was started.
    model = DistributedDataParallel(GPT(args.width, args.layers, args.heads, args.context), find_unused_parameters=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    trace = args.trace.open("a", buffering=1) if args.trace else None

    checkpoint = everstep.Checkpointer({"model": model.module, "optimizer": optimizer, "scheduler": scheduler})
    start = checkpoint.restore()
    if rank == 0:
        size = sum(p.numel() for p in model.parameters())
        print(f"{size / 1e6:.1f} M parameters, world size {world}, from step {start}", flush=True)

    for step in range(start, args.steps):
        began = time.time()
        tokens, targets = get_batch(text, step, rank, args)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        checkpoint.step(step)
        if trace:
            entry = {"step": step, "rank": rank, "loss": loss.item(), "began": began, "ended": time.time(), "pid": os.getpid()}
            trace.write(json.dumps(entry) + "\n")
        if rank == 0 and step % 10 == 0:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)

    checkpoint.close()
    if rank == 0:
        print(f"done: {args.steps} steps, weights {weights_hash(model.module)}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
