"""Gradient checkpointing switched on, and back to what it was, by the switch that each `Library` knows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .registry import libraries

_NOTHING = object()


def can_checkpoint(model: nn.Module) -> bool:
    """Whether the model has a switch for gradient checkpointing, and it works; asking leaves it as it stood."""
    try:
        with checkpointed(model):
            return True
    except (AssertionError, AttributeError, NotImplementedError, ValueError):  # as the libraries refuse
        return False


def enable_checkpointing(model: Any) -> None:
    """Recompute the model's blocks in backward, by PyTorch's checkpointing without reentrance.

    Raises:
        AttributeError: the model has no switch for that. One that it has may refuse as its library does.
    """
    if not any(library.checkpoint(model) for library in libraries.values()):
        raise AttributeError(
            f"{type(model).__name__} has no switch for gradient checkpointing, as models of {', '.join(libraries)} "
            "have it. Checkpoint its blocks with torch.utils.checkpoint."
        )


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """`enable_checkpointing` for the length of a block.

    Afterwards everything that the switch had changed is what it was before: where the user had checkpointing on, of
    some layers or all, it is on as it was. The libraries' own switches for "off" do not do that.
    """
    before = [(slots, dict(slots)) for module in model.modules() for slots in _slots(module)]
    undo: list[tuple[dict[Any, Any], dict[Any, Any], Any]] = []
    try:
        try:
            enable_checkpointing(model)
        finally:
            undo = [(slots, was, name) for slots, was in before for name in _changed(slots, was)]
        yield
    finally:
        for slots, was, name in undo:
            if name in was:
                slots[name] = was[name]
            else:
                slots.pop(name, None)


def _slots(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """Where a switch leaves its mark: the module's attributes, and the dicts of its hooks among them."""
    yield vars(module)
    yield from (value for value in vars(module).values() if type(value) in (dict, OrderedDict))


def _changed(slots: dict[Any, Any], was: dict[Any, Any]) -> list[Any]:
    names = {**was, **slots}
    return [name for name in names if slots.get(name, _NOTHING) is not was.get(name, _NOTHING)]
