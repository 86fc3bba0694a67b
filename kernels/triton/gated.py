"""``a = act(g)`` and ``h = a * u`` of 16-bit tensors in one pass, in Triton: both outputs as stock's two operators.

In every bit, if all goes well: the activations are written as PyTorch's kernels are, on the functions of NVIDIA's
libdevice, which is what nvcc makes of `std::exp`, `erf` and `tanh` there (on ROCm, OCML). For sm_90 the machine code of
each is, instruction by instruction, that of PyTorch 2.14's, but that denormals on the way to `1 + ...` are 0. The
exponential of `math` is as exact, but errs elsewhere. Nothing binds either compiler to go on so: `gated` looks
at every value of a type before it uses these.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,misc,no-untyped-call"
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .launch import Constants, launch, row_offsets

NAMES = ("silu", "gelu", "gelu_tanh")


@triton.jit
def exponential(x, CHIP: tl.constexpr):
    return tl.exp(x) if CHIP == "interpreter" else libdevice.exp(x)


@triton.jit
def error_function(x, CHIP: tl.constexpr):
    return tl.erf(x) if CHIP == "interpreter" else libdevice.erf(x)


@triton.jit
def hyperbolic_tangent(x, CHIP: tl.constexpr):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0) if CHIP == "interpreter" else libdevice.tanh(x)


@triton.jit
def activation(x, CURVE: tl.constexpr, CHIP: tl.constexpr):
    """In the order of steps of `ActivationSiluKernel.cu` and `ActivationGeluKernel.cu`."""
    if CURVE == "silu":
        y = tl.math.div_rn(x, 1.0 + exponential(-x, CHIP))
    elif CURVE == "gelu":
        y = x * 0.5 * (1.0 + error_function(x * 0.7071067811865476, CHIP))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        y = 0.5 * x * (1.0 + hyperbolic_tangent(inner, CHIP))
    return y


@triton.jit
def gated_kernel(
    g_ptr,
    u_ptr,
    a_ptr,
    h_ptr,
    n,
    CURVE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    CHIP: tl.constexpr,
):
    _, offsets = row_offsets(ROWS, WIDE)
    inside = offsets < n
    g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    a = activation(g, CURVE, CHIP).to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + offsets, a, mask=inside)
    tl.store(h_ptr + offsets, (a.to(tl.float32) * u).to(h_ptr.dtype.element_ty), mask=inside)


CONSTANTS: dict[str, Constants] = {name: {"CURVE": name} for name in NAMES}


def gated(g: Tensor, u: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """``act(g)`` and ``act(g) * u`` of contiguous tensors of one shape and 16-bit dtype."""
    a, h = torch.empty_like(g), torch.empty_like(g)
    if n := g.numel():
        launch(gated_kernel, CONSTANTS[name], (g, u, a, h), n)
    return a, h
