"""The pair of kernels in plain PyTorch: for every device, and for tracing under ``torch.compile``.

All tensors are flat and contiguous. `side` holds one bit per element, eight to a byte, the first in the lowest bit: 1
where x was on the right of the curve's minimum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .curves import CURVES, Curve
from .pieces import Piece, scale_and_shift

# Elements worked on at a time on the CPU. The temporaries stay in its cache; and PyTorch does not split an operator of
# this size between threads, which costs milliseconds each time where other processes want the cores too.
CHUNK = 1 << 15


def sides(x: Tensor, curve: Curve) -> Tensor:
    """The packed sides. This is all of forward that is not the stock operator."""
    end = left_end(curve, x.dtype)
    if not on_real_cpu(x):
        return packed(~(x < end))
    side = torch.empty(-(-x.numel() // 8), dtype=torch.uint8)
    for elements, bytes_ in chunks(x.numel()):
        side[bytes_] = packed(~(x[elements] < end))
    return side


def backward(dy: Tensor, y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``dy * f'(x)``, from y and the packed sides alone."""
    if not on_real_cpu(y) or y.dtype == torch.float64:
        return scaled(dy, y, unpacked(side, y.numel()), curve)
    look_up = short_slope if y.dtype.itemsize == 2 else fp32_slope if curve.fit.tail else exact_slope
    dx = torch.empty_like(y)
    for elements, bytes_ in chunks(y.numel()):
        part = y[elements]
        right = unpacked(side[bytes_], part.numel())
        torch.mul(dy[elements], look_up(part, right, curve), out=dx[elements])
    return dx


def on_real_cpu(tensor: Tensor) -> bool:
    """Whether operators run one by one on memory of the CPU: not traced, not fake, not some subclass's own."""
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and tensor.device.type == "cpu"


def chunks(count: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of a flat tensor, and of its packed sides."""
    for start in range(0, count, CHUNK):
        yield slice(start, start + CHUNK), slice(start // 8, (start + CHUNK) // 8)


def scaled(dy: Tensor, y: Tensor, right: Tensor, curve: Curve) -> Tensor:
    """``dy * f'``, worked out in fp32 for 16-bit types and rounded once."""
    return (widened(dy) * slope(widened(y), right, curve, y.dtype)).to(y.dtype)


def second(y: Tensor, side: Tensor, curve: Curve) -> Tensor:
    """``d f' / d y``, in fp32 for 16-bit types: times f' it is the curve's second derivative."""
    return slope_rise(widened(y), unpacked(side, y.numel()), curve, y.dtype)


def widened(values: Tensor) -> Tensor:
    return values.float() if values.dtype.itemsize < 4 else values


def packed(bits: Tensor) -> Tensor:
    """A flat bool tensor, eight elements to a byte; the last byte is filled up with zeros."""
    filled = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    if torch.compiler.is_compiling():
        return (filled.view(-1, 8).to(torch.uint8) << bit_numbers(bits.device)).sum(1, dtype=torch.uint8)
    # Eight bools are the eight bytes of one integer; the product brings byte i's lowest bit to bit 56 + i.
    return (filled.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def unpacked(side: Tensor, count: int) -> Tensor:
    """The first `count` bits as a flat bool tensor."""
    if torch.compiler.is_compiling():
        return (side.unsqueeze(1) >> bit_numbers(side.device) & 1).bool().view(-1)[:count]
    # Eight copies of the byte in one integer, of which the i-th keeps its bit i.
    spread = side.to(torch.int64) * 0x0101010101010101 & -0x7FBFDFEFF7FBFDFF
    return (spread.view(torch.uint8) != 0)[:count]


def bit_numbers(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def significant_bits(dtype: torch.dtype) -> int:
    return 2 - math.frexp(torch.finfo(dtype).eps)[1]


def left_end(curve: Curve, dtype: torch.dtype) -> float:
    """The first number of the dtype that is not left of the minimum: comparing with x_min itself would round it."""
    fraction, exponent = math.frexp(curve.x_min)
    bits = significant_bits(dtype)
    return math.ldexp(math.ceil(math.ldexp(fraction, bits)), exponent - bits)


def half_ulp(curve: Curve, dtype: torch.dtype) -> float:
    """How far rounding to the dtype moves a y near the curve's minimum, at most."""
    return math.ldexp(0.5, math.frexp(curve.y_min)[1] - significant_bits(dtype))


def minimum_in_two(curve: Curve, dtype: torch.dtype) -> tuple[float, float]:
    """The minimum as the sum of a number of the dtype, fp32 or fp64, and a small rest."""
    if dtype == torch.float64:
        return curve.y_min, curve.y_min_low
    fraction, exponent = math.frexp(curve.y_min)
    bits = significant_bits(dtype)
    high = math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)
    return high, curve.y_min - high


def signed_root(y: Tensor, right: Tensor, curve: Curve, rounded_to: torch.dtype) -> Tensor:
    """r of `pieces.Fit`: the mean of sqrt(y - y_min) over all y that round to this one, negative on the left.

    Rounding y hides where x was, most of all next to the minimum; x is nearly linear in r there, so the mean of r is
    what makes the error of f' smallest. It is never zero and never the root of a negative number, although the stock
    operator's own error may put y below the minimum by more than rounding does.
    """
    high, low = minimum_in_two(curve, y.dtype)
    half = half_ulp(curve, rounded_to)
    height = (y - high) - low
    root = 0.5 * ((height + half).clamp(min=half / 64).sqrt() + (height - half).clamp(min=0).sqrt())
    return torch.where(right, root, -root)


def polynomial(piece: Piece, v: Tensor) -> Tensor:
    scale, shift = scale_and_shift(piece)
    u = v * scale + shift
    total = torch.full_like(u, piece.coefficients[-1])
    for coefficient in reversed(piece.coefficients[:-1]):
        total = total * u + coefficient
    return total


def tail_variables(y: Tensor, curve: Curve, tail: Piece) -> tuple[Tensor, Tensor]:
    """s of `pieces.Fit` and the variable of the tail's polynomial. At y = -0 they end at inf and at the piece's end."""
    s = (-torch.log(y / curve.y_min)).clamp(min=0).sqrt()
    return s, (1 / (s + curve.fit.tail_offset)).clamp(min=tail.low)


def slope(y: Tensor, right: Tensor, curve: Curve, rounded_to: torch.dtype) -> Tensor:
    """f' from y and the side, in y's precision, where y was rounded to a dtype that may be shorter."""
    fit = curve.fit_for(rounded_to)
    r = signed_root(y, right, curve, rounded_to)
    outer = torch.where(r > fit.right.high, 1.0, r * polynomial(fit.right, r))
    values = torch.where(r > fit.near.high, outer, r * polynomial(fit.near, r))
    far = 0.0 if fit.tail is None else y * polynomial(fit.tail, tail_variables(y, curve, fit.tail)[1])
    values = torch.where(right, values, torch.where(y < fit.tail_start, values, far))
    # y - y is 0, but NaN at infinity, where stock's formulas say NaN too
    return values + (y - y) if math.isnan(curve.slope_at_infinity) else values


def slope_rise(y: Tensor, right: Tensor, curve: Curve, rounded_to: torch.dtype) -> Tensor:
    """The derivative of `slope` by y."""
    fit = curve.fit_for(rounded_to)
    r = signed_root(y, right, curve, rounded_to)
    outer = torch.where(r > fit.right.high, 0.0, product_rise(fit.right, r))
    values = torch.where(r > fit.near.high, outer, product_rise(fit.near, r))
    far: Tensor | float = 0.0
    if fit.tail is not None:
        s, w = tail_variables(y, curve, fit.tail)
        far = polynomial(fit.tail, w) + polynomial(rise(fit.tail), w) * w * w / (2 * s)
    return torch.where(right, values, torch.where(y < fit.tail_start, values, far))


def product_rise(piece: Piece, r: Tensor) -> Tensor:
    """The derivative of ``r * piece(r)`` by y, where r^2 is y and a constant."""
    return (polynomial(piece, r) + r * polynomial(rise(piece), r)) / (2 * r)


def rise(piece: Piece) -> Piece:
    """The derivative of a piece, by its own variable."""
    scale, _ = scale_and_shift(piece)
    terms = tuple(k * scale * term for k, term in enumerate(piece.coefficients))[1:]
    return Piece(piece.low, piece.high, terms or (0.0,))


def short_slope(y: Tensor, right: Tensor, curve: Curve) -> Tensor:
    """`slope` for 16-bit y on the CPU: read off a table of all there are, in fp32."""
    index = y.view(torch.int16).int().add_(right.int() << 16).add_(1 << 15)
    return short_table(curve.name, y.dtype).index_select(0, index)


@functools.cache
def short_table(name: str, dtype: torch.dtype) -> Tensor:
    """f' for every bit pattern of a 16-bit y, in the order of the patterns as integers: x on the left, then right."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    y = patterns.view(dtype).double().repeat(2)
    right = torch.arange(2 << 16) >= 1 << 16
    return slope(y, right, CURVES[name], dtype).float()


def exact_slope(y: Tensor, right: Tensor, curve: Curve) -> Tensor:
    """`slope` for fp32 y on the CPU, of a curve that is simple enough to work out."""
    return slope(y, right, curve, torch.float32)


# On the CPU every operator is a pass of its own over memory, and `slope` takes a hundred. For fp32 it is read off a
# table, with a straight line between two entries. What is looked up is the height above the minimum, a little raised so
# that it is positive; on the left it is divided by y, which makes it negative and stretches the tail. The leading bits
# of that number are the index: the entries lie close wherever f' bends. The line is off by 1e-6 at most, where x > 1.
SKIPPED_BITS = 14


def fp32_slope(y: Tensor, right: Tensor, curve: Curve) -> Tensor:
    """`slope` for fp32 y on the CPU."""
    values, steps = fp32_tables(curve.name)
    high, low = minimum_in_two(curve, torch.float32)
    half = half_ulp(curve, torch.float32)
    raised = (y - high).sub_(low - 2 * half).clamp_(min=half)
    bits = raised.div_(torch.where(right, 1.0, y)).view(torch.int32)
    index = (bits >> SKIPPED_BITS).add_(values.numel() // 2)
    between = bits.bitwise_and_((1 << SKIPPED_BITS) - 1).float()
    return values.index_select(0, index).addcmul_(steps.index_select(0, index), between)


@functools.cache
def fp32_tables(name: str) -> tuple[Tensor, Tensor]:
    """f' at every number that `fp32_slope` can look up, and what to add for each of the bits that it skips."""
    curve = CURVES[name]
    count = 1 << (32 - SKIPPED_BITS)
    leading = torch.arange(-count // 2, count // 2, dtype=torch.int32)
    values, following = (
        slope_at(((leading << SKIPPED_BITS) + end).view(torch.float32).double(), curve)
        for end in (0, (1 << SKIPPED_BITS) - 1)
    )
    steps = (following - values) / ((1 << SKIPPED_BITS) - 1)
    return values.float(), steps.nan_to_num(0.0, 0.0, 0.0).float()


def slope_at(looked_up: Tensor, curve: Curve) -> Tensor:
    """f' by what `fp32_slope` looks up."""
    right = ~looked_up.signbit()
    bottom = curve.y_min - 2 * half_ulp(curve, torch.float32)
    y = torch.where(right, bottom + looked_up, bottom / (1 - looked_up))
    return slope(y, right, curve, torch.float32)
