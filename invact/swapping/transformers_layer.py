"""The layers of transformers, which are checkpointed by a switch of their own."""

from __future__ import annotations

import sys
from typing import Any


def has_own_switch(kind: type) -> bool:
    """Whether a module of this class can be checkpointed by an attribute: a layer of transformers can.

    It knows what it must not be given when it is run once more, such as a cache to write to.
    """
    layer = _layer_with_a_switch()
    return layer is not None and issubclass(kind, layer)


def let_it_be_checkpointed(kind: type) -> None:
    """A layer of transformers is checkpointed only if `forward` is what `__init_subclass__` of theirs has put there."""
    layer = _layer_with_a_switch()
    put_there = vars(layer).get("__init_subclass__") if layer in kind.__mro__ else None
    if put_there is not None:
        put_there.__func__(kind)


def _layer_with_a_switch() -> Any:
    """Their class, or None where nobody has imported it."""
    return getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)
