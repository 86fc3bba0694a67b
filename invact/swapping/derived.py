"""The class of a module with hooks on what autograd keeps while it runs, so that tensors are derived, or are not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from invact.deriving.hooks import Deriving, is_deriving, may_derive
from invact.errors.own_errors import users_call
from invact.swapping.class_over import class_over, shared_class, sites_below
from invact.swapping.patched import Patched, is_patched


def deriving_class(below: type[nn.Module], allowed: bool, by_call: bool) -> type:
    """Of a module inside which tensors are derived, or, with `allowed` False, are not.

    Args:
        below: the class that the module has.
        allowed: whether they are.
        by_call: somebody has put another forward on this one module, so that the class's is not what is called.
    """
    name = "__call__" if by_call else "forward"

    def make() -> type:
        return class_over(below, Patched, {name: _deriving_method(below, name, allowed)}, sites_below(below))

    return shared_class(below, ("derive", name, allowed), make)


def _deriving_method(below: type[nn.Module], name: str, allowed: bool) -> Callable[..., Any]:
    @functools.wraps(getattr(below, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        traced = torch.compiler.is_compiling()
        if traced or is_deriving(allowed) or not may_derive() or not is_patched(self):
            return users_call(getattr(below, name), self, *args, **kwargs)
        with Deriving(allowed, self):
            return users_call(getattr(below, name), self, *args, **kwargs)

    return method
