"""Activations that keep k bits per element for backward instead of their input. Their gradients are approximate.

f' is replaced by the step function with 2^k values that is nearest to it where x ~ N(0, 1), and what is kept is on
which step each x lies: Few-bit Backward, Novikov et al., arXiv 2202.00441.

    >>> import torch
    >>> from invact.kernels import CURVES
    >>> x = torch.randn(4, 8, requires_grad=True)
    >>> few_bits(x, CURVES["gelu"], 3).sum().backward()
    >>> x.grad.unique().numel() <= 8
    True
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invact.errors.checks import check_few_bits
from invact.inverting.autograd_functions import wants_gradient
from invact.kernels import Curve, codes, dispatch
from invact.kernels.few_bits import step_functions as best_steps
from invact.kernels.few_bits.step_functions import Steps
from invact.pytorch.circumstances import forward_ad_active, transforms_active
from invact.pytorch.compiler_flags import constant_when_compiled
from invact.pytorch.tensors import is_traceable_wrapper_subclass

steps = constant_when_compiled(best_steps.steps)


def few_bits(x: Tensor, curve: Curve, bits: int, inplace: bool = False) -> Tensor:
    """``curve.f(x)``, bit for bit the stock operator's, with an approximate gradient: one of 2^bits slopes times dy.

    Kept for backward are `bits` bits per element, in whole groups of eight elements, and neither x nor y. The stock
    operator runs, exact gradients and all, where no gradient is asked for, on tensors that hold others (DTensor,
    nested), and inside torch.func and forward-mode differentiation, which ask for more than one slope can give.

    Args:
        x: a floating tensor of any shape, strides and memory format.
        curve: one of `invact.kernels.CURVES`, or one of the same kind with other parameters.
        bits: 1 to 4.
        inplace: y takes the place of x.

    Returns:
        Of x's shape and dtype, laid out as the stock operator's.

    Raises:
        TypeError: x is not floating, or `bits` no number of bits.
        ValueError: bits are not 1 to 4.
        NotImplementedError: in backward, with `create_graph=True`.

    Example:
        >>> from invact.kernels import CURVES
        >>> few_bits(torch.tensor([-1.0, 0.0, 1.0]), CURVES["silu"], 2)
        tensor([-0.2689,  0.0000,  0.7311])
    """
    check_few_bits(bits)
    if not x.is_floating_point():
        raise TypeError(
            f"{curve.name} was given a tensor of {x.dtype}: an activation and its gradient need a floating type. "
            "Convert it first, for example with x.float()."
        )
    y: Tensor
    if not may_approximate(x):
        y = curve.f(x)
    elif torch.compiler.is_compiling():
        y = FewBits.apply(x, curve, steps(curve, bits))[0].clone()  # as `operators.invert` has it
    else:
        y = FewBitsEagerly.apply(x, curve, steps(curve, bits), inplace)
    return x.copy_(y) if inplace and y is not x else y


def may_approximate(x: Tensor) -> bool:
    """Whether a gradient is wanted that a few bits can give."""
    if not wants_gradient(x) or x.is_nested or (type(x) is not Tensor and is_traceable_wrapper_subclass(x)):
        return False
    return torch.compiler.is_compiling() or not (transforms_active() or forward_ad_active())


def _gradient(dy: Tensor, kept: Tensor, by: Steps, order: tuple[int, ...], name: str) -> Tensor:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            f"The second derivative of {name} in steps of {len(by.values)} values (few_bits) is not supported: a step "
            "function has none. Use the stock activation where you need it; invact.unpatch(model) brings it back."
        )
    dx: Tensor = dispatch.shaped(codes.scaled(dispatch.flat(dy, order), kept, by), dy, order)
    return dx


class FewBitsEagerly(torch.autograd.Function):
    """``x -> y``; keeps the codes. In place, y takes the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve, by: Steps, inplace: bool) -> Tensor:
        y: Tensor = curve.f(x)
        ctx.by, ctx.name, ctx.order = by, curve.name, dispatch.storage_order(y)
        ctx.save_for_backward(codes.packed_codes(dispatch.flat(x, ctx.order), by))
        if inplace:
            y = x.copy_(y)
            ctx.mark_dirty(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (kept,) = ctx.saved_tensors
        return _gradient(dy, kept, ctx.by, ctx.order, ctx.name), None, None, None


class FewBits(torch.autograd.Function):
    """``x -> (y, codes)``, where torch.compile looks into it."""

    @staticmethod
    def forward(x: Tensor, curve: Curve, by: Steps) -> tuple[Tensor, Tensor]:
        y = curve.f(x)
        return y, codes.packed_codes(dispatch.flat(x, dispatch.storage_order(y)), by)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        y, kept = output
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(kept)
        ctx.name, ctx.by = inputs[1].name, inputs[2]
        ctx.order = dispatch.storage_order(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _gradient(dy, kept, ctx.by, ctx.order, ctx.name), None, None
