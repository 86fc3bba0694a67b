"""Casts to other types, and copies."""

from __future__ import annotations

from invact.deriving.distributed_parameters import is_parameter
from invact.deriving.handles import Derived
from invact.deriving.rules.operands import derived, produced
from invact.deriving.rules.registry import Find, Node, register
from invact.pytorch.backward import node_name
from invact.pytorch.tensors import make_contiguous_strides_for


@register("ToCopyBackward0")
def cast(node: Node, number: int, find: Find) -> Derived | None:
    """But a weight's copy is kept as stock keeps it: whoever changes the weight before backward may do so there."""
    to, (producer, output) = node._input_metadata[0], node.next_functions[0]
    if producer is None or producer._input_metadata[output].device != to.device:
        return None
    if node_name(producer) == "torch::autograd::AccumulateGrad" and is_parameter(producer.variable):
        return None
    dtype = to.dtype
    handle = derived(lambda x: x.to(dtype), find(producer, output))
    if handle is not None and producer._input_metadata[output].dtype is dtype:
        handle.unsure = True  # a copy made to lie otherwise
    return handle


@register("CloneBackward0")
def clone(node: Node, number: int, find: Find) -> Derived | None:
    """The tensor itself, laid out as the copy was, which autograd does not record: `contiguous()` makes the same node
    as `clone()`, which keeps the order of the dimensions.

    Where somebody keeps the copy or a view of it, `stride` tells. On the way to another tensor the layout counts too,
    since kernels round differently where they can not read whole vectors: there a copy of what is contiguous is known
    to be so, unless it has channels, which it may have brought last.
    """
    handle = derived(lambda x: x.resolve_conj().resolve_neg(), produced(node, 0, find))
    if handle is not None:
        handle.stride = make_contiguous_strides_for(node._input_metadata[0].shape)
        may_have_channels = len(node._input_metadata[0].shape) in (4, 5)
        handle.unsure = may_have_channels or not handle.sources[0].is_contiguous()
    return handle
