"""`invact.nn` and the operators in place: drop-in for stock's modules, compiled or not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curves_and_pairs import kept
from torch import Tensor

import invact.nn
from invact import functional
from invact.kernels import CURVES, Curve
from invact.kernels.curves import monotone_families


def test_changing_y_in_place_is_found_out(images: Tensor) -> None:
    y = functional.gelu(images.requires_grad_())
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("curve", "dtype"),
    [
        (CURVES["gelu"], torch.float32),
        (CURVES["gelu_tanh"], torch.bfloat16),
        (CURVES["hardswish"], torch.float32),
        (monotone_families.elu(0.7), torch.float32),
        (monotone_families.softplus(2.0, 5.0), torch.float32),
    ],
    ids=str,
)
def test_torch_compile_gives_the_same_and_keeps_the_same(curve: Curve, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    x, x_eager = (torch.linspace(-5, 5, 35).view(5, 7).to(dtype).requires_grad_() for _ in range(2))
    compiled = torch.compile(lambda x: functional.invert(x, curve), fullgraph=True)
    assert sum(t.nbytes for t in kept(compiled, x)) <= x.nbytes + 8

    y, y_eager = compiled(x), functional.invert(x_eager, curve)
    y.backward(torch.ones_like(y))
    y_eager.backward(torch.ones_like(y))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y, y_eager, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(x.grad, x_eager.grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    "module",
    [invact.nn.GELU(), invact.nn.Hardswish(), invact.nn.ELU(0.7), invact.nn.Hardtanh()],
    ids=str,
)
def test_modules_compile_whole_with_every_number_dynamic(module: torch.nn.Module) -> None:
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(7, 7), module)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    x, x_eager = (torch.linspace(-5, 5, 35).view(5, 7).requires_grad_() for _ in range(2))
    compiled(x).square().sum().backward()
    model(x_eager).square().sum().backward()
    torch.testing.assert_close(x.grad, x_eager.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("module", "stock"),
    [
        (invact.nn.GELU(), torch.nn.GELU()),
        (invact.nn.GELU(approximate="tanh"), torch.nn.GELU(approximate="tanh")),
        (invact.nn.SiLU(inplace=True), torch.nn.SiLU()),
        (invact.nn.Mish(inplace=True), torch.nn.Mish()),
        (invact.nn.Hardswish(inplace=True), torch.nn.Hardswish()),
        (invact.nn.ELU(0.7, inplace=True), torch.nn.ELU(0.7)),
        (invact.nn.CELU(2.0), torch.nn.CELU(2.0)),
        (invact.nn.SELU(inplace=True), torch.nn.SELU()),
        (invact.nn.LeakyReLU(0.2, inplace=True), torch.nn.LeakyReLU(0.2)),
        (invact.nn.Hardtanh(-0.3, 0.7), torch.nn.Hardtanh(-0.3, 0.7)),
        (invact.nn.ReLU6(inplace=True), torch.nn.ReLU6()),
        (invact.nn.Hardsigmoid(), torch.nn.Hardsigmoid()),
        (invact.nn.Softplus(2, 5), torch.nn.Softplus(2, 5)),
        (invact.nn.LogSigmoid(), torch.nn.LogSigmoid()),
        (invact.nn.Softsign(), torch.nn.Softsign()),
    ],
    ids=str,
)
def test_modules_are_drop_in_and_work_in_place_where_asked(
    module: torch.nn.Module, stock: torch.nn.Module, images: Tensor
) -> None:
    expected = stock(images)
    assert isinstance(module, type(stock))
    x = images.clone().requires_grad_() * 1.0
    y = module(x)
    assert torch.equal(y, expected)
    in_place = getattr(module, "inplace", False)
    assert (y is x) == in_place
    x = images.clone()
    assert torch.equal(module(x), expected)
    assert torch.equal(x, expected if in_place else images)


@pytest.mark.parametrize(
    "function",
    [functional.silu, functional.mish, functional.hardswish, functional.elu, functional.leaky_relu, functional.relu6],
)
def test_in_place_the_gradient_is_the_one_out_of_place(function: Callable[..., Tensor], images: Tensor) -> None:
    gradients = []
    for inplace in (False, True):
        x = images.clone().requires_grad_()
        function(x * 1.0, inplace=inplace).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_forward_mode_in_place_says_that_it_is_not_supported() -> None:
    x = torch.randn(8, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="in place is not supported"):
            functional.silu(dual * 1.0, inplace=True)


def test_in_place_on_a_view_changes_what_it_is_a_view_of() -> None:
    gradients = []
    for function in (F.silu, functional.silu):
        x = torch.linspace(-3, 3, 32).requires_grad_()
        whole = (x * 1.0).view(4, 8)
        part = whole[:, :3]
        assert function(part, inplace=True) is part
        assert torch.equal(part, F.silu(x.view(4, 8)[:, :3]))
        whole.square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
