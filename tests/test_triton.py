"""The Triton pair without a GPU: through the interpreter against the PyTorch pair, and compiled for three chips."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from invact.kernels import CURVES

triton = pytest.importorskip("triton")

COMPARISON = """
import torch
from invact.kernels import CURVES, pytorch, triton_pair

triton_pair.ROWS = 8192  # the interpreter is slow by program, not by element

def steps(values, others):
    kind = {2: torch.int16, 4: torch.int32}[values.element_size()]
    def place(floats):
        number = floats.contiguous().view(kind).long()
        return torch.where(number < 0, -(number & torch.iinfo(kind).max), number)
    return (place(values) - place(others)).abs()

for name, curve in CURVES.items():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite() & curve.f(x).isfinite()]
        y, side = triton_pair.forward(x, curve)
        expected, expected_side = curve.f(x), pytorch.sides(x, curve)
        assert torch.equal(side, expected_side), (name, dtype)
        # the interpreter cuts bf16 off where a GPU rounds it: one unit in the last place
        error = (y.double() - expected.double()).abs()
        assert (error <= 1e-6 + expected.double().abs() * torch.finfo(dtype).eps).all(), (name, dtype, error.max())

        dy = torch.linspace(-2, 2, x.numel()).to(dtype)
        dx = triton_pair.backward(dy, expected, side, curve)
        reference = pytorch.backward(dy, expected, side, curve)
        assert dx.isfinite().all(), (name, dtype)
        error = (dx.double() - reference.double()).abs()
        assert (error <= 1e-6 + reference.double().abs() * torch.finfo(dtype).eps).all(), (name, dtype, error.max())
        if dtype == torch.float16:
            assert (dx == reference).double().mean() > 0.999, (name, dtype)

    x = torch.cat([torch.linspace(-30, 30, 10007), torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1e30, -1e30])])
    y, side = triton_pair.forward(x, curve)
    torch.testing.assert_close(y, curve.f(x), atol=2e-6, rtol=1e-6)
    dx = triton_pair.backward(torch.ones_like(x), curve.f(x), side, curve)
    torch.testing.assert_close(dx, pytorch.backward(torch.ones_like(x), curve.f(x), side, curve), atol=1e-6, rtol=1e-6)
print("agreed")
"""

LAYOUTS = """
import torch
from invact import functional
from invact.kernels import dispatch

image = torch.randn(3, 5, 4, 7)
assert dispatch.triton_pair_for(image) is not None
assert dispatch.triton_pair_for(image.double()) is None
for x in (image, image.to(memory_format=torch.channels_last), image[:, ::2, :, 1:], image[:1].expand(6, -1, -1, -1),
          image[0, 0, 0, 0], image[:0]):
    x = x.detach().requires_grad_()
    y = functional.gelu(x)
    stock = torch.nn.functional.gelu(x)
    assert y.stride() == stock.stride()
    torch.testing.assert_close(y, stock)
    dy = torch.randn(y.shape)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, stock)), atol=1e-3, rtol=1e-3)
print("agreed")
"""


@pytest.mark.parametrize("script", [COMPARISON, LAYOUTS], ids=["every_16_bit_value", "every_layout"])
def test_the_interpreted_pair_agrees_with_the_pytorch_pair(script: str) -> None:
    # Triton reads TRITON_INTERPRET when it is imported: it needs a process of its own
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("agreed"), done.stderr[-3000:]


def compiled(kernel: Any, tensors: dict[str, str], constants: dict[str, Any], target: Any) -> Any:
    """A kernel built for a chip that need not be there, with pointers and lengths divisible by 16."""
    from triton.compiler import ASTSource

    names = list(inspect.signature(kernel.fn).parameters)
    aligned = [names.index(name) for name in tensors]
    if "constexprs" in inspect.signature(ASTSource.__init__).parameters:
        source = ASTSource(
            fn=kernel,
            signature={name: tensors.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
    else:
        from triton.backends.compiler import AttrsDescriptor

        divisible = AttrsDescriptor.from_dict(
            {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
        )
        source = ASTSource(fn=kernel, signature=tensors, constants=constants, attrs=divisible)
    return triton.compile(source, target=target)


def kernels(name: str, dtype: torch.dtype, rows: int, wide: bool, target: Any) -> list[Any]:
    from invact.kernels import triton_pair

    kind = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    length = {"n": "i64" if wide else "i32"}
    shape = {"ROWS": rows, "WIDE": wide}
    forward = {"x_ptr": kind, "y_ptr": kind, "side_ptr": "*u8", **length}
    backward = {"dy_ptr": kind, "y_ptr": kind, "side_ptr": "*u8", "dx_ptr": kind, **length}
    return [
        compiled(triton_pair.forward_kernel, forward, {"LEFT_END": -0.75, "CURVE": name, **shape}, target),
        compiled(triton_pair.backward_kernel, backward, {**triton_pair.constants(name, dtype), **shape}, target),
    ]


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernels_compile_for_nvidia_with_accesses_of_16_bytes(
    name: str, capability: int, dtype: torch.dtype
) -> None:
    from triton.backends.compiler import GPUTarget

    for kernel in kernels(name, dtype, 128, False, GPUTarget("cuda", capability, 32)):
        code = kernel.asm["ptx"]
        assert kernel.asm["cubin"]
        accesses = set(re.findall(r"(?:ld|st)\.global\S*", code))
        wide = {access for access in accesses if ".v4.b32" in access}
        assert {access[:2] for access in wide} == {"ld", "st"}
        assert all(access.endswith("b8") for access in accesses - wide)  # the bits
        if dtype.itemsize == 2:
            assert kernel.metadata.shared == 0  # the bits are packed in registers


@pytest.mark.parametrize("name", CURVES)
def test_the_kernels_compile_for_amd(name: str) -> None:
    from triton.backends.compiler import GPUTarget

    try:
        built = kernels(name, torch.bfloat16, 256, False, GPUTarget("hip", "gfx942", 64))
    except Exception as error:
        if "ld.lld not found" in str(error):
            pytest.skip("this version of Triton needs ROCm's linker to build for AMD")
        raise
    for kernel in built:
        assert kernel.asm["hsaco"]


def test_more_than_2_31_elements_are_addressed_with_64_bits() -> None:
    from invact.kernels.triton_pair import wide
    from triton.backends.compiler import GPUTarget

    assert not wide(2**31 - 2048)
    assert wide(2**31)
    assert kernels("gelu", torch.bfloat16, 128, True, GPUTarget("cuda", 90, 32))
