"""Curves of a program's own: registered, recognised in models and inverted; wrong ones are refused with one reason."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import invact
from invact.inverting.autograd_functions import invert
from invact.kernels import CURVES, Curve, Monotone, dispatch, register, unregister
from invact.kernels.curves import registering
from invact.kernels.curves.catalogue import OURS
from invact.recognition.curves import recognise

ASINH = Monotone(
    name="asinh",
    f=torch.asinh,
    derivative=lambda x: torch.rsqrt(1 + x * x),
    of_output=lambda y: 1 / torch.cosh(y),
    rise=lambda y: -torch.tanh(y) / torch.cosh(y),
)


class Asinh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x.abs() + torch.sqrt(x * x + 1)) * x.sign()


@pytest.fixture
def asinh() -> Iterator[Curve]:
    yield register(ASINH)
    unregister("asinh")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), Asinh(), nn.Linear(64, 4))


@pytest.mark.usefixtures("asinh")
def test_a_registered_curve_is_recognised_in_a_model_and_planned() -> None:
    report = invact.plan(model(), (torch.randn(8, 16),))
    assert [(site.path, site.activation, site.action) for site in report.sites] == [("1", "asinh", "invert")]
    assert report.saving > 0


@pytest.mark.usefixtures("asinh")
def test_a_model_with_a_registered_curve_trains_as_before() -> None:
    x = torch.randn(8, 16)
    stock, ours = model(), model()
    invact.patch(ours, (x,))
    for each in (stock, ours):
        each(x).square().sum().backward()
    assert type(ours[1]) is not Asinh
    for theirs, own in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_its_gradient_is_that_of_float64_within_the_precision_of_y(asinh: Curve, dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 4001).to(dtype).requires_grad_()
    (dx,) = torch.autograd.grad(invert(x, asinh).sum(), x)
    exact = asinh.derivative(x.detach().double())
    # y is off by half a unit in its last place, of at most 3: so much is f' off, of itself, and it is rounded once more
    assert ((dx.double() - exact).abs() <= exact * 3 * torch.finfo(dtype).eps).all()


def test_its_gradient_can_be_differentiated_once_more(asinh: Curve) -> None:
    x = torch.linspace(-3, 3, 11, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: invert(x, asinh), x)


@pytest.mark.usefixtures("asinh")
def test_no_kernel_is_taken_for_it() -> None:
    assert not dispatch.has_triton_kernel(ASINH)
    assert all(dispatch.has_triton_kernel(curve) for name, curve in CURVES.items() if name != "asinh")


def test_what_is_taken_out_is_not_recognised_any_more(asinh: Curve) -> None:
    assert recognise(Asinh()) is asinh
    unregister("asinh")
    assert recognise(Asinh()) is None
    register(asinh)  # for the fixture to take out


@pytest.mark.parametrize("name", ["gelu", "elu", "asinh"])
@pytest.mark.usefixtures("asinh")
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    before = list(CURVES.items())
    with pytest.raises(ValueError, match=f"There is a curve called '{name}' already. Give yours another name."):
        register(replace(ASINH, name=name))
    assert list(CURVES.items()) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"derivative": torch.rsqrt}, r"f' from x \(`derivative`\) is nan at x = -30.3, where autograd gives 0.0329"),
        ({"of_output": lambda y: 1 / (1 + y * y)}, r"f' from y \(`of_output` .* at x = .*, where autograd gives"),
        (
            {"of_output": lambda y: 1.00001 / torch.cosh(y)},
            r"f' from y .* is 0.111139 at x = -8.942, where autograd gives 0.111138",
        ),
        ({"rise": torch.zeros_like}, r"f'' \(f' times `rise` of a Monotone.* is -?0 at x = "),
        ({"f": lambda x: x * torch.asinh(x)}, r"f' from x \(`derivative`\) is"),
        ({"f": lambda x: x.detach()}, "its `f` must give, of a tensor of numbers, one of the same shape and dtype"),
        ({"f": lambda x: x.sum()}, "its `f` must give, of a tensor of numbers, one of the same shape and dtype"),
        ({"f": lambda x: x.float()}, "its `f` must give, of a tensor of numbers, one of the same shape and dtype"),
        ({"of_output": None}, "'asinh' has None where its function `of_output` should be"),
    ],
    ids=["from_x", "from_y", "nearly", "rise", "f", "no_gradient", "one_number", "other_dtype", "no_function"],
)
def test_a_curve_whose_derivative_is_wrong_is_refused(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        register(replace(ASINH, **changed))
    assert "asinh" in str(caught.value)
    assert "asinh" not in CURVES


def test_where_autograd_gives_no_number_far_out_a_curve_is_not_blamed() -> None:
    written_out = Monotone(
        name="softplus_written_out",
        f=lambda x: torch.log(1 + torch.exp(x)),
        derivative=torch.sigmoid,
        of_output=lambda y: -torch.expm1(-y),
        rise=lambda y: torch.exp(-y),
    )
    registering.check(written_out)


@pytest.mark.parametrize(("name", "message"), [("gelu", "came with invact"), ("snake", "No curve called 'snake'")])
def test_only_what_was_registered_can_be_taken_out(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unregister(name)
    assert "gelu" in CURVES


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_own_curves_pass_the_same_check(name: str) -> None:
    registering.check(CURVES[name])


def test_a_curve_can_be_registered_whatever_mode_is_on() -> None:
    with torch.inference_mode(), torch.device("meta"):
        register(ASINH)
    unregister("asinh")


def test_the_example_runs_and_leaves_nothing() -> None:
    assert doctest.testmod(registering).failed == 0
    assert CURVES.keys() == OURS
