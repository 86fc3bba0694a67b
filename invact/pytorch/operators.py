"""PyTorch's operators: those that are told from others, and what an operator says of itself."""

from __future__ import annotations

from typing import Any

import torch

from invact.pytorch.version_check import RELEASE, found

# The operation behind a change of dtype: copies of weights under autocast would be counted as activations.
cast_operation: Any = found(found(torch.ops.aten, "_to_copy"), "default")
found(cast_operation, "_schema")

# How C++ asks for a fake tensor's device, twice as often as it runs an operator: each time the long way round.
device_query: Any = found(found(torch.ops.prim, "device"), "default")

# The operator whose output needs no looking up.
detach_operator: Any = torch.ops.aten.detach.default

# What `tensor.item()` runs, which simulated tensors refuse: an optimizer that asks for a number could not be simulated.
item_operator: Any = found(found(torch.ops.aten, "_local_scalar_dense"), "default")


def schema_of(operator: Any) -> Any:
    """An operator's name and arguments, and which of them it changes in place; None of one of higher order."""
    return getattr(operator, "_schema", None)


def changed_arguments(operator: Any) -> list[int]:
    """The places of the arguments that an operator changes in place."""
    arguments = getattr(schema_of(operator), "arguments", [])
    return [n for n, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]


def has_fused_rms_norm(device: torch.device) -> bool:
    """Whether `F.rms_norm` is one kernel there: on a GPU from PyTorch 2.9 on, whichever build plans for it."""
    return device.type == "cuda" and RELEASE >= (2, 9)
