"""An activation whose derivative is approximate, in a few bits an element: where it is, and where stock code runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invact.inverting.few_bits import few_bits, may_approximate
from invact.kernels import Curve
from invact.recognition.dependencies import Dependencies


@dataclass(frozen=True)
class Approximation:
    """How the derivative at a site is approximated; see `invact.inverting.few_bits`.

    Attributes:
        curve, dependencies: as of an `Inversion`.
        bits: kept per element, 1 to 4.
        in_place: the output takes the memory of the input.
    """

    curve: Curve
    dependencies: Dependencies
    bits: int
    in_place: bool = False

    def applies(self, module: nn.Module, x: Any) -> bool:
        """Whether `x` is to be computed here and not by the stock code."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout is not torch.strided:
            return False
        return may_approximate(x) and self.dependencies.unchanged(module)

    def __call__(self, x: Tensor) -> Tensor:
        return few_bits(x, self.curve, self.bits, self.in_place)
