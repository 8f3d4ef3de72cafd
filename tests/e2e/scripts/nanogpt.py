# ruff: noqa: SIM115, PLW1508 - written as people write it
"""In the shape of nanoGPT's train.py: module-level code, env://, a checkpoint that rank 0 writes now and then."""

import ast
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

out_dir = "out"
max_iters = 60
checkpoint_interval = 5
batch_size = 8
learning_rate = 1e-3
backend = "gloo"
iter_seconds = 0.04
for arg in sys.argv[1:]:  # nanoGPT's configurator
    key, value = arg.removeprefix("--").split("=", 1)
    if key not in globals():
        raise ValueError(f"Unknown config key: {key}")
    try:
        globals()[key] = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        globals()[key] = value

ddp = int(os.environ.get("RANK", -1)) != -1
if ddp:
    dist.init_process_group(backend=backend)
    ddp_rank = int(os.environ["RANK"])
    ddp_local_rank = int(os.environ["LOCAL_RANK"])
    ddp_world_size = int(os.environ["WORLD_SIZE"])
    master_process = ddp_rank == 0
    seed_offset = ddp_rank
else:
    master_process, seed_offset, ddp_rank, ddp_world_size = True, 0, 0, 1

if master_process:
    os.makedirs(out_dir, exist_ok=True)
torch.manual_seed(1337 + seed_offset)
raw_model = nn.Sequential(nn.Embedding(64, 32), nn.Flatten(), nn.Linear(32 * 16, 64))
optimizer = torch.optim.AdamW(raw_model.parameters(), lr=learning_rate)
iter_num = 0
ckpt_path = os.path.join(out_dir, "ckpt.pt")
if os.path.exists(ckpt_path):
    checkpoint = torch.load(ckpt_path, map_location="cpu")
    raw_model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    iter_num = checkpoint["iter_num"]
model = DDP(raw_model) if ddp else raw_model

progress = open(os.environ["PROGRESS"], "a", buffering=1) if "PROGRESS" in os.environ else None
while iter_num < max_iters:
    began = time.time()
    x = torch.randint(64, (batch_size, 16))
    loss = nn.functional.cross_entropy(model(x), x[:, 0])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    iter_num += 1
    if master_process and iter_num % checkpoint_interval == 0:
        torch.save({"model": raw_model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": iter_num}, ckpt_path + ".tmp")
        os.replace(ckpt_path + ".tmp", ckpt_path)
    if progress:
        progress.write(f"{iter_num} {ddp_rank} {os.getpid()}\n")
    if master_process and iter_num % 10 == 0:
        print(f"iter {iter_num}: loss {loss.item():.4f}, time {(time.time() - began) * 1000:.2f}ms", flush=True)
    time.sleep(max(0.0, began + iter_seconds - time.time()))

if master_process:
    print(f"finished {iter_num} iterations on {ddp_world_size}", flush=True)
if ddp:
    dist.destroy_process_group()
