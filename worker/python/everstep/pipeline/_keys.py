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
    """The CPU's generator, and every device's that is in use."""
    torch.manual_seed(value)


def set_all(value: int) -> None:
    """Python's and numpy's, too: for what a dataset draws."""
    torch.manual_seed(value)
    random.seed(value)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(value % (1 << 32))
