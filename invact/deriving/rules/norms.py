"""Norms, and the statistics that a norm written out in steps takes off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invact.deriving.handles import Derived, Handle, Kept
from invact.deriving.rules.operands import (
    derived,
    operand,
    optional,
    produced,
    saved,
    settings,
    surely_laid_out,
    with_optional,
)
from invact.deriving.rules.registry import ON_THE_WAY, Find, Node, Rule, register
from invact.deriving.saved_by_node import kept_by
from invact.pytorch.backward import node_name

aten = torch.ops.aten


def norm(statistic: str, *names: str) -> Callable[[Rule], Rule]:
    """Registers what makes a norm's first output.

    In the stead of a number it is given what the norm's call said and its node does not know: the `NormSettings` that
    are told with that statistic.
    """

    def registered(function: Rule) -> Rule:
        @register(*names)
        def with_settings(node: Node, number: int, find: Find) -> Derived | None:
            kept = kept_by(node, statistic)
            told = kept.setting if isinstance(kept, Kept) else None
            return None if number or told is None else function(node, told, find)

        return with_settings

    return registered


@norm("result2", "NativeLayerNormBackward0")
def layer_norm(node: Node, told: Any, find: Find) -> Derived | None:
    (shape,) = settings(node, "normalized_shape")
    weight, bias = optional(node, "weight", 1, find), optional(node, "bias", 2, find)
    eps = told.eps
    return with_optional(
        lambda x, w, b: torch.layer_norm(x, shape, w, b, eps), operand(node, "input", 0, find), weight, bias
    )


@norm("result1", "FusedRmsNormBackward0")
def rms_norm(node: Node, told: Any, find: Find) -> Derived | None:
    (shape,) = settings(node, "normalized_shape")
    eps = told.eps
    return with_optional(
        lambda x, w: torch.rms_norm(x, shape, w, eps),
        operand(node, "input", 0, find),
        optional(node, "weight", 1, find),
    )


@norm("result2", "NativeGroupNormBackward0")
def group_norm(node: Node, told: Any, find: Find) -> Derived | None:
    (groups,) = settings(node, "group")
    eps = told.eps
    return with_optional(
        lambda x, w, b: torch.group_norm(x, groups, w, b, eps),
        operand(node, "input", 0, find),
        optional(node, "weight", 1, find),
        _told_bias(told),
    )


def _told_bias(told: Any) -> tuple[bool, Handle | None]:
    """A bias that the node does not keep: its gradient needs no more than dy."""
    if told.bias is None:
        return True, None
    return told.bias.may_be_read, told.bias.apart or told.bias


@norm("result2", "NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def batch_norm(node: Node, told: Any, find: Find) -> Derived | None:
    """From the statistics that are kept; the running ones are not touched."""
    eps, training = told.eps, node._saved_training
    x, weight, bias = operand(node, "input", 0, find), optional(node, "weight", 1, find), _told_bias(told)
    if not training:
        if told.running is None:
            return None
        if math.prod(node._input_metadata[0].shape) < 128 * told.images * told.running[0].numel():
            return None  # the copies, which nobody counts, are to be nothing beside what they make again
        mean, var = (each.repeat(told.images) for each in told.running)
        return with_optional(lambda x, w, b: F.batch_norm(x, mean, var, w, b, eps=eps), x, weight, bias)
    if node_name(node) != "NativeBatchNormBackward0":  # only they themselves know how they round
        return with_optional(lambda x, w, b: F.batch_norm(x, None, None, w, b, True, eps=eps), x, weight, bias)
    mean, invstd = saved(node, "result1"), saved(node, "result2")
    return with_optional(
        lambda x, w, b, mean, invstd: _batch_normed(x, w, b, mean, invstd, eps),
        x, weight, bias, (mean is not None, mean), (invstd is not None, invstd),
    )  # fmt: skip


def _batch_normed(x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    if x.is_cuda:
        return aten.batch_norm_elemt(x, w, b, mean, invstd, eps)  # type: ignore[no-any-return]
    # As the two kernels for CPUs do it. One takes things as they lie and rounds at each step.
    along = [1, -1] + [1] * (x.dim() - 2)
    if not lies_as_usual(x):
        normed = (x - mean.view(along)) * invstd.view(along)
        normed = normed if w is None else normed * w.view(along)
        return (normed if b is None else normed + b.view(along)).to(x.dtype)
    # The other has one product and sum per element, with both factors worked out before.
    wide = torch.promote_types(torch.float32, x.dtype)
    mean, scale = mean.to(wide), invstd.to(wide)
    scale = scale if w is None else scale * w.to(wide)
    shift = torch.addcmul(torch.zeros_like(mean) if b is None else b.to(wide), mean, scale, value=-1)
    return torch.addcmul(shift.view(along), x.to(wide), scale.view(along)).to(x.dtype)


def lies_as_usual(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


@register("WeightNormInterfaceBackward0")
def normed_weight(node: Node, number: int, find: Find) -> Derived | None:
    if number:
        return None
    (dim,) = settings(node, "dim")
    v, g = operand(node, "v", 0, find), operand(node, "g", 1, find)
    return derived(lambda v, g: torch._weight_norm_interface(v, g, dim)[0], v, g)


@register("MeanBackward1", "SumBackward1", among=ON_THE_WAY)
def along_a_row(node: Node, number: int, find: Find) -> Derived | None:
    """A mean, say, that a norm written out in steps takes off."""
    dim, keepdim = settings(node, "dim", "keepdim")
    if dim is None or len(dim) != 1 or not keepdim:
        return None
    operator = torch.mean if node_name(node) == "MeanBackward1" else torch.sum
    dtype = node._input_metadata[0].dtype
    return derived(lambda x: operator(x, dim, keepdim=True, dtype=dtype), surely_laid_out(produced(node, 0, find)))


@register("VarBackward0", among=ON_THE_WAY)
def variance_along_a_row(node: Node, number: int, find: Find) -> Derived | None:
    dim, keepdim, correction = settings(node, "dim", "keepdim", "correction")
    if dim is None or len(dim) != 1 or not keepdim:
        return None
    x = surely_laid_out(operand(node, "self", 0, find))
    return derived(lambda x: torch.var(x, dim, correction=correction, keepdim=True), x)
