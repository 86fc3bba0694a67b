"""One door to the kernels: which pair runs, and how a tensor of any layout becomes the flat one they take."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import pytorch
from .curves import Curve


def pair_for(tensor: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` work on this tensor."""
    return pytorch


def storage_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a dense tensor from the slowest in memory to the fastest: permuted so, it is contiguous."""
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))


def flat(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The elements in the given order of dimensions: a view where they lie so, a copy where they do not."""
    return tensor.permute(order).reshape(-1)


def shaped(values: Tensor, like: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undo `flat`."""
    inverse = sorted(range(like.dim()), key=order.__getitem__)
    return values.view([like.shape[dim] for dim in order]).permute(inverse)


def forward(x: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
    """``y = f(x)``, laid out as the stock operator would, and the packed sides.

    Args:
        x: a floating tensor of any shape, stride and memory format.
        curve: one of `CURVES`.

    Returns:
        y, of x's shape and dtype, and `side`: uint8, one bit per element in the order of `storage_order(y)`, eight to a
        byte.
    """
    y = curve.f(x)
    return y, pytorch.sides(flat(x, storage_order(y)), curve)


def backward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve, order: tuple[int, ...]) -> Tensor:
    """``dx = dy * f'(x)`` from y and the sides.

    Args:
        dy: the gradient of y; any strides.
        y, side: what `forward` gave; y may have come back with other strides.
        curve: the same as in `forward`.
        order: `storage_order` of y as `forward` gave it.

    Returns:
        dx, of y's shape and dtype, laid out as y was.
    """
    dx = pair_for(y).backward(flat(dy, order), flat(y, order), side, curve)
    return shaped(dx, y, order)


def second(dy: Tensor, y: Tensor, side: Tensor, curve: Curve, order: tuple[int, ...]) -> Tensor:
    """The derivative of `backward` by y: times f' it is ``dy * f''(x)``."""
    rise = pytorch.second(flat(y, order), side, curve)
    return shaped((pytorch.widened(flat(dy, order)) * rise).to(y.dtype), y, order)
