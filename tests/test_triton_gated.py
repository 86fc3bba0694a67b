"""Gated products in Triton, without a GPU: interpreted, against stock's two operators, and compiled for three chips."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from triton_apart import assert_agrees_interpreted, built_for_amd, compiled

ONE_PASS = """
import torch
from invact.kernels import gated
from invact.kernels.triton import gated as triton_gated
from invact.kernels.triton import launch as triton_launch
from torch._subclasses import FakeTensorMode

triton_launch.ROWS = 8192  # the interpreter is slow by program, not by element
for name, activation in gated.ACTIVATIONS.items():
    for dtype in (torch.bfloat16, torch.float16):
        g = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
        # the interpreter changes NaN and denormals of bf16, and from 1e38 on a CPU's own gelu is infinite
        g = g[(g == 0) | ((g.abs() >= torch.finfo(dtype).tiny) & (g.abs() < 1e38) & g.isfinite())]
        u = torch.linspace(-2, 2, len(g)).to(dtype)
        a, h = triton_gated.gated(g, u, name)
        expected = activation(g)
        # numpy's functions are not those of a GPU, and bf16 is cut off
        within = dict(rtol=2 * torch.finfo(dtype).eps, atol=4e-7, equal_nan=True)
        torch.testing.assert_close(a, expected, **within)
        torch.testing.assert_close(h, a * u, **within)

# so they are found not to be stock's, by whoever asks first, and then stock's are used
g = torch.randn(3, 8).half()
with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
    assert gated.is_as_stock("gelu", torch.float16, g.device) is False
assert gated.gated(g, g, "gelu") is None
gated._FOUND["gelu", torch.float16, g.device] = True
a, h = gated.gated(g, g, "gelu")
torch.testing.assert_close(h, a * g)
assert gated.gated(g.float(), g.float(), "gelu") is None
assert gated.gated(g, g[:1], "gelu") is None
assert gated.gated(g, g.bfloat16(), "gelu") is None
assert gated.gated(g.T, g.T, "gelu") is None
print("agreed")
"""


def test_the_interpreted_kernel_agrees_with_two_operators_and_is_not_taken_for_stocks() -> None:
    assert_agrees_interpreted(ONE_PASS)


def kernel(name: str, dtype: torch.dtype, rows: int, wide: bool, target: Any) -> Any:
    from invact.kernels.triton import gated as triton_gated

    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    tensors = dict.fromkeys(("g_ptr", "u_ptr", "a_ptr", "h_ptr"), kind)
    constants = {**triton_gated.CONSTANTS[name], "ROWS": rows, "WIDE": wide, "CHIP": target.backend}
    return compiled(triton_gated.gated_kernel, {**tensors, "n": "i64" if wide else "i32"}, constants, target)


EVERY_ONE = pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])


@EVERY_ONE
@pytest.mark.parametrize(("capability", "dtype"), [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16)])
def test_it_compiles_for_nvidia_with_accesses_of_16_bytes(name: str, capability: int, dtype: torch.dtype) -> None:
    from triton.backends.compiler import GPUTarget

    built = kernel(name, dtype, 128, False, GPUTarget("cuda", capability, 32))
    assert built.asm["cubin"]
    accesses = re.findall(r"(?:ld|st)\.global\S*", built.asm["ptx"])
    assert sorted(access[:2] for access in accesses) == ["ld", "ld", "st", "st"]
    assert all(".v4.b32" in access for access in accesses)
    assert built.metadata.shared == 0


@EVERY_ONE
def test_it_compiles_for_amd(name: str) -> None:
    built = built_for_amd(lambda target: kernel(name, torch.bfloat16, 256, False, target))
    assert built.asm["hsaco"]


def test_gated_products_of_more_than_2_31_elements_are_addressed_with_64_bits() -> None:
    from triton.backends.compiler import GPUTarget

    code = kernel("silu", torch.bfloat16, 128, True, GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "mul.wide.u32" in code or "mul.wide.s32" in code
    assert not re.findall(r"setp\.[lg][te]\.[su]32", code)


def test_its_constants_come_in_the_order_of_its_parameters() -> None:
    from invact.kernels.gated import ACTIVATIONS
    from invact.kernels.triton import gated as triton_gated

    names = list(inspect.signature(triton_gated.gated_kernel.fn).parameters)
    for name in ACTIVATIONS:
        assert names[names.index("n") + 1 :] == [*triton_gated.CONSTANTS[name], "ROWS", "WIDE", "CHIP"]


@pytest.mark.parametrize("wrong", [None, 0, 1], ids=["as stock", "an activation", "a product"])
def test_one_value_that_is_not_stocks_is_found_and_looked_for_once(
    wrong: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invact.kernels import gated
    from invact.kernels.triton import gated as triton_gated

    asked = []

    def kernel(g: torch.Tensor, u: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(name)
        a = gated.ACTIVATIONS[name](g)
        made = a, a * u
        if wrong is not None:
            made[wrong].view(torch.int16)[12345] ^= 1  # of a number
        return made

    monkeypatch.setattr(triton_gated, "gated", kernel)
    monkeypatch.setattr(gated, "_FOUND", {})
    for _ in range(2):
        assert gated.is_as_stock("silu", torch.float16, torch.device("cpu")) == (wrong is None)
    assert asked == ["silu"]
