"""Random streams keyed by what they are for, so that they do not depend on who computes it."""

from __future__ import annotations

import random
import sys

import torch

from everstep._samples import mix

INIT, DATA = -1, -2  # in place of a layer


def key(seed: int, *numbers: int) -> int:
    """63 bits from (seed, numbers...)."""
    value = mix(seed & (1 << 64) - 1)
    for number in numbers:
        value = mix(value ^ (number & (1 << 64) - 1))
    return value >> 1


def set_torch(value: int) -> None:
    """The CPU's generator, and CUDA's where it is in use. Not torch.manual_seed(): that notes the stack at each call,
    for devices that are not."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def set_all(value: int) -> None:
    """Python's and numpy's, too: for what a dataset draws."""
    set_torch(value)
    random.seed(value)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(value % (1 << 32))
