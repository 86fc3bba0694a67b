"""What the kernels promise: the gradient is as exact as y and one bit allow, for every value that there is."""

from __future__ import annotations

import pytest
import torch
from invact.kernels import CURVES, Curve, backward, forward, storage_order
from invact.kernels.pytorch import packed, sides, unpacked
from torch import Tensor

EVERY_CURVE = pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())
SHORT_DTYPES = (torch.bfloat16, torch.float16)


def every_value(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit type, in rising order."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(dtype)
    finite: Tensor = values[values.isfinite()]
    return finite.sort().values


def derivative_from_output(x: Tensor, curve: Curve) -> Tensor:
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
    key = (y.view(torch.int16).int() & 0xFFFF) + ((x.double() >= curve.x_min).int() << 16)
    _, group = key.unique(return_inverse=True)
    mass = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, weight)
    mean = torch.zeros_like(mass).index_add(0, group, weight * true) / mass
    best: Tensor = torch.where(mass[group] > 0, mean[group], true).to(x.dtype).double()
    return best


def norm(error: Tensor, weight: Tensor) -> float:
    return float((weight * error**2).sum().sqrt())


@EVERY_CURVE
@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
@pytest.mark.parametrize("deviation", [1.0, 3.0])
def test_16_bit_gradients_reach_the_floor_of_one_bit(curve: Curve, dtype: torch.dtype, deviation: float) -> None:
    x = every_value(dtype)
    y, weight = curve.f(x), weights(x, deviation)
    x, y, weight = (values[y.isfinite()] for values in (x, y, weight))
    true, ours = curve.derivative(x.double()), derivative_from_output(x, curve).double()
    best = floor(x, y, curve, weight)

    assert norm(ours - true, weight) <= 1.08 * norm(best - true, weight)
    likely = weight > 0
    assert (ours - true)[likely].abs().max() <= 2.1 * (best - true)[likely].abs().max()


@EVERY_CURVE
@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_no_finite_16_bit_value_gives_nan_or_infinity(curve: Curve, dtype: torch.dtype) -> None:
    x = every_value(dtype)
    x = x[curve.f(x).isfinite()]  # fp16 overflows inside some of stock's formulas
    assert derivative_from_output(x, curve).isfinite().all()


@EVERY_CURVE
def test_fp32_gradients_reach_the_floor_of_one_bit(curve: Curve) -> None:
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    true = curve.derivative(x.double())
    error = derivative_from_output(x, curve).double() - true
    assert error.norm() / true.norm() <= 2.6e-6
    assert error.abs().max() <= 4e-4


@EVERY_CURVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_away_from_the_minimum_are_exact_to_1e_5(curve: Curve, dtype: torch.dtype) -> None:
    x = torch.linspace(-120, 60, 1 << 18, dtype=dtype)
    x = x[(x - curve.x_min).abs() > 0.1]
    assert (derivative_from_output(x, curve).double() - curve.derivative(x.double())).abs().max() <= 1e-5


@EVERY_CURVE
def test_zeros_denormals_and_huge_values_behave_as_stock(curve: Curve) -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1e10, -1e10, 1e30, -1e30])
    torch.testing.assert_close(
        derivative_from_output(x, curve), curve.derivative(x.double()).float(), atol=1e-6, rtol=1e-6
    )


@EVERY_CURVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinities_and_nan_come_out_as_stocks_do(curve: Curve, dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype, requires_grad=True)
    y = curve.f(x)
    (stock,) = torch.autograd.grad(y, x, torch.ones_like(y))
    ours = derivative_from_output(x.detach(), curve)
    stock[2] = torch.nan  # hardswish: stock itself gives 1 or NaN, as the length of the tensor has it
    torch.testing.assert_close(ours, stock, equal_nan=True)


@EVERY_CURVE
def test_the_gradient_of_y_may_be_infinite_or_nan(curve: Curve) -> None:
    x = torch.tensor([2.0, 2.0, 2.0])
    y, side = forward(x, curve)
    dy = torch.tensor([torch.inf, -torch.inf, torch.nan])
    dx = backward(dy, y, side, curve, storage_order(y))
    torch.testing.assert_close(dx, dy, equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000])
def test_sides_take_one_bit_each_and_come_back(count: int) -> None:
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    assert packed(bits).shape == (-(-count // 8),)
    assert packed(bits).dtype == torch.uint8
    assert torch.equal(unpacked(packed(bits), count), bits)


def test_the_first_element_is_the_lowest_bit() -> None:
    assert packed(torch.tensor([True] + [False] * 8 + [True])).tolist() == [1, 2]


@EVERY_CURVE
@pytest.mark.parametrize("dtype", SHORT_DTYPES, ids=str)
def test_the_side_is_compared_with_the_minimum_itself_not_with_its_rounding(curve: Curve, dtype: torch.dtype) -> None:
    x = every_value(dtype)
    assert torch.equal(unpacked(sides(x, curve), x.numel()), x.double() >= curve.x_min)
