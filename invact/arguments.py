"""What the public functions are given: checked, so that bad input gets one clear error."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from invact.pytorch_inside import tree_leaves

Inputs = tuple[Any, ...] | dict[str, Any]
"""How a model is called: a dict holds keyword arguments, a tuple positional ones."""


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"invact needs a torch.nn.Module, but got {type(model).__name__}. "
            "Pass the model itself, for example `trainer.model`."
        )
    check_not_sharded(model)


def check_not_sharded(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    if any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(
            "This model is already sharded by FSDP, whose own hooks can not run in a trial forward pass. "
            "Patch it first and shard it afterwards: the inverted activations stay."
        )


def check_shapes_known(model: nn.Module) -> None:
    """Refuses a model with lazy layers that have seen no input: a simulated one would fix their shapes.

    Raises:
        ValueError: names the first parameter or buffer without a shape.
    """
    for path, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"`{path}` has no shape yet, since its lazy layer takes that from the first input it sees: run the "
                "model once on real inputs first."
            )


def check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, (tuple, dict)):
        raise TypeError(
            f"example_inputs is a {type(inputs).__name__}, but it must say how the model is called. Pass a tuple of "
            "positional arguments, such as `(x,)`, or a dict of keyword arguments, such as `dict(input_ids=...)`."
        )
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise TypeError(
                "example_inputs holds a complex tensor, and a pointwise activation of complex numbers is not "
                "invertible by one bit. Pass inputs of a real floating dtype."
            )


def check_autocast(autocast: Any) -> None:
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(
            f"autocast is {autocast!r}, but torch.autocast trains in one of two dtypes. "
            "Pass torch.bfloat16, torch.float16 or None."
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model is; a model on meta is planned for a GPU."""
    tensor = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    return torch.device("cuda") if tensor.is_meta else tensor.device
