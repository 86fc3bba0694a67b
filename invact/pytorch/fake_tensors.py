"""Fake tensors, which a probe runs the model on: without them each probe would be a real forward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from invact.pytorch.version_check import found, names_missing

try:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
except ImportError as _error:
    raise names_missing(_error) from _error

# What the mode does with an operation: without it nothing could be done before and after.
found(FakeTensorMode, "dispatch")

# The block in which operators take fake tensors for those on meta: a detached tensor would be looked up each time.
on_meta: Any = in_kernel_invocation_manager


def real(tensor: Tensor) -> bool:
    """Whether there is memory behind it, which simulated tensors have not."""
    return type(tensor) is not FakeTensor


__all__ = ["FakeTensor", "FakeTensorMode", "on_meta", "real"]
