"""Hugging Face's GPT-2 on pipelines: kill -9 any of my ranks. everstep run --standalone --nproc-per-node 4 pipeline_gpt2.py

Takes GPT2LMHeadModel apart into what Pipeline wants, an ordered list of layers, and puts it together again in the end
(--save FOLDER, for from_pretrained). Nothing is downloaded: a small model is made, or --weights FOLDER is read; the text
is made here, or --text FILE is read. Needs transformers.
"""
import argparse
import os

import everstep
import torch
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

parser = argparse.ArgumentParser()
parser.add_argument("--weights", help="a folder that save_pretrained made, with its tokenizer")
parser.add_argument("--text", help="a file of UTF-8")
parser.add_argument("--save", help="a folder for the trained model")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--memory", type=int, help="MiB of a node; less than the model needs makes longer pipelines")
parser.add_argument("--dropout", type=float, default=0.1)
flags = parser.parse_args()
memory = flags.memory if flags.memory is not None else 0 if flags.weights else 7  # MiB: two nodes hold the small model


class Words(nn.Module):
    def __init__(self, gpt):
        super().__init__()
        self.wte, self.wpe, self.drop = gpt.wte, gpt.wpe, gpt.drop

    def forward(self, tokens):
        return self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1])))


class Block(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        out = self.block(x)  # without a mask its sdpa attention is causal
        return out[0] if isinstance(out, tuple) else out


class Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.ln_f, self.lm_head = model.transformer.ln_f, model.lm_head

    def forward(self, x):
        return self.lm_head(self.ln_f(x))


def apart(model):
    """The layers in order. The head's weight is the embedding's: Pipeline sees that and keeps them equal."""
    gpt = model.transformer
    return [Words(gpt), *map(Block, gpt.h), Head(model)]


def together(model, state):
    """Weights by layer, as Pipeline saves them, into the whole model."""
    last, whole = len(model.transformer.h) + 1, {}
    for key, value in state.items():
        layer, _, name = key.partition(".")
        if int(layer) == last:
            whole[name if name.startswith("lm_head") else f"transformer.{name}"] = value
        else:
            whole[f"transformer.{name}" if layer == "0" else f"transformer.h.{int(layer) - 1}.{name.removeprefix('block.')}"] = value
    model.load_state_dict(whole)
    return model


class Text(torch.utils.data.Dataset):
    """Pieces of `length` tokens, each with the tokens that follow."""

    def __init__(self, tokens, length):
        self.tokens, self.length = torch.tensor(tokens), length

    def __len__(self):
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, i):
        piece = self.tokens[i * self.length:(i + 1) * self.length + 1]
        return piece[:-1], piece[1:]


def model_and_text():
    torch.manual_seed(0)
    text = open(flags.text, encoding="utf-8").read() if flags.text else "".join(
        f"{n} and {n % 7} are {n + n % 7}. " for n in range(1000))
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), flags.dropout)
    if flags.weights:
        model = GPT2LMHeadModel.from_pretrained(flags.weights, local_files_only=True, attn_implementation="sdpa", **drops)
        tokens = AutoTokenizer.from_pretrained(flags.weights, local_files_only=True)(text)["input_ids"]
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=32, n_embd=64, n_layer=6, n_head=4, bos_token_id=None,
                                           eos_token_id=None, attn_implementation="sdpa", **drops))
        tokens = list(text.encode())
    return model, Text(tokens, min(model.config.n_positions, 128))


def loss(logits, target):
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def told(report):
    print("step", report.step, "rank", report.rank, "of", report.world_size, "pid", os.getpid(), f"loss {report.loss:.6f}", flush=True)


if __name__ == "__main__":
    model, text = model_and_text()
    pipeline = everstep.Pipeline(
        apart(model), loss=loss, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), dataset=text,
        batch=16, microbatch=2, clip=1.0, memory=memory << 20)
    weights = f"{flags.save}.pt" if flags.save else None
    pipeline.run(flags.steps, on_step=told, save=weights)
    print(pipeline.plan, flush=True)
    if weights and os.environ.get("RANK", "0") == "0":
        together(model_and_text()[0], torch.load(weights)).save_pretrained(flags.save)
        os.remove(weights)
    os._exit(0)  # an interpreter that ends beside gloo's threads is aborted now and then
