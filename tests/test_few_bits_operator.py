"""The operator with an approximate derivative: stock's output, a step times dy, and k bits kept an element."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import kept_bytes
from curves_and_pairs import VIEWS
from steps_apart import EVERY_CURVE, EVERY_NUMBER_OF_BITS, mean_square_error, step_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import invact
from invact.inverting.few_bits import few_bits
from invact.kernels import CURVES, Curve
from invact.kernels.few_bits.step_functions import Steps, steps

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def stepped_gradient(x: Tensor, dy: Tensor, by: Steps) -> Tensor:
    """dy times the step's value in fp32, or in fp64 for fp64, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (dy.to(wide) * torch.tensor(by.values, dtype=wide)[step_of(x, by)]).to(dy.dtype)


@EVERY_CURVE
@EVERY_DTYPE
@pytest.mark.parametrize("bits", [1, 3])
def test_the_output_is_stocks_and_the_gradient_a_step_times_dy(curve: Curve, dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(33, 57).mul(2).to(dtype).requires_grad_()
    dy = torch.randn(33, 57).to(dtype)
    y = few_bits(x, curve, bits)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(y, curve.f(x.detach()))
    assert dx.dtype == dtype
    assert torch.equal(dx, stepped_gradient(x.detach(), dy, steps(curve, bits)))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_outputs_and_gradients_are_laid_out_as_stocks(view: Callable[[Tensor], Tensor]) -> None:
    curve, by = CURVES["gelu"], steps(CURVES["gelu"], 3)
    x = view(torch.randn(3, 8, 4, 6)).detach().requires_grad_()
    stock, ours = F.gelu(x), few_bits(x, curve, 3)
    assert torch.equal(ours, stock)
    assert ours.stride() == stock.stride()
    for dy in (torch.randn_like(stock), torch.randn(()).expand(stock.shape), torch.randn(stock.shape)):
        (expected,) = torch.autograd.grad(F.gelu(x), x, dy)
        (dx,) = torch.autograd.grad(few_bits(x, curve, 3), x, dy)
        assert torch.equal(dx, stepped_gradient(x.detach(), dy, by))
        assert dx.shape == expected.shape


@EVERY_NUMBER_OF_BITS
def test_on_normal_inputs_the_gradient_is_off_by_what_the_steps_say(bits: int) -> None:
    torch.manual_seed(0)
    curve, x = CURVES["gelu"], torch.randn(200_000, dtype=torch.float64, requires_grad=True)
    few_bits(x, curve, bits).sum().backward()
    assert x.grad is not None
    error = (x.grad - curve.derivative(x.detach())).square().mean()
    assert error == pytest.approx(mean_square_error(curve, steps(curve, bits)), rel=0.05)


class Activation(nn.Module):
    def __init__(self, bits: int, inplace: bool = False) -> None:
        super().__init__()
        self.bits, self.inplace = bits, inplace

    def forward(self, x: Tensor) -> Tensor:
        return few_bits(x * 1, CURVES["silu"], self.bits, self.inplace)


@EVERY_NUMBER_OF_BITS
@EVERY_DTYPE
@pytest.mark.parametrize("inplace", [False, True])
def test_k_eighths_of_a_byte_are_kept_an_element_and_nothing_else(bits: int, dtype: torch.dtype, inplace: bool) -> None:
    x = torch.randn(40, 80, dtype=dtype, requires_grad=True)
    model = Activation(bits, inplace)
    assert kept_bytes(model, (x,)) == 3200 * bits // 8
    assert invact.activation_memory(model, (x,)).total_bytes == 3200 * bits // 8
    odd = torch.randn(3, 5, dtype=dtype, requires_grad=True)
    assert kept_bytes(model, (odd,)) == 2 * bits


def test_without_a_gradient_nothing_is_kept_and_the_stock_operator_runs() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with torch.no_grad():
        y = few_bits(x, CURVES["gelu"], 2)
    assert y.grad_fn is None
    assert few_bits(x.detach(), CURVES["gelu"], 2).grad_fn is None


def test_empty_tensors_and_single_numbers_have_gradients() -> None:
    for shape in ((0,), (3, 0), ()):
        x = torch.ones(shape, requires_grad=True)
        (dx,) = torch.autograd.grad(few_bits(x, CURVES["gelu"], 3).sum(), x)
        assert dx.shape == shape


def test_in_place_the_output_takes_the_memory_of_the_input() -> None:
    x = torch.randn(64, requires_grad=True)
    inner = x * 1
    before = inner.detach().clone()
    y = few_bits(inner, CURVES["mish"], 2, inplace=True)
    assert y.data_ptr() == inner.data_ptr()
    assert torch.equal(y, F.mish(before))
    (dx,) = torch.autograd.grad(y, x, torch.ones(64))
    assert torch.equal(dx, stepped_gradient(before, torch.ones(64), steps(CURVES["mish"], 2)))


def test_the_output_may_be_changed_in_place_since_nobody_needs_it() -> None:
    x = torch.randn(64, requires_grad=True)
    few_bits(x, CURVES["silu"], 2).mul_(2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, stepped_gradient(x.detach(), torch.full((64,), 2.0), steps(CURVES["silu"], 2)))


def test_a_second_derivative_is_refused_with_what_to_do() -> None:
    x = torch.randn(8, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"second derivative of gelu in steps of 8 values.*invact\.unpatch"):
        torch.autograd.grad(few_bits(x, CURVES["gelu"], 3).sum(), x, create_graph=True)


def test_inside_torch_func_and_forward_mode_the_stock_operator_gives_what_it_gives() -> None:
    x = torch.randn(8)
    ours = torch.func.grad(lambda x: few_bits(x, CURVES["gelu"], 1).sum())(x)
    assert torch.equal(ours, torch.func.grad(lambda x: F.gelu(x).sum())(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones(8))
        tangent = forward_ad.unpack_dual(few_bits(dual, CURVES["gelu"], 1)).tangent
    assert torch.allclose(tangent, CURVES["gelu"].derivative(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_gradients_are_the_same(reentrant: bool) -> None:
    x = torch.randn(32, 16, requires_grad=True)
    model = Activation(3)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, plain)


def test_hooks_on_what_is_kept_see_the_codes_and_may_hand_back_a_copy() -> None:
    seen = []
    x = torch.randn(5, 16, requires_grad=True)

    def pack(kept: Tensor) -> Tensor:
        seen.append((kept.dtype, kept.numel()))
        return kept.clone()

    with saved_tensors_hooks(pack, lambda kept: kept):
        y = few_bits(x, CURVES["gelu"], 4)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert seen == [(torch.uint8, 40)]
    assert torch.equal(x.grad, stepped_gradient(x.detach(), torch.ones(5, 16), steps(CURVES["gelu"], 4)))


@pytest.mark.parametrize("bits", [1, 3])
def test_compiled_as_one_graph_it_keeps_the_codes_alone(bits: int) -> None:
    torch._dynamo.reset()
    x = torch.randn(16, 64, requires_grad=True)
    kept: list[Tensor] = []
    compiled = torch.compile(Activation(bits), fullgraph=True)
    with saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        y = compiled(x)
    y.backward(torch.ones_like(y))
    assert x.grad is not None
    assert torch.equal(x.grad, stepped_gradient(x.detach(), torch.ones(16, 64), steps(CURVES["silu"], bits)))
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 1024 * bits // 8


def test_what_is_no_activations_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch.int64.*x\.float\(\)"):
        few_bits(torch.arange(3), CURVES["gelu"], 2)
    with pytest.raises(ValueError, match=r"few_bits is 5.*1 to 4"):
        few_bits(torch.randn(3), CURVES["gelu"], 5)
