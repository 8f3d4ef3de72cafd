"""A Hugging Face Trainer on a tiny GPT-2 with dropout; everstep.hf keeps its state. Argument: a folder for files."""

import os
import sys
import time

import torch
from everstep.hf import EverstepCallback
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


def tell(*words: object) -> None:
    """A line of its own, whatever the other ranks write."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 80

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(64, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


class Told(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs) -> None:  # type: ignore[no-untyped-def]
        time.sleep(0.05)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if logs and "loss" in logs:
            tell("step", state.global_step, os.getpid(), float(logs["loss"]).hex())


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(output_dir=sys.argv[1] + ".out", per_device_train_batch_size=4 // world, num_train_epochs=3,
                                  learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
                                  disable_tqdm=True, seed=7)
    callback = EverstepCallback(directory=sys.argv[1], mode="auto", replicated=False)
    trainer = Trainer(model, arguments, train_dataset=Data(), callbacks=[callback, Told()])
    trainer.train(resume_from_checkpoint=callback.resume())
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tell("end", callback.stats().tier, len(history), sum(history).hex(),
         sum(p.double().sum().item() for p in model.parameters()).hex())


if __name__ == "__main__":
    main()
