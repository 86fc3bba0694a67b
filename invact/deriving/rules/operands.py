"""What the node of an operator knows of what the operator read, and the recipe that is made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from invact.deriving.handles import Derived, Handle, Kept
from invact.deriving.rules.registry import Find, Node
from invact.deriving.saved_by_node import kept_by


def operand(node: Node, name: str, edge: int, find: Find) -> Handle | Tensor | None:
    """What an operator read: kept by the node, or at hand from the producer."""
    kept = saved(node, name)
    return produced(node, edge, find) if kept is None else kept


def saved(node: Node, name: str) -> Handle | Tensor | None:
    """What the node itself keeps under this name; a number is a tensor without a handle."""
    data = kept_by(node, name)
    if isinstance(data, Kept):
        return (data.apart or data) if data.may_be_read else None
    return data if isinstance(data, Handle) or (isinstance(data, Tensor) and not data.dim()) else None


def produced(node: Node, edge: int, find: Find) -> Handle | None:
    """What an operator read, from its producer."""
    producer, number = node.next_functions[edge]
    return None if producer is None else find(producer, number)


def settings(node: Node, *names: str) -> list[Any]:
    """What the node keeps under these names and is no tensor, such as a dimension."""
    return [signed(getattr(node, "_saved_" + name)) for name in names]


def signed(value: Any) -> Any:
    """Autograd shows negative dimensions as unsigned numbers."""
    if isinstance(value, tuple):
        return tuple(signed(each) for each in value)
    return value - 2**64 if type(value) is int and value >= 2**63 else value


def derived(
    make: Callable[..., Tensor], *read: Handle | Tensor | None, joins: bool = False, moves: bool = True
) -> Derived | None:
    """The recipe, if all that it reads is there; numbers become settings.

    Args:
        make: makes the tensor of the tensors that are read, in their order, as the operator made it, in every bit.
        read: what the operator read, as `operand`, `saved` or `produced` found it; with a None there is no recipe.
        joins: whether two tensors are added up, so that no sum is made of it in turn.
        moves: whether memory is written; False for a view.
    """
    numbers = False
    for each in read:
        if each is None:
            return None
        numbers = numbers or isinstance(each, Tensor)
    if not numbers:
        return Derived(make, read, joins, moves)  # type: ignore[arg-type]
    make = functools.partial(_with_numbers, make, [None if isinstance(each, Handle) else each for each in read])
    return Derived(make, tuple(each for each in read if isinstance(each, Handle)), joins, moves)


def _with_numbers(make: Callable[..., Tensor], numbers: list[Tensor | None], *tensors: Tensor) -> Tensor:
    rest = iter(tensors)
    return make(*[next(rest) if number is None else number for number in numbers])


def optional(node: Node, name: str, edge: int, find: Find) -> tuple[bool, Handle | None]:
    """Whether a weight or bias can be had, and its handle; a norm may have none."""
    if kept_by(node, name) is None:
        return True, None
    found = operand(node, name, edge, find)
    return found is not None, found if isinstance(found, Handle) else None


def with_optional(
    operator: Callable[..., Tensor], x: Handle | Tensor | None, *optional: tuple[bool, Handle | Tensor | None]
) -> Derived | None:
    """A recipe whose `operator` takes, after x, what may be missing, as the weight and bias of a norm."""
    if not all(had for had, _ in optional):
        return None
    there = [handle is not None for _, handle in optional]
    if all(there):
        return derived(operator, x, *[handle for _, handle in optional])

    def with_what_there_is(x: Tensor, *weights: Tensor) -> Tensor:
        rest = iter(weights)
        return operator(x, *[next(rest) if is_there else None for is_there in there])

    return derived(with_what_there_is, x, *[handle for _, handle in optional if handle is not None])


def surely_laid_out(x: Handle | Tensor | None) -> Handle | None:
    """What is added up in another order is another sum, and does not tell how its summands lay."""
    return x if isinstance(x, Handle) and not x.unsure else None
