"""Masks in bits by Triton, without a GPU: interpreted, against plain PyTorch, and compiled for three chips."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from triton_apart import assert_agrees_interpreted, built_for_amd, compiled

BOTH_WAYS = """
import torch
from invact.kernels import masks
from invact.kernels.pytorch import packing
from invact.kernels.triton import launch as triton_launch
from invact.kernels.triton import masks as triton_masks

def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])

def as_stock(x, mask, scale):
    return x.float() * mask * torch.tensor(scale)

def alike(ours, expected, dtype):
    '''One NaN is as good as another. Some interpreters cut bf16 off where a GPU rounds it.'''
    rounded = expected.to(dtype)
    same = (bits_of(ours) == bits_of(rounded)) | (ours.isnan() & rounded.isnan())
    if dtype == torch.bfloat16:
        same |= ours.view(torch.int16) == (expected.view(torch.int32) >> 16).to(torch.int16)
    return same.all()

counts = [0, 1, 7, 8, 9, 15, 16, 17, 1023, 4096, 4097, 4103]
odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 65504.0])
torch.manual_seed(0)
for rows in (triton_launch.ROWS, 8192):  # several programs, and one that reaches far beyond the end
    triton_launch.ROWS = rows
    for count in counts:
        mask = torch.rand(count) < 0.7
        bits = masks.packed(mask)
        assert (bits.dtype, bits.tolist()) == (torch.uint8, packing.packed(mask).tolist()), count
        back = masks.unpacked(bits, count)
        assert back.dtype == torch.bool and back.tolist() == mask.tolist(), count
        assert back.view(torch.uint8).max() <= 1 if count else True
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for scale in (0.0, 1.0, 1.1111111640930176, 1.8181817531585693):
                x = torch.cat([odd, odd, torch.randn(count)])[:count].to(dtype)
                y = masks.dropped(x, bits, (1,), scale)
                assert alike(y, as_stock(x, mask, scale), dtype), (count, dtype, scale)

assert masks.packed((torch.arange(11) % 3 == 0)[1:]).tolist() == [0b100100, 0b1]  # nor need it start where a word does

every = torch.tensor([[byte >> place & 1 for place in range(8)] for byte in range(256)]).bool().flatten()
assert masks.packed(every).tolist() == list(range(256))
assert torch.equal(masks.unpacked(masks.packed(every), 2048), every)

# any dense order of the dimensions, without the mask's ever being there; another order than the mask's is PyTorch's
image = torch.randn(3, 8, 4, 5)
for x in (image, image.to(memory_format=torch.channels_last), image.permute(3, 1, 0, 2)):
    mask = torch.empty_like(x, dtype=torch.bool).copy_(x > 0.5)
    bits = masks.packed(mask.as_strided((mask.numel(),), (1,)))
    expected, unpack = as_stock(x, mask, 1.25), triton_masks.unpacked
    triton_masks.unpacked = packing.unpacked = None
    y = masks.dropped(x, bits, mask.stride(), 1.25)
    triton_masks.unpacked = unpack
    assert torch.equal(y, expected) and y.stride() == x.stride()
    other = x.clone(memory_format=torch.contiguous_format).transpose(0, 3).clone().transpose(0, 3)
    assert torch.equal(masks.dropped(other, bits, mask.stride(), 1.25), expected)
assert masks.dropped(image.double(), masks.packed((image > 0.5).flatten()), image.stride(), 1.25).dtype == torch.double
print("agreed")
"""

IN_A_GRAPH = """
import torch
from invact.deriving.masks import Bits
from invact.deriving.saved_by_node import kept_by
from invact.deriving.hooks import Deriving
from invact.kernels.pytorch import packing
from invact.kernels.triton import masks as triton_masks

packing.packed = packing.unpacked = None  # by Triton all the same
x = torch.randn(33, 67)
for dtype in (torch.float32, torch.float16):
    found = []
    for hooks in (Deriving(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)):
        a = x.to(dtype).requires_grad_()
        torch.manual_seed(0)
        with hooks:
            y = torch.native_dropout(a * 2, 0.3, True)[0]
            z = y * y
        if not found:
            assert type(kept_by(y.grad_fn, "result1")) is Bits
        found.append(torch.autograd.grad(z.sum(), a)[0])
    assert torch.equal(*found)
print("agreed")
"""


@pytest.mark.parametrize("script", [BOTH_WAYS, IN_A_GRAPH], ids=["both_ways", "in_a_graph"])
def test_interpreted_masks_agree_with_plain_pytorch(script: str) -> None:
    assert_agrees_interpreted(script)


def kernels(kind: str, rows: int, wide: bool, target: Any) -> dict[str, Any]:
    """All of them, the product for `kind`, built for lengths divisible by 16."""
    from invact.kernels.triton import masks as triton_masks

    n = {"n": "i64" if wide else "i32"}
    shape = {"ROWS": rows, "WIDE": wide, "CHIP": target.backend}
    twice = {**shape, "ROWS": triton_masks.ROWS_A_THREAD * rows}
    packs = {"mask_ptr": "*i1", "bits_ptr": "*u8", **n}
    unpacks = {"bits_ptr": "*u8", "mask_ptr": "*i1", **n}
    drops = {"x_ptr": kind, "bits_ptr": "*u8", "y_ptr": kind, **n, "scale": "fp32"}
    return {
        "pack": compiled(triton_masks.pack_kernel, packs, {**triton_masks.REST[False], **twice}, target),
        "pack with a rest": compiled(triton_masks.pack_kernel, packs, {**triton_masks.REST[True], **twice}, target),
        "unpack": compiled(triton_masks.unpack_kernel, unpacks, twice, target),
        "product": compiled(triton_masks.dropped_kernel, drops, shape, target),
    }


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
def test_they_compile_for_nvidia_with_accesses_of_16_bytes_and_keep_bits_in_registers(
    kind: str, capability: int
) -> None:
    from triton.backends.compiler import GPUTarget

    wide = {"pack": {"ld"}, "pack with a rest": {"ld"}, "unpack": {"st"}, "product": {"ld", "st"}}
    for name, kernel in kernels(kind, 128, False, GPUTarget("cuda", capability, 32)).items():
        code = kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        accesses = set(re.findall(r"(?:ld|st)\.global\S*", code))
        of_16_bytes = {access for access in accesses if ".v4.b32" in access or ".v2.b64" in access}
        assert {access[:2] for access in of_16_bytes} == wide[name]
        assert all(access.endswith(("b8", "b16")) for access in accesses - of_16_bytes)  # bits of one or two rows
        if name != "product" or kind != "*fp32":
            assert kernel.metadata.shared == 0
        if name == "product":
            assert "ftz" not in code  # stock's keeps denormals
            assert not re.findall(r"fma\.\S*f32", code)


def test_they_compile_for_amd() -> None:
    built = built_for_amd(lambda target: kernels("*bf16", 256, False, target))
    for kernel in built.values():
        assert kernel.asm["hsaco"]


def test_masks_of_more_than_2_31_elements_are_addressed_with_64_bits() -> None:
    from triton.backends.compiler import GPUTarget

    for kernel in kernels("*bf16", 128, True, GPUTarget("cuda", 90, 32)).values():
        code = kernel.asm["ptx"]
        assert "mul.wide.u32" in code or "mul.wide.s32" in code
        assert not re.findall(r"setp\.[lg][te]\.[su]32", code)  # what is inside is asked in 64 bits


def test_their_constants_come_in_the_order_of_their_parameters() -> None:
    from invact.kernels.triton import masks as triton_masks

    for kernel, between in (
        (triton_masks.pack_kernel, [*triton_masks.REST[True]]),
        (triton_masks.unpack_kernel, []),
        (triton_masks.dropped_kernel, ["scale"]),
    ):
        names = list(inspect.signature(kernel.fn).parameters)
        assert names[names.index("n") + 1 :] == [*between, "ROWS", "WIDE", "CHIP"]
