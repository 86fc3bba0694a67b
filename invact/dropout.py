"""An inverted activation together with the dropout that alone takes its output.

Dropout keeps its mask and gives z, which the next layer keeps; nobody keeps y = f(x). But z tells y wherever the mask
let it through, and elsewhere no gradient passes. So z and two bits per element, the side and the mask, are enough.

`announced` gives y and says, on the tensor itself, what it came from; `dropped` is the dropout that reads this. Should
anything else take y and send a gradient back, an error says so: it can not go wrong silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from invact.functional import gradient, invert
from invact.kernels import Curve, dispatch
from invact.kernels.packing import packed, unpacked

_ORIGIN = "_invact_origin"


@dataclass(frozen=True)
class _Origin:
    """What y was computed of."""

    x: Tensor
    side: Tensor
    curve: Curve


def announced(x: Tensor, curve: Curve) -> Tensor:
    """``y = f(x)`` for `dropped`, and for it alone.

    Raises:
        RuntimeError: in backward, where something besides `dropped` has taken y.
    """
    y: Tensor
    if x.is_nested or (type(x) is not Tensor and is_traceable_wrapper_subclass(x)):  # such as a DTensor
        return invert(x, curve)
    if torch.compiler.is_compiling():  # the compiled graph decides by itself what it keeps
        y = curve.f(x)
        return y
    y, side = _Announced.apply(x, curve)
    setattr(y, _ORIGIN, _Origin(x, side, curve))
    return y


def dropped(y: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of what `announced` gave; any other tensor is dropped as ever. The random stream is the stock one.

    Example:
        >>> from invact.kernels import CURVES
        >>> x = torch.randn(8, requires_grad=True)
        >>> dropped(announced(x, CURVES["gelu"]), 0.1, training=True).sum().backward()
    """
    origin = getattr(y, _ORIGIN, None)
    if origin is None:
        return F.dropout(y, p, training)
    z: Tensor = _Dropped.apply(origin.x, y.detach(), origin.side, origin.curve, p if training else 0.0)[0]
    return z


class _Announced(torch.autograd.Function):
    """``x -> (y, side)``; keeps nothing, and has no gradient to give."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
        y, side = dispatch.forward(x, curve)
        ctx.mark_non_differentiable(side)
        ctx.curve = curve
        return y, side

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> None:
        raise RuntimeError(
            "The output of an activation that invact fused with the dropout behind it was used in another place too, "
            "which the forward pass that was planned with did not do. Plan with inputs that take the same way through "
            "the model, or leave this activation out with invact.patch(model, exclude=...)."
        )

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            f"Forward-mode differentiation of an inverted {ctx.curve.name} that is fused with a dropout is not "
            "supported. invact.unpatch(model) brings the stock modules back."
        )


class _Dropped(torch.autograd.Function):
    """``(x, y, side) -> (z, side, mask)``; keeps exactly these three."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, side: Tensor, curve: Curve, p: float) -> tuple[Tensor, Tensor]:
        z, mask = _with_mask(y, p)
        order = dispatch.storage_order(z)
        mask_bits = packed(dispatch.flat(mask, order))
        ctx.save_for_backward(z, side, mask_bits)
        ctx.mark_non_differentiable(mask_bits)
        ctx.curve, ctx.p, ctx.order = curve, p, order
        return z, mask_bits

    @staticmethod
    def backward(ctx: Any, dz: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        z, side, mask_bits = ctx.saved_tensors
        mask = dispatch.shaped(unpacked(mask_bits, z.numel()), z, ctx.order)
        # Where the mask stopped y, z is zero and so is the gradient, whatever f' is there.
        dy = dz * mask / (1 - ctx.p)
        dx = gradient(dy, z * (1 - ctx.p), side, ctx.curve, ctx.order)
        return dx, None, None, None, None


def _with_mask(y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """What F.dropout gives for y, bit for bit and with the same random numbers, and where it let y through."""
    if p == 0:
        return y.clone(), torch.ones_like(y, dtype=torch.bool)
    if y.is_cuda:
        return torch.native_dropout(y, p, True)
    noise = F.dropout(torch.ones_like(y), p)
    return y * noise, noise != 0
