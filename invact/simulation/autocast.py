"""torch.autocast: as it is where one asks, and as a setting has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from invact.simulation.setting import Setting, stand_in


def autocast_here(device: torch.device) -> torch.dtype | None:
    """The dtype of the torch.autocast for `device` inside which this is called, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextmanager
def autocast_as_set(setting: Setting) -> Iterator[None]:
    """torch.autocast, which switches itself off where the device it is for is missing; this does not."""
    device = stand_in(setting.device).type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    if setting.autocast is not None:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, setting.autocast)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()  # of casts of simulated weights: a block of the caller's would keep them
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)
