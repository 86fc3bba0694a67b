"""What an activation computes with besides its input, and whether that is still what it was.

A slope may be annealed, a constant in a closure or a file may change. What was recognised as a curve is that curve only
as long as everything that its code reads is the same.
"""

from __future__ import annotations

import dis
import enum
import functools
import itertools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_FIXED = (types.ModuleType, types.BuiltinFunctionType, type)  # whoever exchanges what these hold changes PyTorch itself
_LIBRARIES = ("torch", "math")
_EVERY_MODULE_HAS = frozenset(nn.Module().__dict__)
_GONE = object()


class UnseenError(Exception):
    """The code reads something that could change without being noticed."""


class Reading:
    """One value that code reads, and where: `owner` is None for the module itself."""

    __slots__ = ("name", "owner", "value")

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reading):
            return NotImplemented
        return (self.owner is other.owner and self.name == other.name) and _same(self.value, other.value)

    def __hash__(self) -> int:
        return hash((id(self.owner), self.name))

    def now(self, module: nn.Module) -> Any:
        """What stands there at present."""
        if self.owner is None:
            return module.__dict__.get(self.name, _GONE)
        if isinstance(self.owner, types.CellType):
            return self.owner.cell_contents
        if isinstance(self.owner, dict):
            return self.owner.get(self.name, _GONE)
        return getattr(self.owner, self.name, _GONE)


class Settings:
    """Everything that some code reads besides its arguments. Equal ones mean the same computation.

    Example:
        >>> act = nn.LeakyReLU(0.3)
        >>> settings = settings_of_module(act)
        >>> settings.unchanged(act)
        True
        >>> act.negative_slope = 0.01
        >>> settings.unchanged(act)
        False
    """

    __slots__ = ("_attributes", "_can_be_traced", "readings")

    def __init__(self, readings: Iterator[Reading]) -> None:
        self.readings = tuple(dict.fromkeys(readings))
        self._attributes = tuple((reading.name, reading.value) for reading in self.readings if reading.owner is None)
        # torch.compile watches attributes by itself; of what stands elsewhere only code is taken not to change
        elsewhere = [reading.value for reading in self.readings if reading.owner is not None]
        self._can_be_traced = all(callable(value) or isinstance(value, types.CodeType) for value in elsewhere)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self.readings == other.readings

    def __hash__(self) -> int:
        return hash(self.readings)

    def unchanged(self, module: nn.Module) -> bool:
        """Whether all of it is what it was, for a module of the same class as the one that was read."""
        if torch.compiler.is_compiling():
            return self._can_be_traced and all(getattr(module, name) == value for name, value in self._attributes)
        for reading in self.readings:
            now = reading.now(module)
            if now is not reading.value and not _same(now, reading.value):
                return False
        return True


def settings_of_module(module: nn.Module) -> Settings:
    """What the methods of a module read.

    Raises:
        UnseenError: they read something that can change without being noticed.
    """
    return Settings(_readings_of_module(module))


def _readings_of_module(module: nn.Module) -> Iterator[Reading]:
    kind, seen, attributes = type(module), set[int](), set[str]()
    yield Reading(kind, "forward", kind.forward)
    for function in _methods(kind):
        attributes |= _names(function.__code__, "ATTR", "METHOD")
        yield from readings_of_function(function, seen)
    for name in sorted(attributes - _EVERY_MODULE_HAS):
        if name in module.__dict__:
            value = module.__dict__[name]
            if isinstance(value, types.MethodType) and value.__self__ not in (module, kind):
                raise UnseenError(name)  # what its own object holds may change
            yield from readings_of_value(None, name, value, seen)
        elif (value := _data_of_class(kind, name)) is not _GONE:
            yield from readings_of_value(kind, name, value, seen)


def _own_classes(kind: type) -> Iterator[type]:
    return itertools.takewhile(lambda base: base not in (nn.Module, object), kind.__mro__)


def _methods(kind: type) -> Iterator[types.FunctionType]:
    """The functions of a class that its forward may call."""
    for base in _own_classes(kind):
        for name, value in list(vars(base).items()):
            function = getattr(value, "fget" if isinstance(value, property) else "__func__", value)
            if isinstance(function, types.FunctionType) and not name.startswith("__") and name != "extra_repr":
                yield function


def _data_of_class(kind: type, name: str) -> Any:
    value = next((vars(base)[name] for base in _own_classes(kind) if name in vars(base)), _GONE)
    return _GONE if hasattr(value, "__get__") else value


def readings_of_function(function: types.FunctionType, seen: set[int]) -> Iterator[Reading]:
    """What a function reads of its closure and its file, and the functions that it calls by name."""
    if id(function) in seen:
        return
    seen.add(id(function))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__" and (value := _contents(cell)) is not _GONE:
            yield from readings_of_value(cell, name, value, seen)
    if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
        return  # PyTorch's own files hold nothing that changes
    yield Reading(function, "__code__", function.__code__)
    if function.__defaults__:
        yield from readings_of_value(function, "__defaults__", function.__defaults__, seen)
    for name, value in (function.__kwdefaults__ or {}).items():
        yield from readings_of_value(function.__kwdefaults__, name, value, seen)
    for name in sorted(_names(function.__code__, "GLOBAL", "NAME")):
        if name in function.__globals__:
            yield from readings_of_value(function.__globals__, name, function.__globals__[name], seen)


def readings_of_value(owner: Any, name: str, value: Any, seen: set[int]) -> Iterator[Reading]:
    """That `value` stands at `name`, and what a function that stands there reads itself.

    Raises:
        UnseenError: the value is something that can change in itself.
    """
    if isinstance(value, (types.ModuleType, type)) and owner is not None:
        return  # a module or class that a file has imported
    if _is_atom(value) or isinstance(value, _FIXED):
        yield Reading(owner, name, value)
    elif isinstance(value, functools.partial):
        yield Reading(owner, name, value)
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from (r for r in readings_of_value(None, name, part, seen) if r.owner is not None)
    elif isinstance(value, (types.FunctionType, types.MethodType)):
        yield Reading(owner, name, value)
        yield from readings_of_function(getattr(value, "__func__", value), seen)
    elif _is_fixed_callable(value):
        yield Reading(owner, name, value)
    else:
        raise UnseenError(name)


def _is_fixed_callable(value: Any) -> bool:
    """Such as the functions of `torch.nn.functional` that are no Python functions, or an operator of `torch.ops`."""
    return callable(value) and not isinstance(value, nn.Module) and type(value).__module__.partition(".")[0] == "torch"


def _is_atom(value: Any) -> bool:
    return isinstance(value, _ATOMS) or (isinstance(value, (tuple, frozenset)) and all(map(_is_atom, value)))


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and (_is_atom(one) or callable(one)) and bool(one == other))


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put there yet
        return _GONE


def _names(code: types.CodeType, *kinds: str) -> set[str]:
    """The names that some code, and the functions that it makes, load in these ways."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    found = {
        str(step.argval)
        for step in dis.get_instructions(code)
        if step.opname.startswith("LOAD_") and any(kind in step.opname for kind in kinds)
    }
    return found.union(*(_names(each, *kinds) for each in inner))
