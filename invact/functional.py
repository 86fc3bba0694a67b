"""Activations that keep their output for backward instead of their input, with the signatures of torch.nn.functional.

    >>> import torch, invact.functional as F
    >>> x = torch.randn(4, 8, requires_grad=True)
    >>> F.gelu(x).sum().backward()
    >>> x.grad.shape
    torch.Size([4, 8])

Each takes a floating tensor of any shape, strides and memory format, in fp64, fp32, fp16 or bf16, and gives what the
stock operator gives, laid out alike; on a GPU the last digit may differ, and far on the left, where stock's gelu takes
the difference of two numbers near 1, y is nearer to the true value. For backward it keeps y, which the next layer keeps
as well. Where no gradient is asked for, the stock operator runs and nothing is kept. A tensor that is not floating
raises TypeError, a parameter that the curve can not have ValueError.

**Curves with two sides** (gelu, silu, quick_gelu, mish, hardswish) keep one bit per element besides y. The gradient is
f' as far as y and the bit tell it: exact away from the curve's minimum, and next to it, where rounding y hides where x
was, its mean over the x that give the same y and the same bit.

**Monotone curves** (all others) keep y alone. The gradient is within two units in the last place of stock's, except
where the curve levels out and y no longer tells x; each says where.

With ``inplace=True`` y takes the place of x, as in the stock function, and is kept there.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from invact.kernels import CURVES, Curve, dispatch
from invact.kernels.curves import monotone_families
from invact.pytorch.inside import forward_ad_active, is_traceable_wrapper_subclass, transforms_active

__all__ = [
    "celu",
    "elu",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "invert",
    "leaky_relu",
    "logsigmoid",
    "mish",
    "quick_gelu",
    "relu6",
    "selu",
    "silu",
    "softplus",
    "softsign",
    "squared_relu",
]


# --- curves with two sides ----------------------------------------------------------------------------


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


def quick_gelu(input: Tensor) -> Tensor:
    """x sigmoid(1.702 x), inverted; in fp32 inside for 16-bit types, and rounded once.

    Formula: Hendrycks & Gimpel, arXiv 1606.08415, as OpenAI's CLIP uses it. Raises TypeError for a tensor that is not
    floating.

    >>> quick_gelu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.1542,  0.0000,  0.8458])
    """
    return invert(input, CURVES["quick_gelu"])


# --- monotone curves ----------------------------------------------------------------------------------


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.elu``, inverted: x, or alpha (exp(x) - 1) below 0, where f' is y + alpha.

    Formula: Clevert et al., arXiv 1511.07289. Below x = -0.7 f' is as exact as y, absolutely and not relatively: y
    loses it where it nears -alpha. Raises ValueError for a negative alpha.

    >>> elu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.6321,  0.0000,  1.0000])
    """
    return invert(input, monotone_families.elu(alpha), inplace)


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.celu``, inverted: x, or alpha (exp(x / alpha) - 1) below 0, where f' is y / alpha + 1.

    Formula: Barron, arXiv 1704.07483. Loses what `elu` loses. Raises ValueError for an alpha that is not positive.

    >>> celu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.6321,  0.0000,  1.0000])
    """
    return invert(input, monotone_families.celu(alpha), inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.selu``, inverted: 1.0507 times an ELU with alpha = 1.6733.

    Formula: Klambauer et al., arXiv 1706.02515. Loses what `elu` loses.

    >>> selu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.1113,  0.0000,  1.0507])
    """
    return invert(input, CURVES["selu"], inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.leaky_relu``, inverted: x, or negative_slope x below 0. Nothing is lost.

    Formula: Maas et al., 2013. Raises ValueError for a negative `negative_slope`.

    >>> leaky_relu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.0100,  0.0000,  1.0000])
    """
    return invert(input, monotone_families.leaky_relu(negative_slope), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardtanh``, inverted: x, held between two values.

    Formula: Collobert, 2004. Lost where x is a bound as its dtype rounds it: f' is 0 there. Raises ValueError where
    max_val is not larger than min_val.

    >>> hardtanh(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.,  0.,  1.])
    """
    return invert(input, monotone_families.hardtanh(min_val, max_val), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.relu6``, inverted: x, held between 0 and 6. Nothing is lost.

    Formula: Krizhevsky, 2010.

    >>> relu6(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0., 0., 1.])
    """
    return invert(input, CURVES["relu6"], inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardsigmoid``, inverted: relu6(x + 3) / 6.

    Formula: Courbariaux et al., arXiv 1511.00363. Lost where y rounds to 1 although x is less than 3: f' is 0 there.

    >>> hardsigmoid(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.3333, 0.5000, 0.6667])
    """
    return invert(input, CURVES["hardsigmoid"], inplace)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``torch.nn.functional.softplus``, inverted: log(1 + exp(beta x)) / beta, where f' is 1 - exp(-beta y).

    Formula: Dugas et al., 2000. Nothing is lost. With a threshold below 17 y falls back where it becomes x, and one bit
    per element is kept that tells on which side of that x was. Raises ValueError for a beta that is not positive.

    >>> softplus(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0.3133, 0.6931, 1.3133])
    """
    return invert(input, monotone_families.softplus(beta, threshold))


def logsigmoid(input: Tensor) -> Tensor:
    """``torch.nn.functional.logsigmoid``, inverted: log(sigmoid(x)), where f' is 1 - exp(y). Nothing is lost.

    Formula: the derivative of log(sigmoid(x)) is 1 - sigmoid(x).

    >>> logsigmoid(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1.3133, -0.6931, -0.3133])
    """
    return invert(input, CURVES["log_sigmoid"])


def softsign(input: Tensor) -> Tensor:
    """``torch.nn.functional.softsign``, inverted: ``x / (1 + |x|)``, where f' is ``(1 - |y|)^2``.

    Formula: Bergstra et al., 2009. From abs(x) = 1 on f' is as exact as y, absolutely and not relatively.

    >>> softsign(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.5000,  0.0000,  0.5000])
    """
    return invert(input, CURVES["softsign"])


def squared_relu(input: Tensor) -> Tensor:
    """relu(x)^2, inverted: f' is 2 sqrt(y).

    Formula: So et al., Primer, arXiv 2109.08668. Lost where the square falls below the least number of the dtype.

    >>> squared_relu(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([0., 0., 1.])
    """
    return invert(input, CURVES["squared_relu"])


# --- what they share ----------------------------------------------------------------------------------


def invert(x: Tensor, curve: Curve, inplace: bool = False) -> Tensor:
    """Any curve of `invact.kernels`, keeping y and the curve's bits, if it has any, for backward.

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
