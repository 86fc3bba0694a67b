"""What is at work around an operation: torch.func, derivatives taken forward, autocast, hooks on all modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from invact.pytorch.version_check import found

# Whether torch.func (vmap, grad, jvp) is at work: inverted functions would give wrong gradients there.
transforms_active: Callable[[], bool] = found(torch._C, "_are_functorch_transforms_active")
found(forward_ad, "_current_level")

# Whether autocast is on for any device, in one question: several would cost as much as a small recipe.
autocast_anywhere: Callable[[], bool] = found(torch._C, "_is_any_autocast_enabled")
_all_modules_forward_hooks: dict[int, Any] = found(torch_module, "_global_forward_hooks")


def forward_ad_active() -> bool:
    """Whether derivatives are taken forward: inverted functions would give none."""
    return bool(forward_ad._current_level >= 0)


def hooks_on_all_modules() -> bool:
    """Whether forward hooks are registered for every module there is: what they change of an output would go unseen."""
    return bool(_all_modules_forward_hooks)
