"""How exact a curve's gradient is: every value of a 16-bit type, the floor that y and its bits set, and distances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from invact.kernels import Curve, backward, forward, storage_order

SHORT_DTYPES = (torch.bfloat16, torch.float16)


def every_value(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit type, in rising order."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    finite: Tensor = values[values.isfinite()]
    return finite.sort().values


def derivative_from_output(x: Tensor, curve: Curve) -> Tensor:
    """f' of x as the kernels work it out on the device of x."""
    y, side = forward(x, curve)
    dx: Tensor = backward(torch.ones_like(y), y, side, curve, storage_order(y))
    return dx


def weights(x: Tensor, deviation: float) -> Tensor:
    """The probability of each of a list of rising values, for x ~ N(0, deviation^2) rounded to them."""
    wide = x.double()
    middles = (wide[1:] + wide[:-1]) / 2
    cumulative = torch.special.ndtr(torch.cat([middles, torch.tensor([torch.inf]).double()]) / deviation)
    probabilities: Tensor = cumulative.diff(prepend=torch.zeros(1, dtype=torch.float64)).clamp(min=0)
    return probabilities


def floor(x: Tensor, y: Tensor, curve: Curve, weight: Tensor) -> Tensor:
    """The best that y and one bit allow: the mean true derivative of the x that share them, rounded to the dtype."""
    true = curve.derivative(x.double())
    kind = torch.int16 if y.dtype.itemsize == 2 else torch.int32
    key = 2 * y.view(kind).long() + (x.double() >= curve.x_min)
    _, group = key.unique(return_inverse=True)
    mass = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, weight)
    mean = torch.zeros_like(mass).index_add(0, group, weight * true) / mass
    best: Tensor = torch.where(mass[group] > 0, mean[group], true).to(x.dtype).double()
    return best


def norm(error: Tensor, weight: Tensor) -> float:
    return float((weight * error**2).sum().sqrt())


def stock_gradient(x: Tensor, curve: Curve) -> Tensor:
    x = x.detach().requires_grad_()
    y = curve.f(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def ulps(ours: Tensor, stock: Tensor) -> Tensor:
    """How many numbers of the dtype lie between two of the same sign."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]

    def place(values: Tensor) -> Tensor:
        number = values.contiguous().view(kind).long()
        return torch.where(number < 0, -(number & torch.iinfo(kind).max), number)

    return (place(ours) - place(stock)).abs()


def step_of(values: Tensor) -> Tensor:
    """The distance to the next larger number of the dtype, at least that between the smallest ones; float64."""
    next_larger = torch.nextafter(values.abs(), torch.full_like(values, torch.inf))
    return next_larger.double() - values.abs().double()


class Errors(NamedTuple):
    """Of gradients: the norm under the weights, and the largest where x may be at all."""

    norm: float
    largest: float


def errors_and_floors(x: Tensor, y: Tensor, ours: Tensor, curve: Curve, deviation: float) -> tuple[Errors, Errors]:
    """The errors of 16-bit gradients for x ~ N(0, deviation^2), and those of the best that y and one bit allow."""
    weight, true = weights(x, deviation), curve.derivative(x.double())
    best, likely = floor(x, y, curve, weight), weight > 0
    found, least = (
        Errors(norm(values - true, weight), float((values - true)[likely].abs().max()))
        for values in (ours.double(), best)
    )
    return found, least
