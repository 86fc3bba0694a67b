"""Views, which move nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invact.deriving.handles import Derived
from invact.deriving.rules.operands import derived, produced, settings
from invact.deriving.rules.registry import VIEWS, Find, Node, Rule, register

aten = torch.ops.aten


def out_of_order(view: Derived | None) -> Derived | None:
    """A view that need not be contiguous where what it is of is."""
    if view is not None:
        view.keeps_order = False
    return view


def _view(operator: Callable[..., Tensor], *names: str) -> Rule:
    """A view by its settings."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = produced(node, 0, find)
        if x is None:
            return None
        chosen = settings(node, *names)
        return out_of_order(derived(lambda x: operator(x, *chosen), x, moves=False))

    return rule


def _part(operator: Callable[..., tuple[Tensor, ...]], *names: str) -> Rule:
    """One of several views."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = produced(node, 0, find)
        if x is None:
            return None
        chosen = settings(node, *names)
        return out_of_order(derived(lambda x: operator(x, *chosen)[number], x, moves=False))

    return rule


def reshaped(node: Node, number: int, find: Find) -> Derived | None:
    """A view by the shape of what it gave."""
    shape = tuple(node._input_metadata[0].shape)
    return derived(lambda x: x.reshape(shape), produced(node, 0, find), moves=False)


def expanded(node: Node, number: int, find: Find) -> Derived | None:
    shape = tuple(node._input_metadata[0].shape)
    return out_of_order(derived(lambda x: x.expand(shape), produced(node, 0, find), moves=False))


register("AliasBackward0", among=VIEWS)(reshaped)
register("DiagonalBackward0", among=VIEWS)(_view(torch.diagonal, "offset", "dim1", "dim2"))
register("ExpandBackward0", among=VIEWS)(expanded)
register("PermuteBackward0", among=VIEWS)(_view(torch.permute, "dims"))
register("ReshapeAliasBackward0", among=VIEWS)(reshaped)
register("SelectBackward0", among=VIEWS)(_view(torch.select, "dim", "index"))
register("SliceBackward0", among=VIEWS)(_view(aten.slice, "dim", "start", "end", "step"))
register("SplitBackward0", among=VIEWS)(_part(aten.split, "split_size", "dim"))
register("SplitWithSizesBackward0", among=VIEWS)(_part(aten.split_with_sizes, "split_sizes", "dim"))
register("SqueezeBackward0", among=VIEWS)(_view(torch.squeeze))
register("SqueezeBackward1", among=VIEWS)(_view(torch.squeeze, "dim"))
register("SqueezeBackward2", among=VIEWS)(_view(torch.squeeze, "dim"))
register("TBackward0", among=VIEWS)(_view(torch.t))
register("TransposeBackward0", among=VIEWS)(_view(torch.transpose, "dim0", "dim1"))
register("UnbindBackward0", among=VIEWS)(_part(torch.unbind, "dim"))
register("UnfoldBackward0", among=VIEWS)(
    _view(lambda x, dim, size, step: x.unfold(dim, size, step), "dimension", "size", "step")
)
register("UnsafeSplitBackward0", among=VIEWS)(_part(aten.split, "split_size", "dim"))
register("UnsafeSplitWithSizesBackward0", among=VIEWS)(_part(aten.split_with_sizes, "split_sizes", "dim"))
register("UnsafeViewBackward0", among=VIEWS)(reshaped)
register("UnsqueezeBackward0", among=VIEWS)(_view(torch.unsqueeze, "dim"))
register("ViewAsComplexBackward0", among=VIEWS)(_view(torch.view_as_complex))
register("ViewAsRealBackward0", among=VIEWS)(_view(torch.view_as_real))
register("ViewBackward0", among=VIEWS)(reshaped)
