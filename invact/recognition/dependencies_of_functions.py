"""What a function, or a value that stands where code reads it, depends on: closures, files, defaults, what it calls.

Told from its bytecode. What could change without being noticed is an error here, and the activation is left alone.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from invact.recognition.dependencies import GONE, Reading, UnseenError, contents_of, is_atom

_LIBRARIES = ("torch", "math", "numpy")  # whoever exchanges what these hold changes PyTorch itself


def readings_of_function(
    function: types.FunctionType, seen: set[int], own: type | None = None, keeps: bool = False
) -> Iterator[Reading]:
    """What a function reads of its closure and its file, and the functions that it calls by name.

    Args:
        function: the function.
        seen: the functions that were read already.
        own: the class that it is a method of, which it may name.
        keeps: it may set attributes, as an autograd function does to its context.

    Raises:
        UnseenError: it reads what can change unseen, or does something besides computing.
    """
    if id(function) in seen:
        return
    seen.add(id(function))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and (value := contents_of(cell)) is not GONE:
            yield from readings_of_value(cell, name, value, seen, own)
    if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
        return  # PyTorch's own files hold nothing that changes
    if _has_effects(function.__code__, keeps):
        raise UnseenError(function.__name__)
    yield Reading(function, "__code__", function.__code__)
    yield Reading(function, "__defaults__", function.__defaults__)
    for value in function.__defaults__ or ():
        yield from (r for r in readings_of_value(None, "__defaults__", value, seen) if r.owner is not None)
    yield Reading(function, "__kwdefaults__", function.__kwdefaults__)
    for name, value in (function.__kwdefaults__ or {}).items():
        yield from readings_of_value(function.__kwdefaults__, name, value, seen)
    for name in sorted(names_in(function.__code__, "LOAD_GLOBAL", "LOAD_NAME")):
        if name in function.__globals__:
            yield from readings_of_value(function.__globals__, name, function.__globals__[name], seen, own)
        elif not _is_harmless_builtin(getattr(builtins, name, None)):
            raise UnseenError(name)


def _has_effects(code: types.CodeType, keeps: bool) -> bool:
    """Whether some code changes anything but its own variables, or imports what is not known."""
    if not keeps and names_in(code, "STORE_ATTR", "DELETE_ATTR"):
        return True
    imported = {name.partition(".")[0] for name in names_in(code, "IMPORT_NAME")}
    outside = names_in(code, "STORE_DEREF", "DELETE_DEREF") & set(code.co_freevars)
    return bool(outside or imported - set(_LIBRARIES) or names_in(code, "STORE_GLOBAL", "DELETE_GLOBAL"))


_HARMLESS = (abs, all, any, callable, divmod, isinstance, issubclass, len, max, min, pow, repr, round, sorted, sum)


def _is_harmless_builtin(value: Any) -> bool:
    return isinstance(value, type) or value in _HARMLESS


def readings_of_value(owner: Any, name: str, value: Any, seen: set[int], own: type | None = None) -> Iterator[Reading]:
    """That `value` stands at `name`, and what a function that stands there reads itself.

    Raises:
        UnseenError: the value is something that can change in itself, or the function does more than compute.
    """
    if isinstance(value, types.ModuleType):
        if value.__name__.partition(".")[0] not in _LIBRARIES:
            raise UnseenError(name)  # what it holds may change
        return
    if isinstance(value, type):
        yield Reading(owner, name, value)
        if own is None or not issubclass(own, value):
            yield from _readings_of_class(value, seen)
    elif is_atom(value):
        yield Reading(owner, name, value)
    elif isinstance(value, functools.partial):
        yield Reading(owner, name, value)
        for part in (value.func, *value.args):
            yield from (r for r in readings_of_value(None, name, part, seen) if r.owner is not None)
        for keyword, part in value.keywords.items():
            yield from readings_of_value(value.keywords, keyword, part, seen)
    elif isinstance(value, types.FunctionType):
        yield Reading(owner, name, value)
        yield from readings_of_function(value, seen)
    elif isinstance(value, types.MethodType) and isinstance(value.__self__, type):
        yield Reading(owner, name, value)
        yield from _readings_of_class(value.__self__, seen)
    elif _is_fixed_callable(value):
        yield Reading(owner, name, value)
    else:
        raise UnseenError(name)


def _readings_of_class(kind: type, seen: set[int]) -> Iterator[Reading]:
    """What an autograd function of the author's reads; other classes of his may hold anything."""
    home = kind.__module__.partition(".")[0]
    if home in (*_LIBRARIES, "builtins", "typing") or issubclass(kind, enum.Enum) or id(kind) in seen:
        return
    if not issubclass(kind, torch.autograd.Function):
        raise UnseenError(kind.__name__)
    seen.add(id(kind))
    for base in itertools.takewhile(lambda base: base is not torch.autograd.Function, kind.__mro__):
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                yield Reading(base, name, getattr(base, name))
                yield from readings_of_function(function, seen, own=kind, keeps=True)
            elif not name.startswith("__"):
                yield from readings_of_value(base, name, value, seen)


def _is_fixed_callable(value: Any) -> bool:
    """Such as the functions of `torch.nn.functional` that are no Python functions, or an operator of `torch.ops`."""
    if isinstance(value, types.BuiltinFunctionType):
        if value.__self__ is builtins:
            return _is_harmless_builtin(value)
        return value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type))  # not `[].append`
    return callable(value) and not isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] == "torch"


def names_in(code: types.CodeType, *operations: str) -> set[str]:
    """The names that some code, and the functions that it makes, use in these operations."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    found = {str(step.argval) for step in dis.get_instructions(code) if step.opname in operations}
    return found.union(*(names_in(each, *operations) for each in inner))
