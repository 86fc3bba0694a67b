"""The numbers of a step function as tensors on a device, made once for each."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..own_thread import in_own_thread
from ..rounding import rounded_up
from .step_functions import KEPT_STEPS, Steps


@functools.lru_cache(KEPT_STEPS)
def values_on(steps: Steps, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values as a table."""
    return in_own_thread(lambda: torch.tensor(steps.values, dtype=dtype, device=device))


@functools.lru_cache(KEPT_STEPS)
def bounds_on(steps: Steps, device: torch.device) -> Tensor:
    """The bounds as numbers of fp32, from which on a number of fp32, fp16 or bf16 is beyond them."""
    rounded = [rounded_up(bound, torch.float32) for bound in steps.bounds]
    return in_own_thread(lambda: torch.tensor(rounded, dtype=torch.float32, device=device))
