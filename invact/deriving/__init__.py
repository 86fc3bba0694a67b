"""Tensors that autograd would keep for backward are made again from others that it keeps anyway.

`handles` says what is kept in a tensor's stead, `rules` how the output of each operator is made again, and `stead`
which smaller tensor may be kept for one. `hooks` looks at each tensor that is about to be kept, `unpacking` gives it
back, and `placing` says where in a model the hooks are set. Others add an operator by `register`.
"""

from invact.deriving.rules.operands import derived, operand, produced, settings
from invact.deriving.rules.pointwise import pointwise
from invact.deriving.rules.registry import register, unregister

__all__ = ["derived", "operand", "pointwise", "produced", "register", "settings", "unregister"]
