"""How a kernel in Triton is started over the elements of flat tensors, eight in a row.

A program works on some rows of eight elements: the bits of a row are one byte, and in 16 bits a row is one access of 16
bytes. A kernel takes its tensors, their length n, numbers that change from call to call, its constants, and then ROWS,
WIDE and CHIP.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,no-untyped-call"
# ruff: noqa: N803
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 256 if torch.version.hip else 128  # of eight elements, per program: a row for each thread of four warps


@triton.jit
def row_offsets(ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The program's rows, and its elements as (ROWS, 8)."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    rows = program * ROWS + tl.arange(0, ROWS)
    return rows, rows[:, None] * 8 + tl.arange(0, 8)[None, :]


Constants = dict[str, float | str | bool]  # in the order of a kernel's parameters
KEPT_CONSTANTS = 256  # curves and dtypes, each a few numbers

# What the kernels are built for; instructions of the one are not those of the other, and the interpreter knows none.
CHIP = "interpreter" if not isinstance(row_offsets, triton.JITFunction) else "hip" if torch.version.hip else "cuda"


def wide(n: int, rows: int | None = None) -> bool:
    """Whether offsets need 64 bits; with `rows` per program, of which the last reaches beyond n."""
    return n > 2**31 - 8 * (rows or ROWS)


def launch(
    kernel: Any,
    constants: Constants,
    tensors: tuple[Tensor, ...],
    n: int,
    numbers: tuple[float, ...] = (),
    rows_a_thread: int = 1,
) -> None:
    """Runs a kernel over n elements on the device of its tensors, which need not be the current one.

    Args:
        constants: that are kept somewhere: what has been built is found again by their address.
        numbers: floats that the kernel takes after n, in fp32; nothing is built anew for another number.
        rows_a_thread: for kernels that move so little per row that one is less than an access of 16 bytes.
    """
    first = tensors[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(first):
            launch_here(kernel, constants, tensors, n, numbers, ROWS * rows_a_thread)
    else:
        launch_here(kernel, constants, tensors, n, numbers, ROWS * rows_a_thread)


def launch_here(
    kernel: Any, constants: Constants, tensors: tuple[Tensor, ...], n: int, numbers: tuple[float, ...], rows: int
) -> None:
    """Triton's own launch takes some 50 us to find what it has built; here the address of the constants finds it.

    Triton builds another kernel for other dtypes, where an address or the length is no multiple of 16, where the length
    is 1 or takes 64 bits, and on ROCm where the memory of a tensor takes more than 31 bits to address.
    """
    global REUSED
    grid = (-(-n // (8 * rows)), 1, 1)
    fixed = (*numbers, *constants.values(), rows, wide(n, rows), CHIP)
    kept = REUSED and n > 1 and not any(tensor.data_ptr() % 16 for tensor in tensors)
    device, dtypes = tensors[0].get_device(), tuple([tensor.dtype for tensor in tensors])
    short = [tensor.untyped_storage().nbytes() < 2**31 for tensor in tensors] if CHIP == "hip" else [n < 2**31]
    key = (kernel, id(constants), dtypes, rows, n % 16 == 0, wide(n, rows), *short, device)
    if kept and key in built:
        try:
            built[key][1][grid](*tensors, n, *fixed)
            return
        except TypeError:  # another Triton may want other arguments of what it has built; nothing has run
            built.clear()
            kept = REUSED = False
    found = kernel[grid](*tensors, n, *fixed)
    if kept:
        if len(built) >= KEPT_CONSTANTS:
            built.clear()
        built[key] = constants, found  # the constants too, so that no others come to their address


REUSED = CHIP != "interpreter" and hasattr(triton, "knobs")  # older Tritons want other arguments
built: dict[tuple[Any, ...], tuple[Constants, Any]] = {}
