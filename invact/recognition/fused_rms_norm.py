"""An RMS norm, and how PyTorch's fused operator runs it in the place of steps.

Written out, as in Llama, T5 and Gemma, a norm goes over its tensor some ten times forward and more often backward, most
of that in 32 bits. `torch.nn.functional.rms_norm` is one kernel on a GPU: it reads and writes the tensor once, works in
32 bits and rounds once: as near to the true value as the steps or nearer, and not what they give in every bit.

Formula: y = w x / sqrt(mean(x^2) + eps), Zhang & Sennrich, arXiv 1910.07467.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invact.pytorch.circumstances import transforms_active
from invact.pytorch.operators import has_fused_rms_norm
from invact.pytorch.tensors import is_traceable_wrapper_subclass
from invact.recognition.dependencies import Dependencies

_RANKS = (2, 3, 4)  # of the tensors that a norm in steps is tried with


_ACCESSES = 7
"""Of each element by the fused operator: x and y forward; x and dy, each for dx and for dw, and dx backward."""


@dataclass(frozen=True)
class RmsNorm:
    """An RMS norm over the last dimension.

    Attributes:
        weight: the name of the module's parameter.
        eps: is added to the mean square.
        offset: is added to the weight: 0, or 1 as in Gemma.
    """

    weight: str
    eps: float
    offset: int = 0

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """The norm of x, of (..., width), by the fused operator, in x's dtype and rounded once.

        `weight` is of (width,) and, without an offset, of x's dtype.
        """
        shape = weight.shape
        if not self.offset:
            return F.rms_norm(x, shape, weight, self.eps)
        # In 16 bits 1 + w would lose most digits of a small w.
        return F.rms_norm(x.float(), shape, self.offset + weight.float(), self.eps).to(x.dtype)

    def accesses(self, dtype: torch.dtype) -> int:
        """Bytes read and written for each element, forward and backward."""
        if self.offset and dtype.itemsize == 2:
            return 4 * _ACCESSES + 4 * (4 + 2)  # casts of x, y and their gradients
        return dtype.itemsize * _ACCESSES

    def in_float64(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same by the formula, worked out and given in fp64."""
        x, weight = x.double(), weight.double()
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.offset + weight)


@dataclass(frozen=True)
class Fusion:
    """How a norm is run by the fused operator.

    Attributes:
        norm: what is computed there.
        dependencies: what the module's code reads besides its input. While it is anything else, the stock code runs.
    """

    norm: RmsNorm
    dependencies: Dependencies

    def applies(self, module: nn.Module, x: Any, device: torch.device) -> bool:
        """Whether `x`, which lies on `device` or is planned to, is to be normed here and not by the stock code."""
        if not isinstance(x, Tensor) or not has_fused_rms_norm(device) or x.layout is not torch.strided or x.is_nested:
            return False
        if x.dim() not in _RANKS or not x.is_contiguous():
            return False  # not looked at; and the fused operator does not give the steps' strides
        weight = getattr(module, self.norm.weight, None)
        if not isinstance(weight, Tensor) or weight.dtype is not x.dtype or x.shape[-1:] != weight.shape:
            return False  # of two dtypes: what stock gives has the wider one
        if x.dtype.itemsize > 4 or weight.device != x.device or torch.compiler.is_compiling() or transforms_active():
            return False
        if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
            return False
        if x.dtype.itemsize == 2 and torch.is_autocast_enabled(x.device.type):
            return False  # which has rules of its own for the fused operator
        plain = not any(type(each) is not Tensor and is_traceable_wrapper_subclass(each) for each in (x, weight))
        return plain and self.dependencies.unchanged(module)

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.norm(x, getattr(module, self.norm.weight))
