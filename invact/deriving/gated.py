"""A gated product, ``act(g) * u``: made again together with act(g), in one pass, where there is a kernel for that.

Backward asks for the product first, for the layer behind it, and then for act(g), for the product's own gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from invact.deriving.handles import Derived
from invact.kernels.gated import gated

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


class GatedProduct(Derived):
    """A product of a tensor and an activation that is itself derived.

    Attributes:
        activation: which, by its name in `invact.kernels.gated`.
        place: where among the factors it stands.
    """

    __slots__ = ("activation", "place")

    def __init__(self, product: Derived, place: int, activation: str) -> None:
        super().__init__(product.make, product.sources, product.joins, product.moves)
        self.place, self.activation = place, activation

    def made(self) -> Tensor:
        if self.shared is not None and (tensor := self.shared.taken()) is not None:
            return tensor
        activated, other = self.sources[self.place], self.sources[1 - self.place]
        assert isinstance(activated, Derived)
        # Where something else has asked for act(g) first, it is there.
        a = None if activated.shared is None else activated.shared.taken()
        if a is None:
            g, u = activated.sources[0].made(), other.made()
            as_usual = activated.stride is None or activated.stride == g.stride()
            both = gated(g, u, self.activation) if as_usual else None
            if both is not None:
                activated.finished(both[0])
                return self.finished(both[1])
            a = activated.finished(activated.make(g))
        else:
            u = other.made()
        return self.finished(self.make(*((u, a) if self.place else (a, u))))


def gated_if_it_is(product: Derived) -> Derived:
    """The recipe of a product, as that of a gated one if it is one."""
    if len(product.sources) == 2 and product.sources[0] is not product.sources[1]:
        for place, factor in enumerate(product.sources):
            if isinstance(factor, Derived) and (activation := _activation(factor.make)):
                return GatedProduct(product, place, activation)
    return product


def _activation(make: Callable[..., Tensor]) -> str | None:
    if make is F.silu:
        return "silu"
    if isinstance(make, functools.partial) and make.func is F.gelu:
        return _GELUS.get(make.keywords["approximate"])
    return None
