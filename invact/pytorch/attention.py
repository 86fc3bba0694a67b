"""Attention as PyTorch has it: the functions that F names, its kernels, and what a mode sees of them."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from invact.pytorch.version_check import found

# The attention that F names, before anybody patches that name: attention on a GPU could not be told from others.
stock_attention: Callable[..., Tensor] = found(found(torch._C, "_nn"), "scaled_dot_product_attention")

# Its kernels, by what they keep for backward: plans for a GPU would count an N x N matrix, or none.
flash_attention: Callable[..., Any] = found(torch.ops.aten, "_scaled_dot_product_flash_attention")
efficient_attention: Callable[..., Any] = found(torch.ops.aten, "_scaled_dot_product_efficient_attention")
math_attention: Callable[..., Any] = found(torch.ops.aten, "_scaled_dot_product_attention_math")

# nn.MultiheadAttention's function as PyTorch has it, which hides its operations from a mode: see `seen_by_modes`.
stock_multi_head_attention: types.FunctionType = found(functional, "multi_head_attention_forward")

# What that function asks first, which `seen_by_modes` answers otherwise: its operations would stay hidden.
found(functional, "has_torch_function")


def seen_by_modes(function: types.FunctionType) -> types.FunctionType:
    """A function of torch.nn.functional whose operations a mode sees, though it would go to the mode as a whole.

    Nothing of PyTorch's is changed: the copy has its own globals, in which it is told that there is no mode.
    """
    own_globals = {**function.__globals__, "has_torch_function": lambda values: False}
    copied = types.FunctionType(
        function.__code__, own_globals, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied
