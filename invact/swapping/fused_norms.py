"""The class of a module that computes a norm in steps, with its forward run by the fused operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from invact.recognition.fused_rms_norm import Fusion
from invact.swapping.class_over import class_over, shared_class
from invact.swapping.patched import Patched, is_patched
from invact.swapping.planned_device import planned_device


def fused_class(stock: type[nn.Module], fusion: Fusion) -> type:
    """Of a module of the class `stock` whose norm is run so."""
    return shared_class(stock, fusion, lambda: class_over(stock, Patched, {"forward": _forward(stock, fusion)}, ()))


def _forward(stock: type[nn.Module], fusion: Fusion) -> Callable[..., Any]:
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs and is_patched(self) else None
        if isinstance(x, Tensor) and fusion.applies(self, x, planned_device() or x.device):
            return fusion(self, x)
        return stock.forward(self, *args, **kwargs)

    return forward
