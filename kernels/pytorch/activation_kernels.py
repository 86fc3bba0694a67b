"""The pair of kernels in plain PyTorch: for every device, and for tracing under ``torch.compile``.

All tensors are flat and contiguous. `side` holds what `Curve.sides` gives as `packing` packs it; it is empty where a
curve has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..curves.curve import Curve
from ..curves.two_sided import TwoSided
from ..imitated import imitates
from ..rounding import widened
from . import lookup_tables
from .packing import packed, unpacked

CHUNK = 1 << 16  # elements that a thread of the CPU works on at a time, so that the temporaries stay in its cache


def packed_sides(x: Tensor, curve: Curve) -> Tensor:
    """Of a curve that has any. This is all of forward that is not the stock operator."""
    if not (on_real_cpu(x) or imitates("cpu", x)):
        return packed(curve.sides(x))
    side = x.new_empty(curve.side_nbytes(x.numel()), dtype=torch.uint8)
    for elements, bytes_ in _chunks_of(x):
        side[bytes_] = packed(curve.sides(x[elements]))
    return side


def backward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``dy * f'(x)``, from y and the packed sides alone."""
    if not ((on_real_cpu(y) and on_real_cpu(dy)) or imitates("cpu", y)):
        return scaled(dy, y, sides_in(side, y.numel(), curve), curve)
    dx = torch.empty_like(y)
    for elements, bytes_ in _chunks_of(y):
        part = y[elements]
        of_part = sides_in(side[bytes_], part.numel(), curve)
        torch.mul(dy[elements], slope_on_cpu(part, of_part, curve), out=dx[elements])
    return dx


def slope_on_cpu(y: Tensor, side: Tensor | None, curve: Curve) -> Tensor:
    """f' in y's precision, or in fp32 for 16-bit types."""
    if y.dtype.itemsize == 2:
        return lookup_tables.short_slope(y, side, curve)
    if y.dtype == torch.float32 and isinstance(curve, TwoSided) and curve.fit.tail:
        assert side is not None
        return lookup_tables.fp32_slope(y, side, curve)
    return curve.slope(y, side, y.dtype)


def second(y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``d f' / d y``, in fp32 for 16-bit types: times f' it is the curve's second derivative."""
    return curve.slope_rise(widened(y), sides_in(side, y.numel(), curve), y.dtype)


def scaled(dy: Tensor, y: Tensor, side: Tensor | None, curve: Curve) -> Tensor:
    """``dy * f'``, worked out in fp32 for 16-bit types and rounded once."""
    return (widened(dy) * curve.slope(widened(y), side, y.dtype)).to(y.dtype)


def sides_in(side: Tensor, count: int, curve: Curve) -> Tensor | None:
    return unpacked(side, count) if curve.has_side else None


def on_real_cpu(tensor: Tensor) -> bool:
    """Whether operators run one by one on memory of the CPU: not traced, not fake, not some subclass's own."""
    return has_memory(tensor) and tensor.device.type == "cpu"


def has_memory(tensor: Tensor) -> bool:
    """Whether a kernel may read it: not traced, no subclass such as a fake one, no batch of a vectorized Jacobian."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    try:
        tensor.untyped_storage()
    except RuntimeError:  # what stands for a batch has no storage
        return False
    return True


def _chunks_of(tensor: Tensor) -> Iterator[tuple[slice, slice]]:
    """All pieces; of a simulated tensor two, which allocate what all do."""
    return itertools.islice(chunks(tensor.numel()), 2 if imitates("cpu", tensor) else None)


def chunks(count: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a flat tensor, and of its packed sides, where it has any."""
    step = CHUNK * torch.get_num_threads()
    for start in range(0, count, step):
        yield slice(start, start + step), slice(start // 8, (start + step) // 8)
