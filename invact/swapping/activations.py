"""The class of a module that computes an activation, with its forward inverted or approximated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from invact.swapping.approximation import Approximation
from invact.swapping.class_over import class_over, shared_class
from invact.swapping.inversion import Inversion, Inverted
from invact.swapping.patched import Patched, PatchedSite


def activation_class(stock: type[nn.Module], how: Inversion | Approximation) -> type:
    """Of a module of the class `stock` whose forward is run so."""
    first = Inverted if isinstance(how, Inversion) else Patched
    site = PatchedSite("", str(how.curve), how.bits)
    return shared_class(stock, how, lambda: class_over(stock, first, {"forward": _forward(stock, how)}, (site,)))


def _forward(stock: type[nn.Module], how: Inversion | Approximation) -> Callable[..., Any]:
    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Who holds on to this method may call it when the module has its own class again.
        ours = isinstance(self, Patched)
        if ours and len(args) == 1 and not kwargs and how.applies(self, args[0]):
            return how(args[0])
        return stock.forward(self, *args, **kwargs)

    return forward
