"""Modes, which see every tensor operation of a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from invact.pytorch.version_check import found, names_missing

try:
    # Without them no time limit, no casts of weights told from activations, no record of what made what.
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
except ImportError as _error:
    raise names_missing(_error) from _error

# Turns off what changes operations by their Python names, such as a default device: snapshots would land there.
_no_torch_function: Callable[[], Any] = found(torch._C, "DisableTorchFunction")


@contextmanager
def modes_off() -> Iterator[None]:
    """Tensor operations in the block are real and as written: no mode sees them, no default device moves them."""
    with _no_torch_function(), _disable_current_modes():
        yield


__all__ = ["TorchDispatchMode", "modes_off"]
