"""One door to codes in a few bits: on which step each x lies, packed, and read in one pass with the gradient's product.

Eight codes of k bits are k bytes, the first in the lowest bits; the last group is filled up with zeros. In Triton
packing and the product are one kernel each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, may_run_triton
from .imitated import imitates
from .own_thread import in_own_thread
from .pytorch import CHUNK, on_real_cpu
from .rounding import rounded_up, widened
from .steps import KEPT_STEPS, Steps


def packed_codes(x: Tensor, steps: Steps) -> Tensor:
    """On which step each x lies, the last for a NaN.

    Args:
        x: flat and dense, of any floating dtype; a bound is compared as it is, not as that dtype rounds it.
        steps: with 2, 4, 8 or 16 values.

    Returns:
        uint8, k bytes for every eight elements that were begun.
    """
    bits = bits_of(steps)
    if x.dtype in TRITON_DTYPES and imitates("cuda", x):
        return x.new_empty(nbytes(x.numel(), bits), dtype=torch.uint8)
    if x.dtype in TRITON_DTYPES and may_run_triton(x):
        from . import triton_codes

        return triton_codes.packed_codes(x, steps)
    if not (on_real_cpu(x) or imitates("cpu", x)):
        return packed(codes(x, steps), bits)
    into = x.new_empty(nbytes(x.numel(), bits), dtype=torch.uint8)
    for start, end in _chunks_of(x):
        into[start // 8 * bits : nbytes(end, bits)] = packed(codes(x[start:end], steps), bits)
    return into


def scaled(dy: Tensor, packed_codes: Tensor, steps: Steps) -> Tensor:
    """dy times the value of each element's step, worked out in fp32, in fp64 for dy of fp64, and rounded once.

    Args:
        dy: flat and dense, of any floating dtype, in the order of what was packed.
        packed_codes: as the function of that name gave them for the same steps.
    """
    if dy.dtype in TRITON_DTYPES and imitates("cuda", dy):
        return torch.empty_like(dy)
    if dy.dtype in TRITON_DTYPES and may_run_triton(dy) and may_run_triton(packed_codes):
        from . import triton_codes

        return triton_codes.scaled(dy, packed_codes, steps)
    bits = bits_of(steps)
    if not (on_real_cpu(dy) or imitates("cpu", dy)):
        return (widened(dy) * _chosen(unpacked(packed_codes, dy.numel(), bits), dy, steps)).to(dy.dtype)
    dx = torch.empty_like(dy)
    table = values_on(steps, torch.device("cpu"), torch.promote_types(dy.dtype, torch.float32))
    for start, end in _chunks_of(dy):
        index = unpacked(packed_codes[start // 8 * bits : nbytes(end, bits)], end - start, bits).int()
        torch.mul(dy[start:end], table.index_select(0, index), out=dx[start:end])
    return dx


def bits_of(steps: Steps) -> int:
    return len(steps.values).bit_length() - 1


def nbytes(count: int, bits: int) -> int:
    """Of the packed codes of so many elements."""
    return -(-count // 8) * bits


def codes(x: Tensor, steps: Steps) -> Tensor:
    """How many of the bounds are at x or to the left of it, as uint8."""
    code = torch.zeros_like(x, dtype=torch.uint8)
    for bound in steps.bounds:
        code += ~(x < rounded_up(bound, x.dtype))
    return code


def packed(codes: Tensor, bits: int) -> Tensor:
    """Flat uint8 codes, as bytes."""
    if torch.compiler.is_compiling() or codes.numel() % 8:
        codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 8))
    if torch.compiler.is_compiling():
        places = torch.arange(0, 8 * bits, bits, device=codes.device)
        word = (codes.view(-1, 8).long() << places).sum(1, keepdim=True)
        return (word >> torch.arange(0, 8 * bits, 8, device=codes.device) & 255).to(torch.uint8).view(-1)
    # Eight codes are the eight bytes of one integer: neighbours close up, then pairs of them, then fours.
    word = codes.view(torch.int64)
    for width in (8, 16, 32):
        word = (word | word >> (width - width // 8 * bits)) & _lanes(width, bits)
    return word.view(torch.uint8).view(-1, 8)[:, :bits].clone(memory_format=torch.contiguous_format).view(-1)


def unpacked(packed: Tensor, count: int, bits: int) -> Tensor:
    """The first `count` codes, as uint8."""
    if torch.compiler.is_compiling():
        ends = torch.arange(0, 8 * bits, 8, device=packed.device)
        word = (packed.view(-1, bits).long() << ends).sum(1, keepdim=True)
        places = torch.arange(0, 8 * bits, bits, device=packed.device)
        return (word >> places & (1 << bits) - 1).to(torch.uint8).view(-1)[:count]
    word = torch.nn.functional.pad(packed.view(-1, bits), (0, 8 - bits)).view(-1).view(torch.int64)
    for width in (32, 16, 8):
        closed = width // 8 * bits  # bits of the codes that stand in one lane
        word = (word | word << (width - closed)) & _spread_lanes(width, bits)
    return word.view(torch.uint8)[:count]


def _lanes(width: int, bits: int) -> int:
    """Of an integer of 64 bits, those that hold codes when the neighbours in lanes of this width have closed up."""
    return sum(((1 << width // 4 * bits) - 1) << lane for lane in range(0, 64, 2 * width))


def _spread_lanes(width: int, bits: int) -> int:
    """The same when they stand in lanes of this width again."""
    return sum(((1 << width // 8 * bits) - 1) << lane for lane in range(0, 64, width))


def _chosen(codes: Tensor, like: Tensor, steps: Steps) -> Tensor:
    """The value of each element's step, where there can be no table: it would have to be fetched by the host."""
    found = torch.full_like(like, steps.values[0], dtype=torch.promote_types(like.dtype, torch.float32))
    for code, value in enumerate(steps.values[1:], 1):
        found = torch.where(codes == code, value, found)
    return found


@functools.lru_cache(KEPT_STEPS)
def values_on(steps: Steps, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values as a table."""
    return in_own_thread(lambda: torch.tensor(steps.values, dtype=dtype, device=device))


@functools.lru_cache(KEPT_STEPS)
def bounds_on(steps: Steps, device: torch.device) -> Tensor:
    """The bounds as numbers of fp32, from which on a number of fp32, fp16 or bf16 is beyond them."""
    rounded = [rounded_up(bound, torch.float32) for bound in steps.bounds]
    return in_own_thread(lambda: torch.tensor(rounded, dtype=torch.float32, device=device))


def _chunks_of(flat: Tensor) -> Iterator[tuple[int, int]]:
    """So that temporaries stay in a processor's cache; of a simulated tensor two, which allocate what all do."""
    step, count = CHUNK * torch.get_num_threads(), flat.numel()
    chunks = ((start, min(start + step, count)) for start in range(0, count, step))
    return itertools.islice(chunks, 2 if imitates("cpu", flat) else None)
