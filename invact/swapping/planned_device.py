"""The device that is planned for, where other tensors stand in for those on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_THREAD = threading.local()


@contextmanager
def as_on(device: torch.device) -> Iterator[None]:
    """What is inverted or fused inside is what would be on this device, whatever tensors stand in for those on it."""
    outside = planned_device()
    _THREAD.device = device
    try:
        yield
    finally:
        _THREAD.device = outside


def planned_device() -> torch.device | None:
    """That of `as_on`, or None where no other is planned for than the one that the tensors lie on."""
    return getattr(_THREAD, "device", None)
