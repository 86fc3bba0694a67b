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

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "QuickGELU",
    "ReLU6",
    "SiLU",
    "Softplus",
    "Softsign",
    "SquaredReLU",
]


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


class QuickGELU(torch.nn.Module):
    """x sigmoid(1.702 x), inverted.

    >>> QuickGELU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1542,  0.0000,  0.8458])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.quick_gelu(input)


class ELU(torch.nn.ELU):
    """``torch.nn.ELU``, inverted.

    >>> ELU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.6321,  0.0000,  1.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.elu(input, self.alpha, self.inplace)


class CELU(torch.nn.CELU):
    """``torch.nn.CELU``, inverted.

    >>> CELU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.6321,  0.0000,  1.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.celu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU):
    """``torch.nn.SELU``, inverted.

    >>> SELU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.1113,  0.0000,  1.0507])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.selu(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """``torch.nn.LeakyReLU``, inverted.

    >>> LeakyReLU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.0100,  0.0000,  1.0000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """``torch.nn.Hardtanh``, inverted.

    >>> Hardtanh()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.,  0.,  1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """``torch.nn.ReLU6``, inverted.

    >>> ReLU6()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0., 0., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu6(input, self.inplace)


class Hardsigmoid(torch.nn.Hardsigmoid):
    """``torch.nn.Hardsigmoid``, inverted.

    >>> Hardsigmoid()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.3333, 0.5000, 0.6667])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.hardsigmoid(input, self.inplace)


class Softplus(torch.nn.Softplus):
    """``torch.nn.Softplus``, inverted.

    >>> Softplus()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.3133, 0.6931, 1.3133])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softplus(input, self.beta, self.threshold)


class LogSigmoid(torch.nn.LogSigmoid):
    """``torch.nn.LogSigmoid``, inverted.

    >>> LogSigmoid()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.3133, -0.6931, -0.3133])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.logsigmoid(input)


class Softsign(torch.nn.Softsign):
    """``torch.nn.Softsign``, inverted.

    >>> Softsign()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.5000,  0.0000,  0.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.softsign(input)


class SquaredReLU(torch.nn.Module):
    """relu(x)^2, inverted.

    >>> SquaredReLU()(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0., 0., 1.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.squared_relu(input)
