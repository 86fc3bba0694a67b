"""Padding: by what is padded, and by a number, which autograd does not record."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from invact.deriving.handles import Derived
from invact.deriving.rules.operands import derived, produced, settings
from invact.deriving.rules.pointwise import pointwise
from invact.deriving.rules.registry import Find, Node, register

aten = torch.ops.aten


register("ReflectionPad1DBackward0")(pointwise(aten.reflection_pad1d, "padding"))
register("ReflectionPad2DBackward0")(pointwise(aten.reflection_pad2d, "padding"))
register("ReflectionPad3DBackward0")(pointwise(aten.reflection_pad3d, "padding"))
register("ReplicationPad1DBackward0")(pointwise(aten.replication_pad1d, "padding"))
register("ReplicationPad2DBackward0")(pointwise(aten.replication_pad2d, "padding"))
register("ReplicationPad3DBackward0")(pointwise(aten.replication_pad3d, "padding"))


@register("ConstantPadNdBackward0")
def unpadded(node: Node, number: int, find: Find) -> Derived | None:
    """On the way to another tensor: only where no number is written, as where windows fit without a rest."""
    (pad,) = settings(node, "pad")
    if any(each > 0 for each in pad):
        return None
    return derived(lambda x: F.pad(x, pad), produced(node, 0, find))


def padded(tensor: Tensor, node: Node, find: Find) -> Derived | None:
    (pad,), x = settings(node, "pad"), produced(node, 0, find)
    corner = [0] * tensor.dim()
    for place, width in enumerate(pad):
        if width > 0:
            corner[-1 - place // 2] = -(place % 2)  # the first, or the last
    if x is None or not any(width > 0 for width in pad):
        return unpadded(node, 0, find)
    # A tensor, which no device need be waited for, and all that its padding consists of.
    value = tensor.detach()[tuple(corner)].clone()
    return derived(functools.partial(_framed, value, pad, tensor.shape, tensor.stride()), x)


def _framed(value: Tensor, pad: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...], x: Tensor) -> Tensor:
    made = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device).copy_(value)
    inner = made
    for place in range(len(pad) // 2):
        dim, (before, after) = x.dim() - 1 - place, pad[2 * place : 2 * place + 2]
        x = x.narrow(dim, max(-before, 0), x.shape[dim] - max(-before, 0) - max(-after, 0))
        inner = inner.narrow(dim, max(before, 0), inner.shape[dim] - max(before, 0) - max(after, 0))
    inner.copy_(x)
    return made


FILLED: dict[str, Callable[[Tensor, Node, Find], Derived | None]] = {"ConstantPadNdBackward0": padded}
"""Rules for a tensor that is kept, which take from it the number that is not recorded."""
