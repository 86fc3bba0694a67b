"""What a model keeps for backward as it is, without a plan."""

from __future__ import annotations

import torch
from torch import nn

from invact.errors.checks import Inputs, check_autocast, check_inputs, check_model, check_trainable_here
from invact.ledger.entries import Memory
from invact.probing.probe import observe
from invact.simulation.autocast import autocast_here
from invact.simulation.setting import Setting, device_of


def activation_memory(model: nn.Module, example_inputs: Inputs, *, autocast: torch.dtype | None = None) -> Memory:
    """What autograd keeps for backward in one training forward pass of `model`, by module and by class.

    The pass runs on fake tensors and leaves the model as it was; see `observe`.

    Args:
        model: counted in the mode in which it is, training or evaluation, on the device where it is.
        example_inputs: a dict is passed as keyword arguments, a tuple as positional ones.
        autocast: the dtype of torch.autocast in training, or None: as it is where this is called.

    Raises:
        TypeError: the model is no module or the inputs are neither dict nor tuple.
        ValueError: the model can not be trained as it is here; see `invact.plan`.
        TimeoutError: the pass takes longer than `invact.probing.TIME_LIMIT`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> activation_memory(model, (torch.randn(8, 64),)).by_class
        {'Linear': 10240, 'GELU': 8192}
    """
    check_model(model)
    check_trainable_here(model)
    check_inputs(example_inputs)
    check_autocast(autocast)
    device = device_of(model)
    return observe(model, example_inputs, Setting(device, autocast or autocast_here(device))).memory
