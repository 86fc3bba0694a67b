"""Any curve as an operator that keeps its output for backward instead of its input, and the gradients of that.

`invert` is what runs; the classes are how autograd sees it, in each way that PyTorch may look into it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from invact.kernels import Curve, dispatch
from invact.pytorch.circumstances import forward_ad_active, transforms_active
from invact.pytorch.tensors import is_traceable_wrapper_subclass


def invert(x: Tensor, curve: Curve, inplace: bool = False) -> Tensor:
    """Any curve of `invact.kernels`, keeping y and the curve's bits, if it has any, for backward.

    >>> from invact.kernels import CURVES
    >>> invert(torch.tensor([-1.0, 0.0, 1.0]), CURVES["silu"])
    tensor([-0.2689,  0.0000,  0.7311])
    """
    if not x.is_floating_point():
        raise TypeError(
            f"{curve.name} was given a tensor of {x.dtype}: an activation and its gradient need a floating type. "
            "Convert it first, for example with x.float()."
        )
    if x.is_nested or (type(x) is not Tensor and is_traceable_wrapper_subclass(x)):
        return _of_parts(x, curve, inplace)
    y: Tensor
    if not wants_gradient(x):
        y = curve.f(x)
    elif torch.compiler.is_compiling():
        # a copy that the compiler drops, unless what follows changes it in place: y itself is kept
        y = Inverted.apply(x, curve)[0].clone()
    elif transforms_active():
        y = InvertedBothWays.apply(x, curve)[0]
    else:
        y = InvertedEagerly.apply(x, curve, inplace)
    # Eagerly they are the same; in the other cases the copy makes x another name of y.
    return x.copy_(y) if inplace and y is not x else y


def wants_gradient(x: Tensor) -> bool:
    """Whether autograd records what is done with x. While a graph is traced or exported, which is the stock one: no."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_exporting()
    return torch.is_grad_enabled() and x.requires_grad and not torch.jit.is_tracing()  # type: ignore[attr-defined]


def _of_parts(x: Tensor, curve: Curve, inplace: bool) -> Tensor:
    """The curve of a tensor that holds others: of a DTensor the curve of each shard, of any other the stock one.

    The stock one of these others is never in place.
    """
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
    return x.copy_(y) if inplace else y


def gradient(dy: Tensor, y: Tensor, side: Tensor, curve: Curve, order: tuple[int, ...]) -> Tensor:
    """``dy * f'``, differentiable once more; `side` and `order` as `kernels.backward` takes them."""
    dx: Tensor
    if torch.compiler.is_compiling():
        dx = InvertedGradient.apply(dy, y, side, curve, order)
    elif _may_be_differentiated():
        dx = InvertedGradientBothWays.apply(dy, y, side, curve, order)
    else:  # an ordinary backward pass: an autograd function costs a GPU's host some 20 us
        dx = dispatch.backward(dy, y, side, curve, order)
    return dx


def stock_gradient(dy: Tensor, x: Tensor, curve: Curve) -> Tensor:
    """``dy * f'`` from x, as stock autograd works it out; differentiable again where gradients are recorded."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        (dx,) = torch.autograd.grad(curve.f(x), x, dy, create_graph=recorded)
    return dx


def _may_be_differentiated() -> bool:
    """Whether what is computed now has a gradient or a tangent of its own."""
    return torch.is_grad_enabled() or forward_ad_active() or transforms_active()


class InvertedEagerly(torch.autograd.Function):
    """``x -> y``; keeps y and the side. In place, y takes the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve, inplace: bool) -> Tensor:
        y, side = dispatch.forward(x, curve)
        ctx.curve, ctx.inplace, ctx.input = curve, inplace, None
        ctx.order = dispatch.storage_order(y)  # saved-tensor hooks may hand y back with other strides
        if inplace:
            y = x.copy_(y)
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, side)
        if forward_ad_active():
            ctx.save_for_forward(y, side)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        if ctx.input is not None:
            return stock_gradient(dy, ctx.input, ctx.curve), None, None
        y, side = ctx.saved_tensors
        return gradient(dy, y, side, ctx.curve, ctx.order), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Tensor:
        if ctx.inplace:
            raise NotImplementedError(
                f"Forward-mode differentiation of an inverted {ctx.curve.name} that works in place is not supported. "
                "Use it with inplace=False, or the stock activation; invact.unpatch(model) brings it back."
            )
        y, side = ctx.saved_tensors
        return gradient(dx, y, side, ctx.curve, ctx.order)


class Inverted(torch.autograd.Function):
    """``x -> (y, side)``, where torch.compile or torch.func looks into it; keeps exactly these two."""

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
        ctx.order = dispatch.storage_order(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
        y, side = ctx.saved_tensors
        return gradient(dy, y, side, ctx.curve, ctx.order), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, curve: Curve) -> Any:
        # the curve sees each element alone: the whole batch is one tensor, with one string of bits for all
        return Inverted.apply(x, curve), (in_dims[0], None)


class InvertedBothWays(Inverted):
    """`Inverted`, with its tangent for forward mode, which torch.compile can not trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Curve], output: tuple[Tensor, Tensor]) -> None:
        Inverted.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*output)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _: None) -> tuple[Tensor, None]:
        y, side = ctx.saved_tensors
        return gradient(dx, y, side, ctx.curve, ctx.order), None


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
        by_dy = gradient(ddx, y, side, ctx.curve, ctx.order)
        # by y, not by x: what flows back through y meets f' once more, in Inverted.backward
        by_y = InvertedCurvature.apply(ddx * dy, y, side, ctx.curve, ctx.order)
        return by_dy, by_y, None, None, None


class InvertedGradientBothWays(InvertedGradient):
    """`InvertedGradient`, with its tangent for forward mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        InvertedGradient.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx: Any, dy_tangent: Tensor | None, y_tangent: Tensor | None, *_: Any) -> Tensor:
        dy, y, side = ctx.saved_tensors
        total = torch.zeros_like(y)
        if dy_tangent is not None:
            total = total + gradient(dy_tangent, y, side, ctx.curve, ctx.order)
        if y_tangent is not None:
            total = total + InvertedCurvature.apply(y_tangent * dy, y, side, ctx.curve, ctx.order)
        return total


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
