"""Codes in a few bits by Triton, without a GPU: interpreted, against plain PyTorch, and compiled for three chips."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from triton_apart import assert_agrees_interpreted, built_for_amd, compiled

BOTH_WAYS = """
import torch
from invact.kernels import CURVES, codes
from invact.kernels.triton import launch as triton_launch
from invact.kernels.few_bits import packing as code_packing
from invact.kernels.few_bits.step_functions import steps

def alike(ours, expected, dtype):
    '''One NaN is as good as another. Some interpreters cut bf16 off where a GPU rounds it.'''
    rounded = expected.to(dtype)
    same = (ours == rounded) | (ours.isnan() & rounded.isnan())
    if dtype == torch.bfloat16:
        same |= ours.view(torch.int16) == (expected.view(torch.int32) >> 16).to(torch.int16)
    return same.all()

odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 65504.0])
torch.manual_seed(0)
for rows in (triton_launch.ROWS, 4096):  # several programs, and one that reaches far beyond the end
    triton_launch.ROWS = rows
    for count in (0, 1, 7, 8, 9, 1023, 4103):
        for bits in (1, 2, 3, 4):
            by = steps(CURVES["gelu" if count % 2 else "leaky_relu"], bits)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                x = torch.cat([odd, torch.randn(count) * 2])[:count].to(dtype)
                code = codes.codes(x, by)
                packed = codes.packed_codes(x, by)
                assert packed.dtype == torch.uint8
                assert packed.tolist() == code_packing.packed(code, bits).tolist(), (count, bits)
                dy = torch.cat([odd, torch.randn(count)])[:count].to(dtype)
                dx = codes.scaled(dy, packed, by)
                assert dx.dtype == dtype
                assert alike(dx, dy.float() * torch.tensor(by.values)[code.long()], dtype), (count, bits, dtype)
x = torch.randn(64, dtype=torch.double)
assert codes.scaled(x, codes.packed_codes(x, by), by).dtype == torch.double  # PyTorch's
print("agreed")
"""


def test_interpreted_codes_agree_with_plain_pytorch() -> None:
    assert_agrees_interpreted(BOTH_WAYS)


def kernels(kind: str, bits: int, rows: int, wide: bool, target: Any) -> list[Any]:
    from invact.kernels.triton import codes as triton_codes

    n = {"n": "i64" if wide else "i32"}
    constants = {**triton_codes.OF_BITS[bits], "ROWS": rows, "WIDE": wide, "CHIP": target.backend}
    packs = {"x_ptr": kind, "bounds_ptr": "*fp32", "codes_ptr": "*u8", **n}
    scales = {"dy_ptr": kind, "codes_ptr": "*u8", "values_ptr": "*fp32", "dx_ptr": kind, **n}
    return [
        compiled(triton_codes.pack_codes_kernel, packs, constants, target),
        compiled(triton_codes.scaled_kernel, scales, constants, target),
    ]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["*bf16", "*fp32"])
def test_they_compile_for_nvidia_with_accesses_of_16_bytes_to_what_is_large(kind: str, bits: int) -> None:
    from triton.backends.compiler import GPUTarget

    for kernel in kernels(kind, bits, 128, False, GPUTarget("cuda", 90, 32)):
        code = kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        assert re.search(r"ld\.global\S*(\.v4\.b32|\.v2\.b64)", code)
        assert "ftz" not in code  # stock's keeps denormals


def test_they_compile_for_amd() -> None:
    built = built_for_amd(lambda target: kernels("*bf16", 3, 256, False, target))
    for kernel in built:
        assert kernel.asm["hsaco"]


def test_more_than_2_31_elements_are_addressed_with_64_bits() -> None:
    from triton.backends.compiler import GPUTarget

    for kernel in kernels("*bf16", 4, 128, True, GPUTarget("cuda", 90, 32)):
        code = kernel.asm["ptx"]
        assert "mul.wide.u32" in code or "mul.wide.s32" in code
        assert not re.findall(r"setp\.[lg][te]\.[su]32", code)  # what is inside is asked in 64 bits


def test_their_constants_come_in_the_order_of_their_parameters() -> None:
    from invact.kernels.triton import codes as triton_codes

    for kernel in (triton_codes.pack_codes_kernel, triton_codes.scaled_kernel):
        names = list(inspect.signature(kernel.fn).parameters)
        assert names[names.index("n") + 1 :] == [*triton_codes.OF_BITS[3], "ROWS", "WIDE", "CHIP"]
