"""Run me any way you like and kill -9 me: everstep run ... train.py, torchrun ... train.py, or python train.py, again and again."""
import os
import time

import everstep
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 600), torch.nn.Dropout(0.1), torch.nn.Linear(600, 600), torch.nn.Linear(600, 1))
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters())
checkpoint = everstep.Checkpointer({"model": model, "optimizer": optimizer}, directory="checkpoints", mode="auto", replicated=False)
for step in range(checkpoint.restore(), 60):
    loss = model(torch.rand(8, 16)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    checkpoint.step(step)
    print("step", step, os.getpid(), flush=True)
    time.sleep(0.02)
print("end", checkpoint.tier, loss.item().hex(), sum(p.double().sum().item() for p in model.parameters()).hex(), flush=True)
