"""Activations that keep their output for backward instead of their input, with the signatures of torch.nn.functional.

    >>> import torch, invact.functional as F
    >>> x = torch.randn(4, 8, requires_grad=True)
    >>> F.gelu(x).sum().backward()
    >>> x.grad.shape
    torch.Size([4, 8])

Each takes a floating tensor of any shape, strides and memory format, in fp64, fp32, fp16 or bf16, and gives what the
stock operator gives, laid out alike. For backward it keeps y, which the next layer keeps as well, and one bit per
element. Where no gradient is asked for, the stock operator runs and nothing is kept. A tensor that is not floating
raises TypeError.

The gradient is f' as far as y and the bit tell it: exact away from the curve's minimum, and next to it, where rounding
y hides where x was, its mean over the x that give the same y and the same bit.

With ``inplace=True`` y takes the place of x, as in the stock function, and is kept there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from invact.kernels import CURVES, Curve, dispatch

__all__ = ["gelu", "hardswish", "invert", "mish", "quick_gelu", "silu"]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``, inverted: x Phi(x), or with ``approximate="tanh"`` its approximation.

    Formula: Hendrycks & Gimpel, arXiv 1606.08415. Raises TypeError for a tensor that is not floating, ValueError for
    another `approximate`.

    >>> gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1587,  0.0000,  0.8413])
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(
            f"gelu has no approximate={approximate!r}: torch.nn.functional.gelu knows two. "
            'Pass approximate="none" or approximate="tanh".'
        )
    return invert(input, CURVES["gelu" if approximate == "none" else "gelu_tanh"])


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.silu``, inverted: x sigmoid(x).

    Formula: Elfwing et al., arXiv 1702.03118. Raises TypeError for a tensor that is not floating.

    >>> silu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.2689,  0.0000,  0.7311])
    """
    return invert(input, CURVES["silu"], inplace)


def quick_gelu(input: Tensor) -> Tensor:
    """x sigmoid(1.702 x), inverted; in fp32 inside for 16-bit types, and rounded once.

    Formula: Hendrycks & Gimpel, arXiv 1606.08415, as OpenAI's CLIP uses it. Raises TypeError for a tensor that is not
    floating.

    >>> quick_gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1542,  0.0000,  0.8458])
    """
    return invert(input, CURVES["quick_gelu"])


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.mish``, inverted: x tanh(softplus(x)).

    Formula: Misra, arXiv 1908.08681. Raises TypeError for a tensor that is not floating.

    >>> mish(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.3034,  0.0000,  0.8651])
    """
    return invert(input, CURVES["mish"], inplace)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardswish``, inverted: x relu6(x + 3) / 6.

    Formula: Howard et al., arXiv 1905.02244. Raises TypeError for a tensor that is not floating.

    >>> hardswish(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.3333,  0.0000,  0.6667])
    """
    return invert(input, CURVES["hardswish"], inplace)


def invert(x: Tensor, curve: Curve, inplace: bool = False) -> Tensor:
    """Any curve of `invact.kernels.CURVES`, keeping y and one bit per element for backward.

    >>> invert(torch.tensor([-1.0, 0.0, 1.0]), CURVES["silu"])
    tensor([-0.2689,  0.0000,  0.7311])
    """
    if not x.is_floating_point():
        raise TypeError(
            f"{curve.name} was given a tensor of {x.dtype}: an activation and its gradient need a floating type. "
            "Convert it first, for example with x.float()."
        )
    if type(x) is not Tensor and is_traceable_wrapper_subclass(x):
        return _of_parts(x, curve)
    y: Tensor
    if not (torch.is_grad_enabled() and x.requires_grad):
        y = curve.f(x)
    elif inplace and not torch.compiler.is_compiling():
        y = InvertedInPlace.apply(x, curve)
    else:
        y = Inverted.apply(x, curve)[0]
    # After InvertedInPlace they are the same; while torch.compile traces, the copy makes x another name of y.
    return x.copy_(y) if inplace and y is not x else y


def _of_parts(x: Tensor, curve: Curve) -> Tensor:
    """The curve of a tensor that wraps others: of a DTensor the curve of each shard, of any other the stock one."""
    sharding = sys.modules.get("torch.distributed.tensor")
    if sharding is None or not isinstance(x, sharding.DTensor):
        stock: Tensor = curve.f(x)
        return stock
    # A sum that is still to be taken must be taken before the curve.
    placements = [sharding.Replicate() if placed.is_partial() else placed for placed in x.placements]
    local = x.redistribute(placements=placements).to_local()
    y: Tensor = sharding.DTensor.from_local(
        invert(local, curve), x.device_mesh, placements, run_check=False, shape=x.shape, stride=x.stride()
    )
    return y


class Inverted(torch.autograd.Function):
    """``x -> (y, side)``; keeps exactly these two."""

    @staticmethod
    def forward(x: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = dispatch.forward(x, curve)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Curve], output: tuple[Tensor, Tensor]) -> None:
        y, side = output
        ctx.mark_non_differentiable(side)
        ctx.save_for_backward(y, side)
        ctx.curve = inputs[1]
        ctx.order = dispatch.storage_order(y)  # saved-tensor hooks may hand y back with other strides

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        y, side = ctx.saved_tensors
        return InvertedGradient.apply(dy, y, side, ctx.curve, ctx.order), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, curve: Curve) -> Any:
        # the curve sees each element alone: the whole batch is one tensor, with one string of bits for all
        return Inverted.apply(x, curve), (in_dims[0], None)


class InvertedInPlace(torch.autograd.Function):
    """`Inverted` with y in the memory of x; what held x before holds y afterwards.

    It gives y alone, since PyTorch lets a function of several results change no view in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve) -> Tensor:
        y, side = dispatch.forward(x, curve)
        x.copy_(y)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, side)
        ctx.curve, ctx.order = curve, dispatch.storage_order(y)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, side = ctx.saved_tensors
        return InvertedGradient.apply(dy, y, side, ctx.curve, ctx.order), None


class Chained(torch.autograd.Function):
    """What the gradient and its own gradient share: ``(dy, y, side, curve, order)`` in, a tensor like y out."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], dy: Tensor, y: Tensor, side: Tensor, *rest: Any) -> Any:
        curve, order = rest
        of_dy, of_y = in_dims[:2]
        if of_y is None:  # one y for many dy, as in a Jacobian
            assert of_dy is not None
            return torch.stack([cls.apply(part, y, side, curve, order) for part in dy.unbind(of_dy)]), 0
        # y was computed as a batch, and its bits lie in the order of the whole
        dy = dy.unsqueeze(0).movedim(0, of_y) if of_dy is None else dy.movedim(of_dy, of_y)
        return cls.apply(dy.expand_as(y), y, side, curve, dispatch.storage_order(y)), of_y


class InvertedGradient(Chained):
    """``dy * f'``: a function of its own, so that a gradient can be differentiated once more."""

    @staticmethod
    def forward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve, order: tuple[int, ...]) -> Tensor:
        dx: Tensor = dispatch.backward(dy, y, side, curve, order)
        return dx

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, y, side, ctx.curve, ctx.order = inputs
        ctx.save_for_backward(dy, y, side)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dy, y, side = ctx.saved_tensors
        by_dy = InvertedGradient.apply(ddx, y, side, ctx.curve, ctx.order)
        # by y, not by x: what flows back through y meets f' once more, in Inverted.backward
        by_y = InvertedCurvature.apply(ddx * dy, y, side, ctx.curve, ctx.order)
        return by_dy, by_y, None, None, None


class InvertedCurvature(Chained):
    """``dy * (d f' / d y)``: the end of the chain."""

    @staticmethod
    def forward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve, order: tuple[int, ...]) -> Tensor:
        result: Tensor = dispatch.second(dy, y, side, curve, order)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.curve = inputs[3]

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        raise NotImplementedError(
            f"The third derivative of an inverted {ctx.curve.name} is not supported: y does not tell it well enough. "
            "Use the stock activation where you need it; invact.unpatch(model) brings it back."
        )
