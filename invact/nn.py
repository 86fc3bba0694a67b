"""Modules for models you write yourself: those of torch.nn, keeping their output for backward instead of their input.

    >>> import torch, invact.nn
    >>> block = torch.nn.Sequential(torch.nn.Linear(8, 32), invact.nn.GELU(), torch.nn.Linear(32, 8))
    >>> block(torch.randn(4, 8)).shape
    torch.Size([4, 8])

Each is a subclass of the stock module where there is one, takes the same arguments, and has no parameters or state, so
that checkpoints load either way. What they take, give and raise is said in `invact.functional`.
"""

from __future__ import annotations

import torch.nn
from torch import Tensor

from invact import functional

__all__ = ["GELU", "Hardswish", "Mish", "QuickGELU", "SiLU"]


class GELU(torch.nn.GELU):
    """``torch.nn.GELU``, inverted. `approximate` is "none" or "tanh".

    >>> GELU(approximate="tanh")(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1588,  0.0000,  0.8412])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, self.approximate)


class SiLU(torch.nn.SiLU):
    """``torch.nn.SiLU``, inverted.

    >>> SiLU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.2689,  0.0000,  0.7311])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class QuickGELU(torch.nn.Module):
    """x sigmoid(1.702 x), inverted.

    >>> QuickGELU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1542,  0.0000,  0.8458])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input)


class Mish(torch.nn.Mish):
    """``torch.nn.Mish``, inverted.

    >>> Mish()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.3034,  0.0000,  0.8651])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.mish(input, self.inplace)


class Hardswish(torch.nn.Hardswish):
    """``torch.nn.Hardswish``, inverted.

    >>> Hardswish()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.3333,  0.0000,  0.6667])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardswish(input, self.inplace)
