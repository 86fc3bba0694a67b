"""One door to gated products, ``act(g) * u``, that are made with their activation in one pass, in stock's every bit."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import may_run_triton
from .own_thread import in_own_thread

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def gated(g: Tensor, u: Tensor, name: str) -> tuple[Tensor, Tensor] | None:
    """``act(g)`` and ``act(g) * u``, in every bit what stock's two operators give; None where they have to do it.

    Args:
        g, u: of any shape, dtype and strides.
        name: of `ACTIVATIONS`.
    """
    if g.dtype.itemsize != 2 or not g.is_floating_point() or u.dtype != g.dtype or u.shape != g.shape:
        return None  # 65,536 values can be looked at
    if not (g.is_contiguous() and u.is_contiguous() and may_run_triton(g) and may_run_triton(u)):
        return None
    if u.device != g.device or not is_as_stock(name, g.dtype, g.device):
        return None
    from .triton import gated as triton_gated

    return triton_gated.gated(g, u, name)


def is_as_stock(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel has been found to give what stock gives, for every value; looked at when it is first asked.

    Looking waits for the device, which nobody may while a CUDA graph is captured.
    """
    key = name, dtype, device
    found = _FOUND.get(key)
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        found = _FOUND[key] = in_own_thread(lambda: _gives_the_same(name, dtype, device))
    return found


_FOUND: dict[tuple[str, torch.dtype, torch.device], bool] = {}


def _gives_the_same(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """The product needs no such look, being exact in fp32 and rounded once, but gets one.

    Where the kernel can not be built or run, the two operators go on as ever.
    """
    try:
        return _every_value_agrees(name, dtype, device)
    except Exception:
        return False


def _every_value_agrees(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    from .triton import gated as triton_gated

    g = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    u = g.flip(0)
    a = ACTIVATIONS[name](g)
    return all(map(_same_bits, triton_gated.gated(g, u, name), (a, a * u)))


def _same_bits(ours: Tensor, stock: Tensor) -> bool:
    """One NaN is as good as another."""
    same = (ours.view(torch.int16) == stock.view(torch.int16)) | (ours.isnan() & stock.isnan())
    return bool(same.all())
