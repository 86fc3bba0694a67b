"""The Triton pair without a GPU: through the interpreter against the PyTorch pair, and compiled for three chips."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_apart import assert_agrees_interpreted, built_for_amd, compiled

from invact.kernels import CURVES, Curve
from invact.kernels.curves.monotone import Monotone
from invact.kernels.curves.two_sided import TwoSided

COMPARISON = """
import torch
from exactness import errors_and_floors
from invact.kernels import CURVES, dispatch
from invact.kernels.curves import monotone_families
from invact.kernels.pytorch import activation_kernels as pytorch
from invact.kernels.triton import launch as triton_launch
from invact.kernels.triton import activation_kernels as triton_pair
from invact.kernels.pytorch.packing import packed
from invact.kernels.curves.two_sided import TWO_SIDED

triton_launch.ROWS = 8192  # the interpreter is slow by program, not by element

def steps(values, others):
    kind = {2: torch.int16, 4: torch.int32}[values.element_size()]
    def place(floats):
        number = floats.contiguous().view(kind).long()
        return torch.where(number < 0, -(number & torch.iinfo(kind).max), number)
    return (place(values) - place(others)).abs()

for curve in TWO_SIDED:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite() & curve.f(x).isfinite()].sort().values
        y, side = triton_pair.forward(x, curve)
        expected, expected_side = curve.f(x), pytorch.packed_sides(x, curve)
        assert torch.equal(side, expected_side), (curve, dtype)
        # the interpreter cuts bf16 off where a GPU rounds it: one unit in the last place
        error = (y.double() - expected.double()).abs()
        assert (error <= 1e-6 + expected.double().abs() * torch.finfo(dtype).eps).all(), (curve, dtype, error.max())

        # in fewer operations than the PyTorch pair, so by the floor; in fp32, which is not cut off
        dx = torch.empty(x.shape)
        operands = torch.ones_like(expected), expected, expected_side, dx
        constants = triton_pair.backward_constants(curve, dtype)
        triton_launch.launch(triton_pair.backward_kernel, constants, operands, len(x))
        assert dx.isfinite().all(), (curve, dtype)
        for deviation in (1.0, 3.0):
            errors, floors = errors_and_floors(x, expected, dx.to(dtype), curve, deviation)
            assert errors.norm <= 1.08 * floors.norm, (curve, dtype, errors.norm / floors.norm)
            assert errors.largest <= 1.2 * floors.largest, (curve, dtype, errors.largest / floors.largest)
        far = expected > 20
        assert (dx.to(dtype)[far] == 1).all(), (curve, dtype)

    x = torch.cat([torch.linspace(-30, 30, 10007), torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1e30, -1e30])])
    y, side = triton_pair.forward(x, curve)
    assert torch.equal(side, pytorch.packed_sides(x, curve)), curve
    torch.testing.assert_close(y, curve.f(x), atol=2e-6, rtol=1e-6)
    ones, y = torch.ones_like(x), curve.f(x)
    dx = triton_pair.backward(ones, y, side, curve)
    torch.testing.assert_close(dx, pytorch.backward(ones, y, side, curve), atol=1e-6, rtol=1e-6)

    # y as any library may give it: zeros of either sign, below the minimum, above 0 on the left
    odd = torch.tensor([0.0, 1e-45, 1e-38, 1e-7, 3e-7, 1e-3, 1e4, 1e30, 3e38])
    y = torch.cat([torch.linspace(-0.5, 20, 9999), curve.y_min + torch.arange(-400, 400) * 2.0**-26, odd, -odd])
    finite = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for y in (y, finite.view(torch.bfloat16), finite.view(torch.float16)):
        y = y[y.isfinite() & ((y == 0) | (y.abs() >= 2.0**-126))]  # the interpreter takes bf16's denormals as 0
        for right in (False, True):
            side = packed(torch.full(y.shape, right))
            dx, reference = (pair.backward(torch.ones_like(y), y, side, curve) for pair in (triton_pair, pytorch))
            assert dx.isfinite().all(), (curve, y.dtype, right)
            error = (dx.double() - reference.double()).abs()
            within = 1e-5 + reference.double().abs() * torch.finfo(y.dtype).eps
            if y.dtype.itemsize == 2:  # fewer operations, and only where a library's y may be
                error = error[(y.double() >= 1.02 * curve.y_min) & ((y < 1) | right)]
                within = 8 * torch.finfo(torch.float16).eps if y.dtype == torch.float16 else 0.02  # as the floor has it
            assert (error <= within).all(), (curve, y.dtype, right, error.max())

for curve in (*CURVES.values(), monotone_families.elu(0.7), monotone_families.celu(2.0),
              monotone_families.leaky_relu(0.3), monotone_families.hardtanh(-0.3, 0.7),
              monotone_families.softplus(2.0)):
    if curve.has_side:
        continue
    assert dispatch.has_triton_kernel(curve)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        odd = torch.tensor([0.0, -0.0, 1e-30, torch.inf, -torch.inf, torch.nan])
        x = torch.cat([torch.linspace(-30, 30, 10007), odd])
        y, side = dispatch.forward(x.to(dtype), curve)
        assert torch.equal(y.nan_to_num(), curve.f(x.to(dtype)).nan_to_num())
        assert side.numel() == 0
        dy = torch.linspace(-2, 2, x.numel()).to(dtype)
        dx, reference = (pair.backward(dy, y, side, curve) for pair in (triton_pair, pytorch))
        assert torch.equal(dx.isnan(), reference.isnan()), curve
        whole = reference.isfinite() & dx.isfinite()
        assert (steps(dx, reference)[whole] <= 2).all(), (curve, dtype, steps(dx, reference)[whole].max())
print("agreed")
"""

LAYOUTS = """
import torch
from invact import functional
from invact.kernels import CURVES, dispatch
from invact.kernels.curves import monotone_families

gelu = CURVES["gelu"]
image = torch.randn(3, 5, 4, 7)
assert dispatch.triton_pair_for(image, gelu) is not None
assert dispatch.triton_pair_for(image.double(), gelu) is None
assert dispatch.triton_pair_for(image, monotone_families.softplus(threshold=1.0)) is None
line = torch.randn(1001)
for x in (image, image.to(memory_format=torch.channels_last), image[:, ::2, :, 1:], image[:1].expand(6, -1, -1, -1),
          image[0, 0, 0, 0], image[:0], line[::2], line[:1].expand(77), image.transpose(1, 3)):
    x = x.detach().requires_grad_()
    y = functional.gelu(x)
    stock = torch.nn.functional.gelu(x)
    assert y.stride() == stock.stride()
    torch.testing.assert_close(y, stock)
    wider = torch.randn([2 * size for size in y.shape] + [2])
    gradients = [
        torch.randn(y.shape),
        torch.ones(()).expand(y.shape),  # what a sum sends back
        wider[(*(slice(None, None, 2) for _ in y.shape), 0)],
        torch.randn(y.shape[::-1]).permute([*range(y.dim())][::-1]),
    ]
    for dy in gradients:
        torch.testing.assert_close(*(torch.autograd.grad(out, x, dy, retain_graph=True)[0] for out in (y, stock)),
                                   atol=1e-3, rtol=1e-3)
    own = torch.autograd.grad(functional.gelu(x).sum(), x)[0]
    torch.testing.assert_close(own, torch.autograd.grad(stock.sum(), x)[0], atol=1e-3, rtol=1e-3)
print("agreed")
"""


@pytest.mark.parametrize("script", [COMPARISON, LAYOUTS], ids=["every_16_bit_value", "every_layout"])
def test_the_interpreted_pair_agrees_with_the_pytorch_pair(script: str) -> None:
    assert_agrees_interpreted(script)


def kernels(curve: Curve, dtype: torch.dtype, rows: int, wide: bool, target: Any) -> list[Any]:
    from invact.kernels.triton import activation_kernels as triton_pair

    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    length = {"n": "i64" if wide else "i32"}
    shape = {"ROWS": rows, "WIDE": wide, "CHIP": target.backend}
    if isinstance(curve, Monotone):
        backward = {"dy_ptr": kind, "y_ptr": kind, "dx_ptr": kind, **length}
        constants = {**triton_pair.monotone_constants(curve, dtype), **shape}
        return [compiled(triton_pair.monotone_backward_kernel, backward, constants, target)]
    assert isinstance(curve, TwoSided)
    forward = {"x_ptr": kind, "y_ptr": kind, "side_ptr": "*u8", **length}
    backward = {"dy_ptr": kind, "y_ptr": kind, "side_ptr": "*u8", "dx_ptr": kind, **length}
    return [
        compiled(triton_pair.forward_kernel, forward, {**triton_pair.forward_constants(curve, dtype), **shape}, target),
        compiled(
            triton_pair.backward_kernel, backward, {**triton_pair.backward_constants(curve, dtype), **shape}, target
        ),
    ]


EVERY_CURVE = pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES.keys())


@EVERY_CURVE
@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.float32), (80, torch.bfloat16), (90, torch.bfloat16)])
def test_the_kernels_compile_for_nvidia_with_accesses_of_16_bytes(
    curve: Curve, capability: int, dtype: torch.dtype
) -> None:
    from triton.backends.compiler import GPUTarget

    for kernel in kernels(curve, dtype, 128, False, GPUTarget("cuda", capability, 32)):
        code = kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        accesses = set(re.findall(r"(?:ld|st)\.global\S*", code))
        wide = {access for access in accesses if ".v4.b32" in access}
        assert {access[:2] for access in wide} == {"ld", "st"}
        assert all(access.endswith("b8") for access in accesses - wide)  # the sides of a row
        if dtype.itemsize == 2:
            assert kernel.metadata.shared == 0  # the bits are packed in registers


@EVERY_CURVE
def test_the_kernels_compile_for_amd(curve: Curve) -> None:
    built = built_for_amd(lambda target: kernels(curve, torch.bfloat16, 256, False, target))
    for kernel in built:
        assert kernel.asm["hsaco"]


def test_more_than_2_31_elements_are_addressed_with_64_bits() -> None:
    from triton.backends.compiler import GPUTarget

    from invact.kernels.triton.launch import wide

    assert not wide(2**31 - 2048)
    assert wide(2**31)
    for kernel in kernels(CURVES["gelu"], torch.bfloat16, 128, True, GPUTarget("cuda", 90, 32)):
        code = kernel.asm["ptx"]
        assert "mul.wide.u32" in code or "mul.wide.s32" in code  # the program's number, before it can overflow
        assert not re.findall(r"setp\.\w+\.[su]32", code)  # what is inside is asked in 64 bits


def test_the_constants_of_a_kernel_come_in_the_order_of_its_parameters() -> None:
    from invact.kernels.triton import activation_kernels as triton_pair

    gelu, elu = CURVES["gelu"], CURVES["elu"]
    assert isinstance(gelu, TwoSided)
    assert isinstance(elu, Monotone)
    for kernel, constants in (
        (triton_pair.forward_kernel, triton_pair.forward_constants(gelu, torch.bfloat16)),
        (triton_pair.backward_kernel, triton_pair.backward_constants(gelu, torch.bfloat16)),
        (triton_pair.monotone_backward_kernel, triton_pair.monotone_constants(elu, torch.bfloat16)),
    ):
        names = list(inspect.signature(kernel.fn).parameters)
        assert names[names.index("n") + 1 :] == [*constants, "ROWS", "WIDE", "CHIP"]


# Issued instructions per element: an H200 has time for 49 while it copies what the backward pass of 16 bits moves
@pytest.mark.parametrize(("name", "most"), [("gelu", (26, 40)), ("silu", (18, 40)), ("mish", (20, 40))])
def test_the_kernels_of_16_bits_have_no_more_instructions_than_a_copy_leaves_time_for(
    name: str, most: tuple[int, int], tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not disassembler.exists():
        pytest.skip("this Triton comes without nvdisasm")
    for kernel, limit in zip(
        kernels(CURVES[name], torch.bfloat16, 128, False, GPUTarget("cuda", 90, 32)), most, strict=True
    ):
        binary = tmp_path / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        code = subprocess.run([disassembler, "-c", binary], capture_output=True, text=True, check=True).stdout
        instructions = re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", code)
        assert sum(each != "NOP" for each in instructions) / 8 <= limit
