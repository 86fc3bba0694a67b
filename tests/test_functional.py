"""The public operators: stock's forward bit for bit, stock's layouts, and one tensor and the curve's bits kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from curves_and_pairs import ALL_CURVES, EVERY_CURVE, VIEWS, Operator, kept
from torch import Tensor

from invact import functional
from invact.kernels import Curve
from invact.kernels.curves.two_sided import TwoSided

PAIRS: dict[str, tuple[Operator, Operator]] = {
    "gelu": (functional.gelu, F.gelu),
    "gelu_tanh": (lambda x: functional.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": (functional.silu, F.silu),
    "mish": (functional.mish, F.mish),
    "hardswish": (functional.hardswish, F.hardswish),
    "elu": (lambda x: functional.elu(x, 0.7), lambda x: F.elu(x, 0.7)),
    "celu": (lambda x: functional.celu(x, 2.0), lambda x: F.celu(x, 2.0)),
    "selu": (functional.selu, F.selu),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2)),
    "hardtanh": (lambda x: functional.hardtanh(x, -0.3, 0.7), lambda x: F.hardtanh(x, -0.3, 0.7)),
    "relu6": (functional.relu6, F.relu6),
    "hardsigmoid": (functional.hardsigmoid, F.hardsigmoid),
    "softplus": (lambda x: functional.softplus(x, 2.0), lambda x: F.softplus(x, 2.0)),
    "softplus_jumping": (lambda x: functional.softplus(x, 2.0, 1.5), lambda x: F.softplus(x, 2.0, 1.5)),
    "logsigmoid": (functional.logsigmoid, F.logsigmoid),
    "softsign": (functional.softsign, F.softsign),
    "squared_relu": (functional.squared_relu, lambda x: F.relu(x).square()),
}
EVERY_PAIR = pytest.mark.parametrize(("ours", "stock"), PAIRS.values(), ids=PAIRS.keys())


@EVERY_PAIR
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_forward_is_stocks_bit_for_bit_and_gradients_lie_as_stocks_do(
    images: Tensor, ours: Operator, stock: Operator, dtype: torch.dtype, view: Operator
) -> None:
    x, x_stock = (view(images.to(dtype)).detach().requires_grad_() for _ in range(2))
    y, y_stock = ours(x), stock(x_stock)
    assert torch.equal(y, y_stock)
    assert y.stride() == y_stock.stride()

    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(dy)
    y_stock.backward(dy)
    assert x.grad is not None
    assert x_stock.grad is not None
    assert x.grad.stride() == x_stock.grad.stride()
    tolerance = 0.05 if dtype.itemsize == 2 else 1e-3
    torch.testing.assert_close(x.grad, x_stock.grad, atol=tolerance, rtol=tolerance)


@EVERY_CURVE
def test_exactly_y_and_the_bits_of_the_curve_are_kept(curve: Curve, images: Tensor) -> None:
    x = images.requires_grad_()
    y, side = kept(lambda x: functional.invert(x, curve), x)
    assert torch.equal(y, curve.f(x))
    assert side.dtype == torch.uint8
    assert side.numel() == (-(-x.numel() // 8) if curve.has_side else 0)
    assert side.untyped_storage().nbytes() == side.numel()


@EVERY_CURVE
def test_nothing_is_kept_where_no_gradient_is_asked_for(curve: Curve, images: Tensor) -> None:
    assert kept(lambda x: functional.invert(x, curve), images) == []
    with torch.no_grad():
        y = functional.invert(images.requires_grad_(), curve)
    assert torch.equal(y, curve.f(images))
    assert not y.requires_grad


@EVERY_CURVE
def test_first_and_second_derivatives_agree_with_finite_differences(curve: Curve) -> None:
    x = torch.tensor([-6.2, -4.1, -2.6, -1.9, -1.2, -0.4, 0.2, 0.9, 1.4, 2.7, 4.0, 9.0], dtype=torch.float64)
    x.requires_grad_()
    torch.autograd.gradcheck(lambda x: functional.invert(x, curve), x)
    torch.autograd.gradgradcheck(lambda x: functional.invert(x, curve), x, atol=1e-4)


@EVERY_CURVE
def test_a_third_derivative_says_that_it_is_not_supported(curve: Curve) -> None:
    x = torch.tensor([0.5], requires_grad=True)
    (first,) = torch.autograd.grad(functional.invert(x, curve), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivative"):
        torch.autograd.grad(second, x)


@EVERY_CURVE
def test_second_derivatives_stay_finite_at_the_minimum_and_in_the_tails(curve: Curve) -> None:
    turn = curve.x_min if isinstance(curve, TwoSided) else 0.0
    x = torch.tensor([turn, -1e30, -200.0, -90.0, -0.0, 1e18], requires_grad=True)
    (first,) = torch.autograd.grad(functional.invert(x, curve).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.isfinite().all()


@EVERY_CURVE
def test_functional_transforms_give_the_right_gradients(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 35, dtype=torch.float64).view(5, 7)
    expected = curve.derivative(x)

    def total(x: Tensor) -> Tensor:
        return functional.invert(x, curve).sum()

    by_rows = torch.func.vmap(torch.func.grad(total), in_dims=1, out_dims=1)(x)
    jacobian = torch.func.jacrev(lambda x: functional.invert(x, curve))(x)
    for gradient in (torch.func.grad(total)(x), by_rows, jacobian.view(35, 35).diagonal().view(5, 7)):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


@EVERY_CURVE
def test_forward_mode_gives_the_right_derivatives(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 7, dtype=torch.float64).requires_grad_()
    with torch.autograd.forward_ad.dual_level():
        y = functional.invert(torch.autograd.forward_ad.make_dual(x, torch.full_like(x, 3.0)), curve)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, 3 * curve.derivative(x.detach()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "curve", [curve for curve in ALL_CURVES if curve.name != "hardsigmoid"], ids=str
)  # stock's own has no forward mode to compare with
def test_hessians_mix_forward_and_reverse_mode(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 7, dtype=torch.float64)
    ours, stock = (
        torch.func.hessian(lambda x, f=f: f(x).square().sum())(x)
        for f in (lambda x: functional.invert(x, curve), curve.f)
    )
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)


@EVERY_CURVE
def test_vectorized_jacobians_are_those_of_a_loop(curve: Curve) -> None:
    x = torch.linspace(-2.9, 2.85, 7)
    jacobian = torch.autograd.functional.jacobian(lambda x: functional.invert(x, curve), x, vectorize=True)
    torch.testing.assert_close(jacobian.diagonal(), curve.derivative(x.double()).float(), atol=1e-5, rtol=1e-5)
