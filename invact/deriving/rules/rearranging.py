"""Operators that put what is there together, or in another order."""

from __future__ import annotations

import torch

from invact.deriving.handles import Derived
from invact.deriving.rules.operands import derived, produced, settings
from invact.deriving.rules.pointwise import pointwise
from invact.deriving.rules.registry import Find, Node, register
from invact.deriving.rules.views import out_of_order
from invact.pytorch.backward import node_name


@register("CatBackward0", "StackBackward0")
def cat_or_stack(node: Node, number: int, find: Find) -> Derived | None:
    (dim,) = settings(node, "dim")
    stacked = node_name(node) == "StackBackward0"
    edges = [edge for edge, (producer, _) in enumerate(node.next_functions) if producer is not None or stacked]
    if len(edges) < len(node.next_functions) and not _fill(node, dim, edges):
        return None
    operator = torch.stack if stacked else torch.cat
    handle = derived(lambda *parts: operator(parts, dim), *[produced(node, edge, find) for edge in edges])
    if handle is not None and len(edges) < len(node.next_functions):
        handle.unsure = True  # the empty one may have told how all lies
    return handle


def _fill(node: Node, dim: int, edges: list[int]) -> bool:
    """Whether these operands are all of what a cat gave: a cache of keys, say, begins with an empty tensor."""
    whole = node._input_metadata[0]
    parts = [producer._input_metadata[output] for producer, output in (node.next_functions[edge] for edge in edges)]
    if any(part.dtype is not whole.dtype or len(part.shape) != len(whole.shape) for part in parts):
        return False
    filled: int = sum(part.shape[dim] for part in parts)
    return filled == int(whole.shape[dim])


@register("RollBackward0")
def rolled(node: Node, number: int, find: Find) -> Derived | None:
    shifts, dims = settings(node, "shifts", "dims")
    return derived(lambda x: torch.roll(x, shifts, dims), produced(node, 0, find))


@register("Rot90Backward0")
def turned(node: Node, number: int, find: Find) -> Derived | None:
    k, dims = settings(node, "k", "dims")
    return out_of_order(derived(lambda x: torch.rot90(x, k, dims), produced(node, 0, find)))


@register("FlipBackward0")
def flipped(node: Node, number: int, find: Find) -> Derived | None:
    (dims,) = settings(node, "dims")
    return derived(lambda x: torch.flip(x, dims), produced(node, 0, find))


register("RepeatBackward0")(pointwise(lambda x, repeats: x.repeat(repeats), "repeats"))
