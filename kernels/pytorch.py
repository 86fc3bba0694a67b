"""The pair of kernels in plain PyTorch: for every device, and for tracing under ``torch.compile``.

All tensors are flat and contiguous. `side` holds the codes of `Curve.codes` as `packing` packs them; it is empty where
a curve needs none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import tables
from .curve import Curve
from .packing import packed, unpacked
from .rounding import widened
from .two_sided import TwoSided

CHUNK = 1 << 16  # elements that a thread of the CPU works on at a time, so that the temporaries stay in its cache


def sides(x: Tensor, y: Tensor, curve: Curve) -> Tensor:
    """The packed codes of a curve that needs any. This is all of forward that is not the stock operator."""
    if not on_real_cpu(x):
        return packed(curve.codes(x, y), curve.side_bits)
    side = x.new_empty(curve.side_nbytes(x.numel()), dtype=torch.uint8)
    for elements, bytes_ in chunks(x.numel(), curve.side_bits):
        if x.dtype.itemsize == 2 and curve.side_bits > 1:
            codes = tables.short_codes(x[elements], curve)
        else:
            codes = curve.codes(x[elements], y[elements])
        side[bytes_] = packed(codes, curve.side_bits)
    return side


def backward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``dy * f'(x)``, from y and the packed codes alone."""
    if not (on_real_cpu(y) and on_real_cpu(dy)):
        return scaled(dy, y, codes_in(side, y.numel(), curve), curve)
    dx = torch.empty_like(y)
    for elements, bytes_ in chunks(y.numel(), curve.side_bits):
        part = y[elements]
        code = codes_in(side[bytes_], part.numel(), curve)
        torch.mul(dy[elements], slope_on_cpu(part, code, curve), out=dx[elements])
    return dx


def slope_on_cpu(y: Tensor, code: Tensor | None, curve: Curve) -> Tensor:
    """f' in y's precision, or in fp32 for 16-bit types."""
    if y.dtype.itemsize == 2:
        return tables.short_slope(y, code, curve)
    if y.dtype == torch.float32 and isinstance(curve, TwoSided) and curve.side_bits == 1 and curve.fit.tail:
        assert code is not None
        return tables.fp32_slope(y, code, curve)
    return curve.slope(y, code, y.dtype)


def second(y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``d f' / d y``, in fp32 for 16-bit types: times f' it is the curve's second derivative."""
    return curve.slope_rise(widened(y), codes_in(side, y.numel(), curve), y.dtype)


def scaled(dy: Tensor, y: Tensor, code: Tensor | None, curve: Curve) -> Tensor:
    """``dy * f'``, worked out in fp32 for 16-bit types and rounded once."""
    return (widened(dy) * curve.slope(widened(y), code, y.dtype)).to(y.dtype)


def codes_in(side: Tensor, count: int, curve: Curve) -> Tensor | None:
    return unpacked(side, count, curve.side_bits) if curve.side_bits else None


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


def chunks(count: int, bits: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a flat tensor, and of its packed codes."""
    step = CHUNK * torch.get_num_threads()
    for start in range(0, count, step):
        yield slice(start, start + step), slice(start // 8 * bits, (start + step) // 8 * bits)
