"""The functions that an activation may be built of: those that work element by element."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn

# What an activation may be built of: torch functions and tensor methods that work element by element.
_POINTWISE = frozenset(
    [
        "abs",
        "absolute",
        "add",
        "celu",
        "celu_",
        "clamp",
        "clamp_",
        "clamp_max",
        "clamp_min",
        "clamp_min_",
        "clip",
        "clip_",
        "div",
        "divide",
        "elu",
        "elu_",
        "erf",
        "erfc",
        "exp",
        "float",
        "gelu",
        "hardsigmoid",
        "hardswish",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
        "log",
        "log1p",
        "log_sigmoid",
        "logaddexp",
        "max",
        "maximum",
        "min",
        "minimum",
        "mish",
        "mul",
        "multiply",
        "neg",
        "negative",
        "pow",
        "reciprocal",
        "relu",
        "relu6",
        "relu_",
        "rsqrt",
        "selu",
        "selu_",
        "sigmoid",
        "sigmoid_",
        "silu",
        "softplus",
        "softsign",
        "special_erf",
        "special_erfc",
        "special_expit",
        "special_ndtr",
        "sqrt",
        "square",
        "sub",
        "subtract",
        "tanh",
        "tanh_",
        "threshold",
        "threshold_",
        "to",
        "true_divide",
        "where",
        "zeros_like",
    ]
)


STEADY_LIBRARIES = ("torch", "math")
"""Packages whose functions do the same at every call; the author's own may read what changes."""


def may_be_pointwise(function: Any, author: str) -> bool:
    """Functions of torch by their names, and the author's own, which recognition will try.

    Args:
        function: anything that a name stands for.
        author: the module whose functions are the author's own.
    """
    if isinstance(function, functools.partial):
        return may_be_pointwise(function.func, author)
    if not is_function(function):
        return False
    if home_of(function) == "torch":
        return has_pointwise_name(getattr(function, "__name__", ""))
    own = isinstance(function, types.FunctionType) and function.__module__ == author
    return own or home_of(function) == "math"


def has_pointwise_name(name: str) -> bool:
    """Whether a function of torch, or a method of a tensor, of this name works element by element."""
    return name in _POINTWISE


def is_function(value: Any) -> bool:
    """Whether a value is called as a function: not a module, a class or a method."""
    return callable(value) and not isinstance(value, (nn.Module, type, types.MethodType))


def home_of(function: Any) -> str:
    """The package that a function is from; torch's own builtins do not say."""
    return (getattr(function, "__module__", None) or "torch").partition(".")[0]
