"""One door to the kernels: which pair runs, and how a tensor of any layout becomes the flat one they take."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from .curves.catalogue import OURS
from .curves.curve import Curve
from .curves.two_sided import TwoSided
from .imitated import imitates
from .pytorch import activation_kernels as pytorch_pair
from .rounding import widened

# Triton decides when it is imported whether it runs on CPU tensors
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_pair_for(tensor: Tensor, curve: Curve) -> ModuleType | None:
    """The Triton pair where it works on this tensor, in which fp64 is left to PyTorch."""
    if tensor.dtype not in TRITON_DTYPES or not may_run_triton(tensor) or not has_triton_kernel(curve):
        return None
    # imported when it is first needed: it takes a while, and many machines have no GPU
    from .triton import activation_kernels as triton_pair

    return triton_pair


def has_triton_kernel(curve: Curve) -> bool:
    """Whether one was written: for ours alone, and for monotone ones without sides."""
    return curve.name in OURS and (isinstance(curve, TwoSided) or not curve.has_side)


def may_run_triton(tensor: Tensor) -> bool:
    """Whether a kernel in Triton may read it: a real tensor on a GPU, in eager mode.

    While `torch.compile` traces, plain PyTorch lets inductor fuse; fake tensors and other subclasses have no memory
    that a kernel could read.
    """
    if not TRITON_INSTALLED or not (tensor.is_cuda or (INTERPRETED and tensor.is_cpu)):
        return False
    return pytorch_pair.has_memory(tensor)


def storage_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a dense tensor from the slowest in memory to the fastest: permuted so, it is contiguous."""
    if tensor.is_contiguous():
        return tuple(range(tensor.dim()))
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))


def flat(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The elements in the given order of dimensions: a view where they lie so in memory, a copy where they do not.

    Reshaped alone, one number expanded to many, such as the gradient that a sum sends back, would stay one number.
    """
    return tensor.permute(order).reshape(-1).contiguous()


def shaped(values: Tensor, like: Tensor, order: tuple[int, ...]) -> Tensor:
    """Undo `flat`."""
    inverse = sorted(range(like.dim()), key=order.__getitem__)
    return values.view([like.shape[dim] for dim in order]).permute(inverse)


def forward(x: Tensor, curve: Curve) -> tuple[Tensor, Tensor]:
    """``y = f(x)``, laid out as the stock operator would, and the packed sides.

    Args:
        x: a floating tensor of any shape, stride and memory format.
        curve: one of `CURVES`, or one of the same kind with other parameters.

    Returns:
        y, of x's shape and dtype, and `side`: the packed sides of the elements in the order of `storage_order(y)`,
        uint8; empty for a curve that has none.
    """
    if not curve.has_side:
        return curve.f(x), x.new_empty(0, dtype=torch.uint8)
    if imitates("cuda", x) and has_triton_kernel(curve):
        return torch.empty_like(x), x.new_empty(curve.side_nbytes(x.numel()), dtype=torch.uint8)
    if triton_pair := triton_pair_for(x, curve):
        if x.is_contiguous():  # then nothing needs to be made flat, and each view costs the host of a GPU some 2 us
            result: tuple[Tensor, Tensor] = triton_pair.forward(x, curve)
            return result
        order = storage_order(torch.empty_like(x, device="meta"))
        y, side = triton_pair.forward(flat(x, order), curve)
        return shaped(y, x, order), side
    y = curve.f(x)
    order = storage_order(y)
    return y, pytorch_pair.packed_sides(flat(x, order), curve)


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
    if imitates("cuda", y) and has_triton_kernel(curve):
        return torch.empty_like(y)
    triton_pair = triton_pair_for(y, curve) if pytorch_pair.has_memory(dy) else None
    if triton_pair and dy.is_contiguous() and y.is_contiguous() and order == tuple(range(y.dim())):
        flat_dx: Tensor = triton_pair.backward(dy, y, side, curve)
        return flat_dx
    pair = triton_pair or pytorch_pair
    dx = pair.backward(flat(dy, order), flat(y, order), side, curve)
    return shaped(dx, y, order)


def second(dy: Tensor, y: Tensor, side: Tensor, curve: Curve, order: tuple[int, ...]) -> Tensor:
    """The derivative of `backward` by y: times f' it is ``dy * f''(x)``."""
    rise = pytorch_pair.second(flat(y, order), side, curve)
    return shaped((widened(flat(dy, order)) * rise).to(y.dtype), y, order)
