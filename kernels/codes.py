"""One door to codes in a few bits: on which step each x lies, packed, and read in one pass with the gradient's product.

How codes lie in bytes, `few_bits.packing` says. In Triton packing and the product are one kernel each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import TRITON_DTYPES, may_run_triton
from .few_bits.device_tables import values_on
from .few_bits.packing import bits_of, nbytes, packed, unpacked
from .few_bits.step_functions import Steps
from .imitated import imitates
from .pytorch.activation_kernels import CHUNK, on_real_cpu
from .rounding import rounded_up, widened


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
        from .triton import codes as triton_codes

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
        from .triton import codes as triton_codes

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


def codes(x: Tensor, steps: Steps) -> Tensor:
    """How many of the bounds are at x or to the left of it, as uint8."""
    code = torch.zeros_like(x, dtype=torch.uint8)
    for bound in steps.bounds:
        code += ~(x < rounded_up(bound, x.dtype))
    return code


def _chosen(codes: Tensor, like: Tensor, steps: Steps) -> Tensor:
    """The value of each element's step, where there can be no table: it would have to be fetched by the host."""
    found = torch.full_like(like, steps.values[0], dtype=torch.promote_types(like.dtype, torch.float32))
    for code, value in enumerate(steps.values[1:], 1):
        found = torch.where(codes == code, value, found)
    return found


def _chunks_of(flat: Tensor) -> Iterator[tuple[int, int]]:
    """So that temporaries stay in a processor's cache; of a simulated tensor two, which allocate what all do."""
    step, count = CHUNK * torch.get_num_threads(), flat.numel()
    chunks = ((start, min(start + step, count)) for start in range(0, count, step))
    return itertools.islice(chunks, 2 if imitates("cpu", flat) else None)
