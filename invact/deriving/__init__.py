"""Tensors that autograd would keep for backward are made again from others that it keeps anyway.

`handles` says what is kept in a tensor's stead, `rules` how the output of each operator is made again, and `stand_ins`
which smaller tensor may be kept for one. `hooks` looks at each tensor that is about to be kept, `searching` for what
its recipe reads; `unpacking` gives it back, and `hooked_modules` says where in a model the hooks are set. Others add an
operator by `register`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invact.deriving.rules.operands import derived, operand, produced, settings
    from invact.deriving.rules.pointwise import pointwise
    from invact.deriving.rules.registry import register, unregister

__all__ = ["derived", "operand", "pointwise", "produced", "register", "settings", "unregister"]

# Loaded at first use: a report, which names what is derived, need not wait for torch.
_HOME = {
    "derived": "operands",
    "operand": "operands",
    "pointwise": "pointwise",
    "produced": "operands",
    "register": "registry",
    "settings": "operands",
    "unregister": "registry",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"invact.deriving.rules.{_HOME[name]}"), name)
    raise AttributeError(f"module 'invact.deriving' has no attribute {name!r}")
