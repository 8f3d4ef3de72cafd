"""The model and text of docs/examples/pipeline_gpt2.py in a plain loop, whole, and how far a trained folder is from it.

gpt2_whole.py EXAMPLE STEPS FOLDER: prints JSON: losses by step; `weights`: the largest difference of a weight from
FOLDER's; `moved`: how far the loop itself moved weights, at most.
"""

import json
import runpy
import sys

import torch
from everstep import _samples
from transformers import GPT2LMHeadModel

example, steps, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
sys.argv = [example, "--dropout", "0"]
made = runpy.run_path(example)
model, text = made["model_and_text"]()
first = {name: value.clone() for name, value in model.state_dict().items()}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
losses = []
for step in range(steps):
    indices = _samples.share(step, samples=len(text), batch=16, rank=0, world=1).indices
    given = torch.stack([text[i][0] for i in indices])
    target = torch.stack([text[i][1] for i in indices])
    loss = made["loss"](model(given).logits, target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
saved = GPT2LMHeadModel.from_pretrained(folder).state_dict()
now = model.state_dict()
assert saved.keys() == now.keys()
print(json.dumps({"losses": losses, "weights": max((saved[k] - now[k]).abs().max().item() for k in now),
                  "moved": max((now[k] - first[k]).abs().max().item() for k in now),
                  "each": {k: (saved[k] - now[k]).abs().max().item() for k in now}}))
