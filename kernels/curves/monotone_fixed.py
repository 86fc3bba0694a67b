"""The monotone curves without parameters.

A new one is one entry here; CONTRIBUTING.md names what else it needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .monotone import Monotone, clamped, exponential_linear


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _one_above_zero(values: Tensor) -> Tensor:
    return torch.where(values <= 0, 0.0, torch.ones_like(values))


SELU = exponential_linear(
    # Klambauer et al., Self-Normalizing Neural Networks, arXiv 1706.02515. Loses what `elu` loses
    "selu",
    F.selu,
    alpha=1.6732632423543772848170429916717,
    scale=1.0507009873554804934193349852946,
)
RELU6 = clamped("relu6", 0.0, 6.0)
LOG_SIGMOID = Monotone(
    # log(sigmoid(x)), whose derivative is 1 - sigmoid(x); nothing is lost
    name="log_sigmoid",
    f=F.logsigmoid,
    derivative=lambda x: torch.sigmoid(-x),
    of_output=lambda y: -torch.expm1(y),
    rise=lambda y: -torch.exp(y),
)
SOFTSIGN = Monotone(
    # x / (1 + |x|), Bergstra et al., 2009; f' is lost where y nears 1 or -1, from |x| = 1 on
    name="softsign",
    f=F.softsign,
    derivative=lambda x: 1 / (1 + x.abs()).square(),
    of_output=lambda y: (1 - y.abs()).square(),
    rise=lambda y: -2 * (1 - y.abs()) * y.sign(),
)
HARDSIGMOID = Monotone(
    # relu6(x + 3) / 6, Courbariaux et al., arXiv 1511.00363; lost where y rounds to 1 although x is less than 3
    name="hardsigmoid",
    f=F.hardsigmoid,
    derivative=lambda x: torch.where((x > -3) & (x < 3), torch.full_like(x, 1 / 6), 0.0),
    of_output=lambda y: torch.where((y > 0) & (y < 1), torch.full_like(y, 1 / 6), 0.0),
    rise=torch.zeros_like,
    needs_exact_output=True,
)
SQUARED_RELU = Monotone(
    # relu(x)^2, So et al., Primer, arXiv 2109.08668; lost where the square falls below the dtype's least number or
    # grows beyond its largest
    name="squared_relu",
    f=_squared_relu,
    derivative=lambda x: 2 * x.clamp(min=0),
    of_output=lambda y: 2 * y.clamp(min=0).sqrt(),
    rise=lambda y: torch.where(y > 0, y.rsqrt(), 0.0),
)
# Stock PyTorch computes the derivatives of these three from their output already. They are here to be recognised where
# a model writes them out in other operations.
RELU = Monotone(
    # max(x, 0), Nair & Hinton, 2010
    name="relu",
    f=torch.relu,
    derivative=_one_above_zero,
    of_output=_one_above_zero,
    rise=torch.zeros_like,
)
SIGMOID = Monotone(
    # 1 / (1 + exp(-x))
    name="sigmoid",
    f=torch.sigmoid,
    derivative=lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    of_output=lambda y: y * (1 - y),
    rise=lambda y: 1 - 2 * y,
)
TANH = Monotone(
    # tanh(x)
    name="tanh",
    f=torch.tanh,
    derivative=lambda x: 1 / torch.cosh(x).square(),
    of_output=lambda y: 1 - y * y,
    rise=lambda y: -2 * y,
)
MONOTONE = (SELU, RELU6, LOG_SIGMOID, SOFTSIGN, HARDSIGMOID, SQUARED_RELU, RELU, SIGMOID, TANH)
